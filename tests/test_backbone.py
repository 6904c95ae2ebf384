"""The hollow pass gives each family's own states and logits, and the checks refuse what cannot be
decoded."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from zoo import FAMILIES, RECURRENT, REFUSED, SUPPORTED, VOCAB, random_ids, tiny

from spade_eval import checks
from spade_eval.backbone import Backbone
from spade_eval.errors import UnsupportedModelError, UserError
from spade_eval.generation import check
from spade_eval.hollow import find_layers


@pytest.mark.parametrize("family", SUPPORTED)
@torch.no_grad()
def test_layer_by_layer_is_the_model_bit_for_bit(family: str) -> None:
    model, ids = tiny(family), random_ids(2, 9)
    backbone = Backbone(model)
    ours = backbone.hidden_states(ids)
    theirs = model(ids, output_hidden_states=True, use_cache=False)
    assert len(ours) == backbone.n_layers + 1 == len(theirs.hidden_states)
    # transformers returns the last state after the final norm, so L itself is compared by its
    # logits. Its Mamba leaves out the embedding.
    first = 1 if family == "mamba" else 0
    for layer, (a, b) in enumerate(zip(ours[first:-1], theirs.hidden_states, strict=False), first):
        assert torch.equal(a, b), f"layer {layer}"
    logits = backbone.logits(ours[-1].flatten(0, 1)).view_as(theirs.logits)
    torch.testing.assert_close(logits, theirs.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["as it is", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_operations_are_two_per_weight_whatever_computes_attention(
    family: str, attention: str
) -> None:
    model = copy.deepcopy(tiny(family))
    if attention == "eager":
        model.set_attn_implementation("eager")
    layers = find_layers(model, family).layers
    expected = 0.0
    for name, p in layers.named_parameters():
        if p.ndim > 1 and not name.endswith("_bias"):
            expected += p.numel() / (2 if ".experts." in name else 1)  # two of four experts run
    backbone = Backbone(model)
    assert backbone.operations == pytest.approx(2 * expected / len(layers))
    # Of a hidden width of 32; where it is projected to 16, two projections of 32 x 16 run too, and
    # in ModernBERT's a dense layer.
    head = {"opt_projected": 16 * VOCAB + 2 * 16 * 32, "modernbert": 32 * VOCAB + 32 * 32}
    head = head.get(family, 32 * VOCAB)
    assert checks.head_operations(backbone) == 2 * head


def test_what_an_adapter_computes_at_each_call_is_no_operation_of_a_token() -> None:
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=True)
    model = get_peft_model(copy.deepcopy(tiny("llama")), config).eval()
    weights = sum(
        p.numel() for n, p in model.named_parameters() if ".layers.0." in n and p.ndim > 1
    )
    assert Backbone(model).operations == pytest.approx(2 * weights)


def test_operations_can_be_counted_where_a_gpu_shares_keys_among_heads() -> None:
    """Older versions of torch's own count refuse the fused kernels of half precision there."""
    q, k = (torch.empty(1, heads, 3, 8, dtype=torch.half, device="meta") for heads in (4, 2))
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    with checks._products() as counter:
        attend(q, k, k)
        q[0, 0] @ q[0, 0].T
    assert counter.get_total_flops() == 2 * 3 * 8 * 3


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "bloom", "opt_projected"])
def test_a_plain_head_can_be_computed_at_some_of_the_vocabulary(family: str) -> None:
    assert Backbone(tiny(family)).narrows


class Biased(transformers.LlamaForCausalLM):
    """Adds to its logits behind the head, by column, as code beside a model may."""

    kind = "all"

    def forward(self, *args: object, **kwargs: object) -> object:
        out = super().forward(*args, **kwargs)
        if self.kind == "all":
            out.logits = out.logits + torch.linspace(-1, 1, self.config.vocab_size)
        elif self.kind == "last":
            out.logits[..., self.config.vocab_size - 1] = -9.0
        else:
            out.logits[..., :3] = torch.finfo(out.logits.dtype).min
        return out


