"""Whether a lens belongs to a model: width, layers, and the fingerprints of what reads it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, cast

from spade_eval.errors import UserError
from spade_eval.fingerprint import adapter_fingerprint, fingerprint, same
from spade_eval.hollow import find_layers, unwrap_peft
from spade_eval.lens import LinearLens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spade_eval.lens_config import LensConfig

log = logging.getLogger(__name__)


_SIZES = {"width": "width", "n_layers": "number of layers"}


def require_size(config: LensConfig, name: str, model_name: str, **sizes: int) -> None:
    """Make sure that a lens has the size of a model.

    Args:
        config: The lens's.
        name: The lens, for messages.
        model_name: The model, for messages.
        **sizes: What is known of the model: `width`, `n_layers`.

    Raises:
        UserError: It has another; says what it has and what the model has.
    """
    for size, models in sizes.items():
        if (its := getattr(config, size)) != models:
            raise UserError(
                f"lens={name} does not fit {model_name}: its {_SIZES[size]} is {its}, the model's "
                f"is {models}. Give a lens that was fitted for this model, or its model "
                f"({config.base_model})."
            )


def check(
    lens: LinearLens | LensConfig, model: PreTrainedModel, name: str, force: bool = False
) -> None:
    """Make sure that a lens belongs to a model.

    Args:
        lens: The lens, or its config.
        model: The model that will read what the lens gives.
        name: The lens, for messages.
        force: Whether a lens of another norm, head or adapter is a warning instead of an error.

    Raises:
        UserError: The lens is of another model; says what it has and what the model has.
    """
    config = lens.config if isinstance(lens, LinearLens) else lens
    model_name = model.config.name_or_path or type(unwrap_peft(model)).__name__
    n_layers = len(find_layers(model, model_name).layers)
    width = cast("int", model.config.get_text_config().hidden_size)
    require_size(config, name, model_name, width=width, n_layers=n_layers)
    if config.decoder == "identity":
        return
    differs = []
    if not config.fingerprint:
        log.warning(
            "lens=%s names its model, %s, but carries no fingerprint of its norm and head: whether "
            "it fits %s cannot be checked.", name, config.base_model, model_name,
        )  # fmt: skip
        if _last(config.base_model) != _last(model_name):
            differs.append(f"it names {config.base_model} as its model, this is {model_name}")
    elif not same(config.fingerprint, found := fingerprint(model)):
        differs.append(
            f"its fingerprint of norm and head is {config.fingerprint} ({config.base_model}), the "
            f"model's is {found}"
        )
    adapter = adapter_fingerprint(model)
    if config.adapter is None or adapter is None:
        fits = config.adapter is adapter
    else:
        fits = same(config.adapter, adapter)
    if not fits:
        differs.append(
            f"its adapter is {config.adapter or 'none'}, the model's is {adapter or 'none'}"
        )
    if not differs:
        return
    message = f"lens={name} was not fitted for {model_name}: {'; '.join(differs)}."
    if not force:
        raise UserError(
            f"{message} Give the model and adapter that it was fitted for, or fit a lens for this "
            "one; force_lens=True overrides this check."
        )
    log.warning("%s Used all the same (force_lens=True).", message)


def _last(name: str) -> str:
    """A model's own name, without whose it is or where it lies."""
    return Path(name).name.casefold()
