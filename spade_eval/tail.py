"""The two-token tail (eq. 6): pairs [start, token] through the layers that are left.

The start token sees nothing but itself, so what it leaves to the answer token can be stored:

    keys and values stored      state of the token (P, 1, d) -> layers l+1..L -> (P, d)
    where layers are recurrent  [start's state, token's state] (P, 2, d) -> layers l+1..L -> (P, d)

Pairs of different layers join on the way up, and each layer runs once for all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spade_eval.errors import UserError

if TYPE_CHECKING:
    from spade_eval.backbone import Backbone

ROWS = 4096  # pairs sent at once: bounds keys and activations


def send(
    backbone: Backbone,
    h: Tensor,
    layer: int | Tensor,
    token_ids: Tensor,
    positions: Tensor,
    start_ids: Tensor | None,
) -> Tensor:
    """Send pairs through their remaining layers; see `Backbone.tail`."""
    layers = torch.as_tensor(layer).expand(len(h))
    n_layers = backbone.n_layers
    if len(h) and not 0 <= int(layers.min()) <= int(layers.max()) <= n_layers:
        raise UserError(f"layer={layer} is out of range: {backbone.name} has 0..{n_layers}.")
    out = h.clone()
    lower = torch.nonzero(layers < n_layers)[:, 0]  # the others are there already
    if not len(lower):
        return out
    for rows in lower[layers[lower].argsort(stable=True)].split(ROWS):
        at = rows.to(h.device)
        starts = None if start_ids is None else start_ids[at]
        out[at] = _ascending(backbone, h[at], layers[rows], token_ids[at], positions[at], starts)
    return out


def _ascending(
    backbone: Backbone,
    h: Tensor,
    layers: Tensor,
    token_ids: Tensor,
    positions: Tensor,
    start_ids: Tensor | None,
) -> Tensor:
    """`send` for pairs in ascending order of their layers, none of them the last."""
    depths, counts = layers.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0).tolist()
    above = [*depths.tolist()[1:], backbone.n_layers]
    stored = start_ids if backbone.keeps_keys else None
    ids, at, states = token_ids[:, None], positions[:, None], h[:, None]  # (P, 1) and (P, 1, d)
    if start_ids is not None and stored is None:
        own = backbone.start_states(start_ids).hidden(layers).to(h.device, h.dtype)
        ids = torch.stack([start_ids, token_ids], 1)  # (P, 2)
        at = torch.stack([torch.zeros_like(positions), positions], 1)  # (P, 2)
        states = torch.stack([own, h], 1)  # (P, 2, d)
    seen = 1 if start_ids is None else 2
    running = states[:0]
    for depth, end, to in zip(depths.tolist(), ends, above, strict=True):
        # The mask must be explicit: position ids [0, n] without one mean two packed sequences to
        # transformers, and the token would not see its start.
        lane = backbone.embed(
            ids[:end],
            position_ids=at[:end],
            attention_mask=torch.ones(end, seen, dtype=torch.long, device=ids.device),
            cache=None if stored is None else backbone.start_states(stored[:end]).cache(),
        )
        joining = states[len(running) : end]
        lane.h = torch.cat([running, joining.to(running.device)]).to(lane.h.device)
        lane.depth = depth
        running = backbone.advance(lane, to).h
    return running[:, -1].to(h.device)  # (P, d)