@pytest.mark.parametrize("kind", ["all", "last", "first"])
@torch.no_grad()
def test_a_head_with_something_behind_it_is_computed_whole(kind: str) -> None:
    torch.manual_seed(0)
    model = Biased(tiny("llama").config).eval()
    model.kind = kind
    backbone = Backbone(model)
    assert not backbone.narrows
    h, some = torch.randn(3, backbone.width), torch.tensor([5, 9, 2])
    assert torch.equal(backbone.logits(h, some), backbone.logits(h)[:, some])


@pytest.mark.parametrize("case", ["lora", "saved", "hooked"])
def test_a_head_that_is_more_than_a_plain_layer_is_computed_whole(case: str) -> None:
    model = copy.deepcopy(tiny("llama"))
    if case == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"])).eval()
    elif case == "saved":
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        model = get_peft_model(model, config).eval()
    else:
        model.lm_head._hf_hook = None  # as accelerate leaves its own there
    backbone = Backbone(model)
    head = model.get_output_embeddings()
    widths: list[int] = []
    head.register_forward_hook(lambda _m, _a, out: widths.append(out.shape[-1]))
    assert not backbone.narrows
    h, some = torch.randn(3, backbone.width), torch.tensor([5, 9])
    with torch.no_grad():
        assert torch.equal(backbone.logits(h, some), backbone.logits(h)[:, some])
    assert {*widths} == {VOCAB}


@pytest.mark.parametrize("family", SUPPORTED)
@torch.no_grad()
def test_a_row_may_be_packed_or_the_check_says_no(family: str) -> None:
    # Alibi models build their biases from a 2D mask and cannot take a 4D one; recurrent layers take
    # none; GPT-Neo's local layers see the last few columns, whatever the mask says.
    apart = {"bloom", "falcon_alibi", "gpt_neo", *RECURRENT}
    assert Backbone(tiny(family)).packs == (family not in apart)


@pytest.mark.parametrize("family", SUPPORTED)
def test_a_start_token_leaves_keys_and_values_or_both_tokens_are_computed(family: str) -> None:
    backbone = Backbone(tiny(family))
    assert backbone.keeps_keys == (family in FAMILIES)
    start = backbone.start_states(torch.tensor([5, 7, 5]))
    assert len(start.keys) == len(start.values) == (4 if backbone.keeps_keys else 0)
    assert start.states.shape == (2, 5, backbone.width)


@pytest.mark.parametrize("family", RECURRENT)
@pytest.mark.parametrize("spread", [0.02, 0.3])
def test_half_precision_forgives_no_neighbours_and_no_missing_state(
    family: str, spread: float
) -> None:
    """Its tolerance is wide, and weights of a small spread do little to their neighbours."""
    model = copy.deepcopy(tiny(family, initializer_range=spread)).bfloat16()
    backbone = Backbone(model)
    assert not backbone.keeps_keys
    assert not backbone.packs
    with pytest.raises(UnsupportedModelError, match=r"can be scored; generate with --model hf\.$"):
        check(backbone)


def test_states_that_stay_in_fp32_do_so_from_the_embedding_to_the_end_of_a_tail() -> None:
    backbone = Backbone(copy.deepcopy(tiny("mamba")).bfloat16())
    assert backbone.state_dtype == torch.float32
    states = backbone.hidden_states(random_ids(2, 5))
    ids = torch.tensor([5, 7])
    layers, one = torch.tensor([0, 2]), torch.ones(2, dtype=torch.long)
    tails = backbone.tail(torch.stack([states[0][0, 1], states[2][1, 1]]), layers, ids, one, ids)
    assert {h.dtype for h in [*states, tails]} == {torch.float32}


@pytest.mark.parametrize("family", SUPPORTED)
def test_positions_are_inert_where_they_are_added_to_the_embedding_or_absent(family: str) -> None:
    inert = {"gpt2", "gpt_neo", "opt", "opt_projected", "bloom", "falcon_alibi", "mamba", "jamba"}
    assert Backbone(tiny(family)).positions_inert == (family in inert)


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_cannot_be_decoded_are_refused_by_name(family: str) -> None:
    model = tiny(family)
    with pytest.raises(UnsupportedModelError) as refusal:
        Backbone(model)
    assert type(model).__name__ in str(refusal.value)
    assert ("encoder-decoder" if family == "t5" else "fails check") in str(refusal.value)


