"""Which of transformers' causal language models can be decoded from their middle.

    python benchmarks/families.py [TYPE ...]

For every type that `AutoModelForCausalLM` knows, a tiny model with random weights is made from a
config in which all sizes that have a usual name are small, and opened: `Backbone` runs its checks.
Types whose config takes no such sizes are listed as not tried, which says nothing about them.
Writes results/families.csv and results/families.md; with types named, prints their lines only.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import signal
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from spade_eval.backbone import Backbone
from spade_eval.errors import UnsupportedModelError
from spade_eval.generation import check

RESULTS = Path(__file__).parent.parent / "results"
LAYERS, WIDTH = 4, 32
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "lru_width", "mamba_d_ssm"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("attention_heads", "decoder_attention_heads", "mamba_n_heads"), 4),
    "mamba_num_heads": 4,
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("intermediate_size_mlp", "block_ff_dim", "shared_intermediate_size"), 48),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "num_key_value_heads"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "head_dim"), 8),
    **dict.fromkeys(("global_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("index_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("linear_num_key_heads", "index_n_heads", "num_kv_shared_layers"), 2),
    **dict.fromkeys(("linear_num_value_heads", "index_topk", "mamba_d_state", "state_size"), 4),
    **dict.fromkeys(("rotary_dim", "laurel_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 97),
    "word_embed_proj_dim": WIDTH, "max_position_embeddings": 64, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Of encoders for pictures and sound, which no text passes.
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "depth": 1,
         "num_attention_heads": 2, "num_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
# What some families ask for instead, tried in turn.
VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": 4},
    {"head_dim": 16},
    {"mamba_d_head": 8},
    {"num_experts_per_tok": 1},
    {"attention_types": [[["global", "local"], 2]]},
]
# By default these have no layer of the kind that they are known for.
CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2}
KNOWN_FOR = {"lfm2": CONVOLUTIONS, "lfm2_moe": CONVOLUTIONS}
LARGEST = 5e7  # weights; beyond, a size was missed
SECONDS = 60


@dataclass
class Line:
    """What became of a type.

    Attributes:
        type: `model_type` of its config.
        model: The class.
        decoded: "yes", "no", or "not tried".
        tail: Tokens that a two-token tail computes: 1, or 2 where layers are recurrent.
        packs: Whether answers may share a row.
        generates: Whether text can be generated with exits.
        why: The check that failed, or why it was not tried.
    """

    type: str
    model: str
    decoded: str = "not tried"
    tail: int | None = None
    packs: bool | None = None
    generates: bool | None = None
    why: str = ""


def shrink(
    kind: type[PreTrainedConfig], sizes: dict[str, Any], unset: bool = False
) -> PreTrainedConfig:
    """A config of a kind, with `sizes` for whatever has such a name and is not off by default.

    Args:
        kind: The class.
        sizes: Values by name.
        unset: Whether to give also those that are None by default.
    """
    usual = kind()
    values = usual.to_dict()
    given = {
        name: size
        for name, size in sizes.items()
        if values.get(name) or (unset and values.get(name, 0) is None)
    }
    for name in ("layer_types", "layers_block_type"):
        if values.get(name):  # each kind of layer, in turn
            given[name] = (list(dict.fromkeys(values[name])) * LAYERS)[:LAYERS]
    for part in kind.sub_configs:
        if (its := getattr(usual, part, None)) is not None:
            own = sizes if part == "text_config" else TOWER
            given[part] = shrink(type(its), own, unset).to_dict()
    return kind(**given)


def tiny(model_type: str) -> tuple[Any, str]:
    """A tiny model of a type, or None and why there is none."""
    why = ""
    for unset, variant in itertools.product((False, True), VARIANTS):
        try:
            kind = type(AutoConfig.for_model(model_type))
            config = shrink(kind, SIZES | variant, unset)
            if model_type in KNOWN_FOR:
                config = kind(**config.to_dict() | KNOWN_FOR[model_type])
            with torch.device("meta"):
                weights = AutoModelForCausalLM.from_config(config).num_parameters()
            if weights > LARGEST:
                why = why or f"{weights / 1e6:.0f} million weights"
                continue
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            with torch.no_grad():
                model(input_ids=torch.tensor([[5, 7, 9]]), use_cache=False)
        except Exception as err:
            why = why or _one_line(f"{type(err).__name__}: {err}")
        else:
            return model, ""
    return None, why


def look(model_type: str, class_name: str) -> Line:
    """Open a tiny model of a type."""
    line = Line(model_type, class_name)
    model, line.why = tiny(model_type)
    if model is None:
        return line
    try:
        backbone = Backbone(model)
    except UnsupportedModelError as err:
        line.decoded = "no"
        line.why = _one_line(str(err).removeprefix(f"{type(model).__name__} "))
        return line
    line.decoded = "yes"
    line.tail, line.packs = 1 if backbone.keeps_keys else 2, backbone.packs
    try:
        check(backbone)
        line.generates = True
    except UnsupportedModelError:
        line.generates = False
    return line


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _late(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def page(lines: list[Line]) -> str:
    """The lines as Markdown."""
    count = Counter(line.decoded for line in lines)
    version = importlib.metadata.version("transformers")
    found: dict[str, list[str]] = {}
    for line in lines:
        if line.decoded == "yes":
            kind = "tails of one token" if line.tail == 1 else "tails of two tokens"
            kind += ", rows packed" if line.packs else ", a row for every sequence"
            kind += ", text with exits" if line.generates else ", no text with exits"
            found.setdefault(kind, []).append(line.type)
    text = [
        "# Families",
        "",
        f"What became of the {len(lines)} causal language models of transformers {version}, tiny "
        f"and with random weights (`python benchmarks/families.py`): {count['yes']} can be decoded "
        f"from every layer, {count['no']} are refused, and {count['not tried']} were not tried, "
        "for want of a small config. [families.csv](families.csv) has a line for each.",
        "",
        "Other weights may fail another check first. Of encoder-decoder families the decoder alone "
        "is meant (`BartForCausalLM`), and every type in its usual form: BERT and its kin without "
        "`is_decoder`, Gemma 4 without layers that share keys, which is refused where it has them.",
        "",
    ]
    for kind, types in sorted(found.items(), key=lambda pair: -len(pair[1])):
        text += [f"**{kind[0].upper()}{kind[1:]}** ({len(types)}): {', '.join(types)}.", ""]
    for decoded, title in (("no", "Refused"), ("not tried", "Not tried")):
        text += [f"**{title}**", "", "| type | why |", "|---|---|"]
        for line in lines:
            if line.decoded == decoded:
                why = line.why.split(". Supported are")[0].replace("|", "/")
                text.append(f"| {line.type} | {why[:160]} |")
        text.append("")
    return "\n".join(text)


def main(only: list[str]) -> None:
    """Look at all types, or at some."""
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _late)
    lines = []
    every = {k: str(v) for k, v in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}
    for model_type in tqdm(only or sorted(every), unit="type"):
        signal.alarm(SECONDS)
        try:
            lines.append(look(model_type, every[model_type]))
        except TimeoutError as err:
            lines.append(Line(model_type, every[model_type], why=str(err)))
        finally:
            signal.alarm(0)
    if only:
        print(*lines, sep="\n")
        return
    pd.DataFrame(map(asdict, lines)).to_csv(RESULTS / "families.csv", index=False)
    (RESULTS / "families.md").write_text(page(lines), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Which models of transformers can be decoded?")
    types = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    parser.add_argument(
        "only", nargs="*", metavar="TYPE", help="print what becomes of these (default: write all)"
    )
    asked = parser.parse_args().only
    if unknown := [name for name in asked if name not in types]:
        parser.error(f"no causal language model of transformers: {', '.join(unknown)}")
    main(asked)
