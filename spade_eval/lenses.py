"""The `lens=` argument: find, load and check the linear maps of a model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spade_eval.errors import UserError
from spade_eval.fingerprint import (
    adapter_fingerprint,
    adapter_scaling,
    config_digest,
    digest,
    weights_digest,
)
from spade_eval.lens import LinearLens
from spade_eval.lens_match import check, require_size
from spade_eval.tally import Prices

if TYPE_CHECKING:
    from spade_eval.backbone import Backbone
    from spade_eval.exits import ExitRule

DEFAULT_LENS = Path(__file__).resolve().parent / "default_lens"  # L-SPADE, default model


def load(
    lens: str | Path | LinearLens | None, default_model: bool, model: str
) -> LinearLens | None:
    """Load a lens before the model, so that a wrong name costs no time.

    Args:
        lens: Folder, hub id, "identity", or a lens; None takes the default model's own.
        default_model: Whether the default model will be used.
        model: Name of the lm-eval model, for messages.

    Returns:
        The lens; None for the identity, which is made when the model's size is known.

    Raises:
        UserError: No lens was given and there is no default, or it cannot be loaded.
    """
    if lens == "identity":
        return None
    if lens == "":
        raise UserError("lens= is empty. Give the folder or hub id of a lens, or 'identity'.")
    if lens is None:
        if not default_model or model == "tuned_lens":
            raise UserError(
                f"{model} needs lens=FOLDER or a hub id: the maps that ship with the package are "
                "L-SPADE's for the default model. Fit some with `spade-eval fit --decoder "
                f"{'tuned_lens' if model == 'tuned_lens' else 'l_spade'} --tasks ... --model_args "
                "pretrained=... --output FOLDER`."
            )
        lens = DEFAULT_LENS
    return own(lens)


def own(lens: str | Path | LinearLens) -> LinearLens:
    """Load a lens; a copy, if it is the caller's own, for other models too."""
    if isinstance(lens, LinearLens):
        return copy.deepcopy(lens)
    return LinearLens.from_pretrained(lens)


def called(lens: object) -> str:
    """How messages and results call what was given as `lens=`."""
    if lens is None:
        return "default"
    return str(lens) if isinstance(lens, (str, Path)) else "given in Python"


def require_depth(lens: LinearLens | None, n_layers: int, name: str, model_name: str) -> None:
    """Make sure that a lens has as many layers as a model, before that is loaded.

    Raises:
        UserError: Names both numbers.
    """
    if lens is not None:
        require_size(lens.config, name, model_name, n_layers=n_layers)


def require_layer(lens: LinearLens | None, layer: int, name: str) -> None:
    """Make sure that a lens has a map for a layer.

    Raises:
        UserError: Lists the layers it has.
    """
    if lens is not None and layer not in lens.available:
        raise UserError(
            f"lens={name} has no map for layer {layer}; it has "
            f"{', '.join(map(str, lens.available))} (the last is the model itself)."
        )


def fit_to(lens: LinearLens | None, backbone: Backbone, name: str, force: bool) -> LinearLens:
    """Check a lens against the loaded model, and bring it to its device and dtype, in place.

    Raises:
        UserError: It belongs to another model.
    """
    if lens is None:
        lens = LinearLens.identity(backbone.n_layers, backbone.width)
    check(lens, backbone.model, name, force=force)
    return lens.to(device=backbone.device, dtype=backbone.state_dtype).requires_grad_(False)


def prices(backbone: Backbone, head: float, lens: LinearLens | None, rule: ExitRule) -> Prices:
    """What heads and checks cost in token-layers.

    Args:
        backbone: The model.
        head: Price of a head.
        lens: Whose map a check applies; None for the identity.
        rule: What a check measures, and what answers after an exit.
    """
    map_ = 0.0
    if lens is not None:  # d^2 multiply-adds, or 2 r d
        config = lens.config
        weights = config.width * (2 * config.rank if config.rank else config.width)
        map_ = 2 * weights / backbone.operations
    by_choice = rule.confidence == "choice_entropy"
    # The head at a handful of choices costs nothing beside the map.
    asked = 0.0 if by_choice and backbone.narrows else head
    check_answers = rule.readout == "lens" and not by_choice
    return Prices(backbone.n_layers, head, map_ + asked, check_answers)


def describe(lens: LinearLens, name: str) -> dict[str, object]:
    """What the results and a response cache's fingerprint say about a lens."""
    config = lens.config
    if config.decoder == "identity":
        return {"lens": "identity"}
    return {
        "lens": name,
        "lens_decoder": config.decoder,
        "lens_tasks": list(config.tasks),
        "lens_positions": config.positions,
        "lens_weights": digest(lens.state_dict().items()),
    }


def recognise(model: Any, lens: LinearLens) -> dict[str, Any]:
    """What a model with its adapters and its lens is recognised by."""
    identity = lens.config.decoder == "identity"
    adapter = adapter_fingerprint(model)
    return {
        "model": f"{config_digest(model.config)}-{weights_digest(model)}",
        "adapter": adapter and f"{adapter}-{adapter_scaling(model)}",
        "lens": "identity" if identity else digest(lens.state_dict().items()),
    }
