"""The checks that decide, at load, whether a model can be decoded from its middle.

Nothing here knows a model's name. Each check compares what `Backbone` computes with what the model
itself computes, on three tokens:

1. layers: running layer by layer gives `model(...)`;
2. tail: from every layer l, one token with the stored start goes on to `model([start, token])`;
3. start: the start token's states are the same alone and followed by others;
4. pack: one row with two branches behind a shared context gives what two rows give.

A model that fails 1 to 3 is refused (recurrent and hybrid models are); failing 4 only rules out
packed rows.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spade_eval.errors import UnsupportedModelError

if TYPE_CHECKING:
    from spade_eval.backbone import Backbone

log = logging.getLogger(__name__)


def probe_ids(backbone: Backbone) -> Tensor:
    """Three distinct token ids, (1, 3)."""
    n = backbone.model.get_input_embeddings().num_embeddings
    return torch.tensor([[n // 2, n // 3, n // 5]], device=backbone.device)


@torch.no_grad()
def measure(backbone: Backbone) -> tuple[int, int, int]:
    """Run the model once as it is.

    Returns:
        Width d, vocabulary size V of the logits, and how many values a layer returns (0: a bare
        tensor).
    """
    seen: dict[str, int] = {}

    def look(_module: object, _args: object, out: Any) -> None:
        seen["size"] = len(out) if isinstance(out, tuple) else 0
        seen["width"] = (out[0] if isinstance(out, tuple) else out).shape[-1]

    handle = backbone._layers[0].register_forward_hook(look)
    try:
        logits = backbone.model(input_ids=probe_ids(backbone), use_cache=False).logits
    finally:
        handle.remove()
    return seen["width"], logits.shape[-1], seen["size"]


@torch.no_grad()
def run(backbone: Backbone) -> tuple[bool, bool]:
    """Run the four checks.

    Returns:
        Whether positions are inert in a tail, and whether rows may be packed.

    Raises:
        UnsupportedModelError: Check 1, 2 or 3 failed; names the model's class and the check.
    """
    for number, (check, meaning) in enumerate(
        [
            (_layers, "layers: layer by layer must equal the model's own forward"),
            (
                _tail,
                "tail: a token continued from the middle must equal the model on [start, token]",
            ),
            (_start, "start: the first token's states must not depend on what follows"),
        ],
        start=1,
    ):
        try:
            ours, theirs = check(backbone)
            error, bound = distance(ours, theirs), tolerance(theirs)
            found = f"relative difference {error:.2g}, allowed {bound:.2g}"
            cause = None
        except Exception as err:
            error, bound, found, cause = float("inf"), 0.0, f"{type(err).__name__}: {err}", err
        if not error <= bound:
            raise UnsupportedModelError(
                f"{backbone.name} fails check {number} ({meaning}): {found}. Supported are "
                "decoder-only models whose layers attend causally and keep keys and values; "
                "recurrent and hybrid models are not."
            ) from cause
    return _positions_inert(backbone), _packs(backbone)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Largest ||ours - theirs|| / ||theirs|| over the rows of two (N, width) tensors."""
    ours, theirs = ours.float(), theirs.float()
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp_min(1e-12)).max())


def tolerance(x: Tensor) -> float:
    """Half of the digits that the dtype has: 3e-4 in fp32, 0.09 in bf16."""
    return float(torch.finfo(x.dtype).eps ** 0.5)


def _layers(backbone: Backbone) -> tuple[Tensor, Tensor]:
    ids = probe_ids(backbone)
    lane = backbone.advance(backbone.embed(ids), backbone.n_layers)
    return backbone.logits(lane.h[0]), backbone.model(input_ids=ids, use_cache=False).logits[0]


def _tail(backbone: Backbone) -> tuple[Tensor, Tensor]:
    ids = probe_ids(backbone)[:, :2]
    states = backbone.hidden_states(ids)
    one = torch.ones(1, dtype=torch.long, device=ids.device)
    tails = [
        backbone.tail(h[0, 1:].to(ids.device), layer, ids[:, 1], one, ids[:, 0])
        for layer, h in enumerate(states)
    ]
    theirs = backbone.model(input_ids=ids, use_cache=False).logits[0, 1]
    return backbone.logits(torch.cat(tails)), theirs.expand(len(tails), -1)


def _start(backbone: Backbone) -> tuple[Tensor, Tensor]:
    ids = probe_ids(backbone)
    alone = backbone.start_states(ids[:, 0]).states[0]  # (L + 1, d)
    followed = [h[0, 0].to(alone.device) for h in backbone.hidden_states(ids)]
    return alone, torch.stack(followed)


def _positions_inert(backbone: Backbone) -> bool:
    """Whether a tail gives the same states wherever the answer token is said to stand."""
    ids = probe_ids(backbone)
    layer = backbone.n_layers // 2
    h = backbone.hidden_states(ids)[layer][0, 2:].to(ids.device)
    one = torch.ones(1, dtype=torch.long, device=ids.device)
    near = backbone.tail(h, layer, ids[:, 2], one, ids[:, 0])
    far = backbone.tail(h, layer, ids[:, 2], one + 1, ids[:, 0])
    return torch.equal(near, far)


def _packs(backbone: Backbone) -> bool:
    """Whether [a, b | b, c | c, b], two branches on one context, gives what two rows give."""
    a, b, c = probe_ids(backbone)[0].tolist()
    rows = torch.tensor([[a, b, b, c], [a, b, c, b]], device=backbone.device)
    packed = torch.tensor([[a, b, b, c, c, b]], device=backbone.device)
    positions = torch.tensor([[0, 1, 2, 3, 2, 3]], device=backbone.device)
    sees = torch.ones(6, 6, dtype=torch.bool).tril()
    sees[4:, 2:4] = False  # the second branch does not see the first
    try:
        theirs = backbone.hidden_states(rows)[-1][:, 2:].flatten(0, 1)  # (4, d)
        lane = backbone.embed(packed, positions, additive_mask(sees[None], backbone))
        ours = backbone.advance(lane, backbone.n_layers).h[0, 2:]
        return distance(ours, theirs) <= tolerance(theirs)
    except Exception as err:  # a model may refuse a 4D mask in any way it likes
        log.info("%s: rows cannot be packed (%s: %s)", backbone.name, type(err).__name__, err)
        return False


def additive_mask(sees: Tensor, backbone: Backbone) -> Tensor:
    """Turn (B, T, T), true where token t sees token s, into an additive (B, 1, T, T) mask."""
    dtype = backbone.model.dtype
    mask = torch.zeros(sees.shape, dtype=dtype, device=backbone.device)
    return mask.masked_fill_(~sees.to(backbone.device), torch.finfo(dtype).min)[:, None]