def test_a_model_that_looks_ahead_fails_the_start_check() -> None:
    """A causal model whose first layer mixes in later tokens is caught, whatever its class says."""
    model = tiny("llama", seed=3)
    layer = model.model.layers[0]
    handle = layer.register_forward_hook(lambda _m, _a, out: out + out.mean(1, keepdim=True))
    try:
        with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM fails check [23]"):
            Backbone(model)
    finally:
        handle.remove()


@torch.no_grad()
def test_lora_adapter_is_part_of_the_model() -> None:
    base, ids = tiny("llama", seed=5), random_ids(2, 7)
    plain = Backbone(base).hidden_states(ids)[-1]
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(base, config).eval()
    backbone = Backbone(adapted)
    states = backbone.hidden_states(ids)
    expected = adapted(ids, use_cache=False).logits
    torch.testing.assert_close(
        backbone.logits(states[-1].flatten(0, 1)).view_as(expected), expected
    )
    assert (states[-1] - plain).abs().max() > 0.1
    assert backbone.name == "LlamaForCausalLM"


@torch.no_grad()
def test_layers_are_back_in_place_after_a_pass_and_after_an_error() -> None:
    model, ids = tiny("qwen2"), random_ids(1, 5)
    backbone = Backbone(model)
    layers = model.model.layers
    backbone.hidden_states(ids)
    assert model.model.layers is layers
    with pytest.raises(IndexError):
        backbone.embed(torch.tensor([[10**6]]))
    assert model.model.layers is layers
    assert model(ids).logits.isfinite().all()


@torch.no_grad()
def test_bf16_passes_the_checks() -> None:
    model = tiny("llama", seed=7).to(torch.bfloat16)
    assert Backbone(model).packs


@torch.no_grad()
def test_a_tail_runs_one_token_through_the_upper_layers_only() -> None:
    backbone = Backbone(tiny("llama", seed=9))
    ids = random_ids(3, 6)
    h = backbone.hidden_states(ids)[2][:, -1]
    backbone.start_states(ids[:, 0])  # known from now on
    seen: list[tuple[int, torch.Size]] = []
    handles = [
        layer.register_forward_hook(lambda _m, _a, out, i=i: seen.append((i, out.shape)))
        for i, layer in enumerate(backbone._layers)
    ]
    backbone.tail(h, 2, ids[:, -1], torch.ones(3, dtype=torch.long), ids[:, 0])
    for handle in handles:
        handle.remove()
    assert seen == [(2, (3, 1, backbone.width)), (3, (3, 1, backbone.width))]


@torch.no_grad()
def test_start_states_are_forgotten_on_demand() -> None:
    base, ids = tiny("llama", seed=13), random_ids(2, 5)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    backbone = Backbone(get_peft_model(base, config).eval())
    adapted = backbone.start_states(ids[:, 0]).hidden(4)
    with backbone.model.disable_adapter():
        backbone.starts.clear()
        plain = backbone.start_states(ids[:, 0]).hidden(4)
    assert (adapted - plain).abs().max() > 0.1


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(UserError, match=r"training mode.*eval"):
        Backbone(tiny("gpt2", seed=14).train())


def test_prompt_learning_adapters_are_refused() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(UnsupportedModelError, match="prompt-learning"):
        Backbone(get_peft_model(tiny("llama", seed=15), config).eval())


@torch.no_grad()
def test_an_adapter_on_the_embedding_is_part_of_the_model() -> None:
    config = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(tiny("llama", seed=16), config).eval()
    backbone, ids = Backbone(adapted), random_ids(1, 5)
    ours = backbone.logits(backbone.hidden_states(ids)[-1][0])
    torch.testing.assert_close(ours, adapted(ids, use_cache=False).logits[0])


def test_start_states_of_the_checks_do_not_stay() -> None:
    """The checks run outside autocast, scoring perhaps inside: their states have another dtype."""
    assert len(Backbone(tiny("llama", seed=17)).starts) == 0
