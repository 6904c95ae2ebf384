"""Whether an adapter belongs to the model that it is loaded on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from torch import Tensor

from spade_eval.adapter_files import CONFIG, RECORD, WEIGHTS
from spade_eval.errors import UserError
from spade_eval.fingerprint import digest, same

if TYPE_CHECKING:
    from peft import PeftModel


def load_config(name: str, revision: str | None) -> PeftConfig:
    """Read the config of an adapter, before any weight is loaded.

    Args:
        name: Its folder or hub id.
        revision: Of a hub id.

    Raises:
        UserError: There is none.
    """
    try:
        return PeftConfig.from_pretrained(name, revision=revision)
    except Exception as err:  # PEFT passes on what json, its classes and the Hub raise
        raise UserError(
            f"peft={name}: no PEFT adapter can be read there ({_beginning(err)}). Give the folder "
            f"or hub id of one; it holds {CONFIG} and {WEIGHTS}."
        ) from err


def misfit(name: str, config: PeftConfig, base: str, err: Exception) -> UserError:
    """The error for an adapter that was put on another model than its own.

    Args:
        name: The adapter's folder or hub id.
        config: Its config.
        base: The model.
        err: What went wrong.
    """
    own = config.base_model_name_or_path or "a model that it does not name"
    return UserError(
        f"peft={name} was trained for {own} and does not fit {base}: {_beginning(err)}. Give the "
        "adapter's own model by pretrained=, or another adapter."
    )


def require_own(model: PeftModel, name: str, revision: str | None) -> None:
    """Make sure that a loaded adapter is the model's own.

    PEFT is content with one for fewer or more layers, and cannot know of other weights of the same
    shapes.

    Args:
        model: The model with the adapter.
        name: The adapter's folder or hub id.
        revision: Of a hub id.

    Raises:
        UserError: Says what does not fit, for `misfit`.
    """
    found = load_peft_weights(name, device="cpu", revision=revision).keys()
    needed = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    allowed = get_peft_model_state_dict(model, save_embedding_layers=True).keys()
    if lacks := sorted(needed - found):
        raise UserError(f"it has no weights for {len(lacks)} places, such as {lacks[0]}")
    if extra := sorted(found - allowed):
        raise UserError(f"{len(extra)} of its weights find no place, such as {extra[0]}")
    recorded = record(name, revision).get("adapted")
    if recorded and (here := adapted(model)) and not same(recorded, here):
        raise UserError(f"the weights that it changes were {recorded} and are {here}")


def adapted(model: PeftModel) -> str:
    """Hash the weights that the active adapter changes, without the adapter.

    Empty if they cannot be compared: quantised, offloaded, or parameters of another name, as those
    of experts.
    """
    layers = [m.get_base_layer() for m in model.modules() if isinstance(m, BaseTunerLayer)]
    weights = [getattr(layer, "weight", None) for layer in layers]
    known = [
        w for w in weights if isinstance(w, Tensor) and w.is_floating_point() and not w.is_meta
    ]
    return digest(("", weight) for weight in known) if len(known) == len(weights) else ""


def record(name: str, revision: str | None) -> dict[str, Any]:
    """What `spade-eval finetune` wrote about an adapter; empty if it did not make it.

    Args:
        name: The adapter's folder or hub id.
        revision: Of a hub id.
    """
    path = Path(name) / RECORD
    if not Path(name).is_dir():
        try:
            path = Path(hf_hub_download(name, RECORD, revision=revision))
        except (EntryNotFoundError, OSError):
            return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _beginning(err: Exception) -> str:
    """The beginning of an error that may list every weight of a model."""
    lines = [line.strip() for line in str(err).strip().splitlines() if line.strip()]
    return " ".join(lines[:2])[:300].rstrip(".") or type(err).__name__
