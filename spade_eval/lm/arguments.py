"""Checks on `--model_args`, made before any weight is loaded.

HFLM hands every argument that it does not know to `from_pretrained`, where a misspelt name ends in
a traceback from deep inside transformers. Here it ends in a sentence with the nearest valid name.
"""

from __future__ import annotations

import inspect
import re
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM

from spade_eval.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable

# What `from_pretrained` takes beyond HFLM's own arguments; a config's entries are accepted too.
FROM_PRETRAINED = frozenset(
    """
    adapter_kwargs adapter_name allow_all_kernels attn_implementation cache_dir code_revision config
    device_map device_mesh distributed_config experts_implementation force_download
    generation_config ignore_mismatched_sizes kernel_config key_mapping local_files_only
    low_cpu_mem_usage max_memory offload_buffers proxies quantization_config state_dict token
    torch_dtype tp_size use_kernels use_safetensors variant weights_only
    """.split()  # noqa: SIM905 - a list of literals would be thirty lines
)


def hflm_arguments() -> set[str]:
    """Names of HFLM's own arguments."""
    parameters = inspect.signature(HFLM.__init__).parameters.values()
    return {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - {"self"}


def check_names(
    model: str, given: Iterable[str], own: Iterable[str], config: Any, remote_code: bool
) -> None:
    """Refuse arguments that nobody would take.

    Args:
        model: Name of the class, for the message.
        given: The arguments' names.
        own: The arguments of the class itself.
        config: The model's config: its attributes may be overridden.
        remote_code: Whether the model brings code of its own, which may take any argument.

    Raises:
        UserError: Names the argument and the nearest valid one.
    """
    valid = hflm_arguments() | FROM_PRETRAINED | set(own)
    valid |= set(config.to_dict())
    unknown = [name for name in given if name not in valid]
    if unknown and not remote_code:
        hints = " ".join(
            f"{name!r} is not an argument.{did_you_mean(name, valid)}" for name in unknown
        )
        raise UserError(f"{model}: {hints} Its own arguments are {', '.join(sorted(own))}.")


def check_values(given: dict[str, Any]) -> None:
    """Check values of HFLM's arguments that would fail late or in the dark.

    Raises:
        UserError: Names the argument, what was given and what is valid.
    """
    _check_batch_size(given.get("batch_size", 1))
    _check_device(given.get("device"))
    for name in ("max_batch_size", "max_length"):
        value = given.get(name)
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise UserError(f"{name}={value!r}: give a whole number from 1 up.")
    if given.get("peft") and given.get("delta"):
        raise UserError("peft= and delta= exclude each other: give one of them.")
    if given.get("backend", "default") not in ("default", "causal"):
        raise UserError(
            f"backend={given['backend']!r}: the decoders read decoder-only models; leave backend "
            "out, or give 'causal'."
        )
    for name, named in dtypes(given).items():
        if named != "auto" and not isinstance(getattr(torch, named, None), torch.dtype):
            hint = did_you_mean(named, ("float32", "float16", "bfloat16", "float64"))
            raise UserError(f"{name}={given[name]!r} is not a torch dtype.{hint}")


def dtypes(given: dict[str, Any]) -> dict[str, str]:
    """The arguments that name a dtype, as HFLM wants it: "bfloat16" for "torch.bfloat16"."""
    return {
        name: given[name].removeprefix("torch.")
        for name in ("dtype", "softmax_dtype", "mixed_precision_dtype")
        if isinstance(given.get(name), str)
    }


def not_loaded(model: str, given: dict[str, Any], err: Exception) -> UserError:
    """The error for a model that cannot be loaded: one sentence, about the argument at fault.

    Args:
        model: What `pretrained` names.
        given: HFLM's arguments.
        err: Of those who load it, often of many lines.
    """
    lines = [" ".join(line.split()) for line in str(err).splitlines() if line.strip()]
    why = (lines or [type(err).__name__])[0].rstrip(".:")

    def told(value: object) -> bool:  # as a whole name: one may begin with the other
        return re.search(rf"(?<![\w./-]){re.escape(str(value))}(?![\w/-])", str(err)) is not None

    for name in ("tokenizer", "delta", "attn_implementation", "gguf_file"):
        if isinstance(given.get(name), str) and told(given[name]) and not told(model):
            return UserError(
                f"{name}={given[name]} cannot be loaded ({why}). Give another, or leave it out."
            )
    parts = [f", {name}={given[name]}" for name in ("subfolder", "tokenizer") if given.get(name)]
    then = _in_place_of_a_model(Path(model)) or (
        "Install what is missing."
        if isinstance(err, ImportError)
        else "Give a model's folder, or a Hub id that is in the cache or can be reached."
    )
    return UserError(f"pretrained={model}{''.join(parts)} cannot be loaded ({why}). {then}")


def _in_place_of_a_model(folder: Path) -> str:
    """What a folder is that is no model's, and where it belongs; empty if it is unknown."""
    if (folder / "adapter_config.json").is_file():
        return "It is an adapter: give it as peft=, and its base model as pretrained=."
    config = folder / "config.json"
    if config.is_file() and '"teacher"' in config.read_text("utf-8", "replace"):
        return "It is a lens: give it as lens=, and its base model as pretrained=."
    return ""


def _check_batch_size(value: Any) -> None:
    """Accept a positive number, "auto" or "auto:N"."""
    number = str(value).removeprefix("auto:") if str(value) != "auto" else "1"
    if not (number.isdecimal() and int(number) >= 1):
        raise UserError(f"batch_size={value!r}: give a number from 1 up, 'auto' or 'auto:N'.")


def _check_device(value: Any) -> None:
    """Accept what torch sees here; HFLM takes the CPU for a name that it does not know.

    cuda:0 passes: lm-eval's command line says so where its user says nothing.
    """
    if value in (None, "cuda:0"):
        return
    try:
        kind = torch.device(value).type
    except (RuntimeError, TypeError):
        kind = ""
    here = ["cpu"]
    if torch.cuda.is_available():
        here += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        here += ["mps", "mps:0"]
    if kind in ("", "cpu", "cuda", "mps") and str(value) not in here:
        raise UserError(
            f"device={value!r} is not here: torch {torch.__version__} sees {', '.join(here)}. "
            "Without device= the first GPU is taken, or the CPU if there is none."
        )


def layer(value: Any, n_layers: int | None = None) -> int:
    """Resolve a layer argument; 0 is the embedding, L the last layer, -1 counts back from it.

    Args:
        value: What the user gave.
        n_layers: L; None checks the type only.

    Returns:
        l, from 0 to L.

    Raises:
        UserError: Not a whole number, or out of range.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # lm-eval's command line reads -1 as -1.0
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UserError(
            f"layer={value!r} is not a whole number. Give a layer from 0 (the embedding) to the "
            "model's last, or -1 for the last."
        )
    value = int(value)
    if n_layers is None:
        return value
    if not -n_layers - 1 <= value <= n_layers:
        raise UserError(
            f"layer={value} is out of range: this model has {n_layers} layers, so 0..{n_layers} "
            f"are valid (0 is the embedding), or {-n_layers - 1}..-1 counted from the last."
        )
    return value if value >= 0 else n_layers + 1 + value
