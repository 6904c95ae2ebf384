"""A guard for lm-eval's `--use_cache`, whose keys hold the request alone.

Without it, a run at another layer, threshold or model would be answered from the file of the first.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from spade_eval.errors import UserError

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from torch import nn

KEY = "spade_eval:fingerprint"


def guard(responses: MutableMapping[str, Any], fingerprint: dict[str, object]) -> None:
    """Claim an empty response cache, or make sure that it is ours.

    Raises:
        UserError: The cache belongs to another configuration; names what differs.
    """
    seen = responses.get(KEY)
    if seen is None and len(responses):
        raise UserError(
            "This --use_cache file holds answers of an unknown model: spade_eval did not begin it. "
            "Give another --use_cache path."
        )
    if seen is not None and seen != fingerprint:
        names = sorted(k for k in {*seen, *fingerprint} if seen.get(k) != fingerprint.get(k))
        differs = "; ".join(f"{k} was {seen.get(k)!r}, is {fingerprint.get(k)!r}" for k in names)
        raise UserError(
            f"This --use_cache file holds answers of another configuration ({differs}). "
            "Give another --use_cache path, one per configuration."
        )
    responses[KEY] = fingerprint


def weights_digest(model: nn.Module) -> str:
    """A hash of the first 64 numbers of every parameter, which no fine-tuning leaves alone."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.device.type != "meta":  # offloaded to disk
            digest.update(name.encode())
            digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
