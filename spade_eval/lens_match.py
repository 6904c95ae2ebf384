"""Whether a lens belongs to a model: width, layers, and the fingerprints of what they hold."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from spade_eval.errors import UserError
from spade_eval.fingerprint import (
    adapter_fingerprint,
    adapter_scaling,
    fingerprint,
    head_rows,
    layers_fingerprint,
    same,
)
from spade_eval.hollow import find_layers, unwrap_peft
from spade_eval.lens import LinearLens

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def owner(model: PreTrainedModel) -> dict[str, Any]:
    """What the config of a lens says of the model that it was fitted for, for `check`."""
    return {
        "fingerprint": fingerprint(model),
        "head_rows": head_rows(model),
        "layers_fingerprint": layers_fingerprint(model),
        "adapter": adapter_fingerprint(model),
        "adapter_scaling": adapter_scaling(model),
    }


def check(
    lens: LinearLens | LensConfig, model: PreTrainedModel, name: str, force: bool = False
) -> None:
    """Make sure that a lens belongs to a model.

    Args:
        lens: The lens, or its config.
        model: The model that will read what the lens gives.
        name: The lens, for messages.
        force: Whether a lens of another norm, head, adapter or of other layers is a warning
            instead of an error.

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
    differs = [
        *_head_differs(config, model, name, model_name),
        *_layers_differ(config, model),
        *_adapter_differs(config, model),
    ]
    if not differs:
        return
    message = f"lens={name} was not fitted for {model_name}: {'; '.join(differs)}."
    if not force:
        raise UserError(
            f"{message} Give the model and adapter that it was fitted for, or fit a lens for this "
            "one; force_lens=True overrides this check."
        )
    log.warning("%s Used all the same (force_lens=True).", message)


def _head_differs(
    config: LensConfig, model: PreTrainedModel, name: str, model_name: str
) -> Iterator[str]:
    """What differs in norm and head, by the model's name if the lens knows nothing of them."""
    if not config.fingerprint:
        log.warning(
            "lens=%s names its model, %s, but carries no fingerprint of its norm and head: whether "
            "it fits %s cannot be checked.", name, config.base_model, model_name,
        )  # fmt: skip
        if _last(config.base_model) != _last(model_name):
            yield f"it names {config.base_model} as its model, this is {model_name}"
        return
    # Checkpoints pad their vocabulary, and lm-eval cuts it to the tokenizer's for an adapter.
    if same(config.fingerprint, found := fingerprint(model, config.head_rows)):
        return
    yield (
        f"its fingerprint of norm and head is {config.fingerprint} ({config.base_model}), the "
        f"model's is {found}"
    )
    rows = head_rows(model)
    if config.head_rows is None and config.adapter is not None:
        yield (
            f"the model's head has {rows} rows, and with peft= lm-eval gives it as many as the "
            "tokenizer has tokens: if that is another number, "
            "model.resize_token_embeddings(len(tokenizer)) does the same"
        )
    elif config.head_rows is not None and rows is not None and config.head_rows > rows:
        yield (
            f"its model's head had {config.head_rows} rows, this has {rows}: lm-eval cuts a head "
            "to the tokenizer's size with peft=, model.resize_token_embeddings does in Python"
        )


def _layers_differ(config: LensConfig, model: PreTrainedModel) -> Iterator[str]:
    """What differs in the layers, where both are known."""
    if not config.layers_fingerprint:
        return
    found = layers_fingerprint(model)
    if found and not same(config.layers_fingerprint, found):
        yield (
            f"its fingerprint of the layers is {config.layers_fingerprint} ({config.base_model}), "
            f"the model's is {found}, as after fine-tuning or with an adapter merged into them"
        )


def _adapter_differs(config: LensConfig, model: PreTrainedModel) -> Iterator[str]:
    """What differs in the adapters: their weights, or else their scaling, where it is known."""
    adapter = adapter_fingerprint(model)
    if config.adapter is None or adapter is None:
        fits = config.adapter is adapter
    else:
        fits = same(config.adapter, adapter)
    if not fits:
        yield f"its adapter is {config.adapter or 'none'}, the model's is {adapter or 'none'}"
    elif config.adapter_scaling not in (None, found := adapter_scaling(model)):
        yield (
            f"its adapter's scaling (lora_alpha and the like) is {config.adapter_scaling}, the "
            f"model's is {found}"
        )


def _last(name: str) -> str:
    """A model's own name, without whose it is or where it lies."""
    return Path(name).name.casefold()
