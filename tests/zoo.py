"""Tiny random-weight models of many families, made from their configs; nothing is downloaded.

`initializer_range` is large: with the default of 0.02 a tiny model attends to next to nothing, its
logits tie, and a decoder that loses the start token passes unnoticed.
"""

from __future__ import annotations

import functools

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

VOCAB = 97
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOW = {"sliding_window": 5}
HEAD = {"head_dim": 8}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2}

# name: (config class, what differs from SMALL; None removes a key)
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral_sliding": ("MistralConfig", WINDOW),
    "qwen2": ("Qwen2Config", {}),
    "qwen2_sliding": ("Qwen2Config", WINDOW | {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen3": ("Qwen3Config", HEAD),
    "gemma": ("GemmaConfig", HEAD),
    "gemma2": ("Gemma2Config", HEAD | WINDOW | {"query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", HEAD | WINDOW | ALTERNATING | {"query_pre_attn_scalar": 8}),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gpt2": ("GPT2Config", {}),
    "gpt_neo": ("GPTNeoConfig", {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 6}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt_projected": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "olmo2": ("Olmo2Config", {}),
    "granite": ("GraniteConfig", {"residual_multiplier": 0.7, "logits_scaling": 2.0, "embedding_multiplier": 3.0}),
    "falcon": ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_alibi": ("FalconConfig", {"alibi": True, "multi_query": True}),
    "bloom": ("BloomConfig", {}),
    "stablelm": ("StableLmConfig", {}),
    "smollm3": ("SmolLM3Config", {}),
    "modernbert": ("ModernBertDecoderConfig", {"tie_word_embeddings": False}),
    "cohere": ("CohereConfig", {"logit_scale": 0.5}),
    "cohere2": ("Cohere2Config", HEAD | WINDOW | ALTERNATING | {"logit_scale": 0.5}),
    "qwen3_moe": ("Qwen3MoeConfig", HEAD | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    # Its first layer is dense, and its keys and values are of low rank.
    "deepseek_v3": ("DeepseekV3Config", {"num_key_value_heads": 4, "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
                                         "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
                                         "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}),
    "gpt_oss": ("GptOssConfig", HEAD | WINDOW | ALTERNATING | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip

# What a token leaves to later ones is more than keys and values.
RECURRENT: dict[str, tuple[str, dict]] = {
    "mamba": ("MambaConfig", {"state_size": 4}),
    "jamba": ("JambaConfig", {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False,
                              "mamba_d_state": 4, "mamba_dt_rank": 4}),
    "falcon_h1": ("FalconH1Config", HEAD | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 4}),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"] * 2}),
    "qwen3_next": ("Qwen3NextConfig", HEAD | {"layer_types": ["linear_attention", "full_attention"] * 2, "num_experts": 4, "num_experts_per_tok": 2,
                                              "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "linear_key_head_dim": 8,
                                              "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}),
    "qwen3_5": ("Qwen3_5TextConfig", HEAD | {"layer_types": ["linear_attention", "full_attention"] * 2, "linear_key_head_dim": 8,
                                             "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}),
    "recurrent_gemma": ("RecurrentGemmaConfig", HEAD | {"lru_width": 32, "attention_window_size": 8}),
}  # fmt: skip

SUPPORTED = FAMILIES | RECURRENT

REFUSED: dict[str, tuple[str, dict]] = {
    "bert": ("BertConfig", {}),
    "gemma3n": ("Gemma3nTextConfig", HEAD | {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "laurel_rank": 4}),
    "t5": ("T5Config", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}),
}  # fmt: skip


@functools.cache
def tiny(name: str, seed: int = 0, **overrides: object) -> nn.Module:
    """A random model of a family, in fp32 and evaluation mode; norms and biases are random too."""
    class_name, differs = (SUPPORTED | REFUSED)[name]
    config_class = getattr(transformers, class_name)
    config = config_class(**(SMALL | differs | overrides))
    torch.manual_seed(seed)
    if config.is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if (
                parameter.ndim == 1
            ):  # norms start at one and biases at zero, where many mistakes do not show
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def random_ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Token ids (rows, tokens), none of them special."""
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@functools.cache
def byte_tokenizer(bos: bool = True) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer with one token per byte (ids 3..258) behind <pad>, <bos> and <eos>; it adds no
    BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<bos>", "<eos>"]
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>"} | ({"bos_token": "<bos>", "eos_token": "<eos>"} if bos else {})
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


BYTES = 3 + 256
