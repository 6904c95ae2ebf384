"""One batch on its way up the layers: its lane, and what is known about its decisions.

advance: lane at layer l -> to_check: positions -> their confidence -> confident: decisions
-> leave: their states go, and the tokens that nobody needs any more
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from spade_eval.decisions import decide
from spade_eval.departures import Departures
from spade_eval.exits import request_mean
from spade_eval.transfer import put

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from spade_eval.backbone import Backbone
    from spade_eval.batching import Batch, Ints
    from spade_eval.compaction import Rows
    from spade_eval.exits import ExitRule, Scope
    from spade_eval.hollow import Lane


def enter(backbone: Backbone, rows: Rows) -> Lane:
    """Embed rows: the main lane at depth 0, with every layer's arguments."""
    positions = mask = None
    if rows.positions is not None and rows.ends is not None:
        positions = put(rows.positions, backbone.device)
        mask = backbone.additive_mask(put(rows.ends, backbone.device))
    return backbone.embed(put(rows.ids, backbone.device), positions, mask)


@dataclass(frozen=True)
class Check:
    """What a batch asks at a candidate layer.

    Attributes:
        at: Scored positions, each once, ascending, (U,).
        requests: A request that each one concerns, (U,).
        value_at: For each value that a decision looks at, which of the U positions it is of, (K,),
        value_of: and the decision, (K,).
        reads: Those of the batch's reads that these positions may answer, ascending, (R,),
        read_at: and which of the U positions each one reads, (R,).
    """

    at: Ints
    requests: Ints
    value_at: Ints
    value_of: Ints
    reads: Ints
    read_at: Ints


class Climb:
    """One batch on its way up, and what is known about its decisions."""

    def __init__(self, backbone: Backbone, batch: Batch, scope: Scope):
        self.backbone, self.batch = backbone, batch
        self.who = who = decide(batch, scope)
        self.departures = Departures(batch, who, backbone.n_layers)
        self.confidence = np.full(who.count, np.nan, dtype=np.float32)
        self.checked = np.zeros(who.count, dtype=np.int64)
        self.h = torch.empty(
            len(who.member_at), backbone.width, dtype=backbone.state_dtype, device=backbone.device
        )
        # What the checks have answered, by read, (N,).
        self.logprobs = np.full(len(batch.targets), np.nan)
        self.greedy = np.zeros(len(batch.targets), dtype=bool)
        self.lane = enter(backbone, self.departures.rows)

    @property
    def undecided(self) -> NDArray[np.bool_]:
        """Which decisions are open, (D,)."""
        return self.departures.undecided

    def advance(self, layer: int) -> None:
        """Run what is left of the main lane up to `layer`."""
        self.backbone.advance(self.lane, layer)
        self.departures.advance(layer)

    def to_check(self, answers: bool) -> Check:
        """What the open decisions ask for; with `answers` their reads too."""
        who, open_ = self.who, self.undecided[self.who.check_of]
        of = who.check_of[open_]
        at, one, value_at = np.unique(who.check_at[open_], return_index=True, return_inverse=True)
        reads = np.zeros(0, dtype=np.int64)
        if answers:
            wanted = self.undecided[who.member_of[who.read_from]]
            reads = np.flatnonzero(wanted & np.isin(self.batch.read_at, at))
        read_at = np.searchsorted(at, self.batch.read_at[reads])
        return Check(at, who.requests[of[one]], value_at, of, reads, read_at)

    def states(self, at: Ints) -> Tensor:
        """States of scored positions where the lane now is, (K, d)."""
        flat = self.departures.rows.where(self.batch.scored[at])
        return gather(self.lane, flat).to(self.backbone.device)

    def confident(self, values: Tensor, check: Check, rule: ExitRule) -> NDArray[np.bool_]:
        """Keep what was measured at a check's positions, (U,); which decisions may exit, (D,)."""
        of, values = check.value_of, values.cpu()
        each = values[torch.from_numpy(check.value_at)]  # (K,)
        means = request_mean(each, torch.from_numpy(of), self.who.count)
        np.add.at(self.checked, of, 1)
        self.confidence[of] = means.numpy()[of]
        return self.undecided & rule.confident(means).numpy()

    def leave(self, layer: int, leaving: NDArray[np.bool_]) -> None:
        """Take the states of decisions (D,) that exit; drop from the lane what nobody needs."""
        if not leaving.any():
            return
        members = self.departures.leave(layer, leaving)
        h = self.states(self.who.member_at[members])
        self.h[put(members, h.device)] = h.to(self.h.dtype)
        if (source := self.departures.compact()) is not None:
            before, self.lane = self.lane, enter(self.backbone, self.departures.rows)
            self.lane.h = gather(before, source.reshape(-1)).view(*source.shape, -1)
            self.lane.depth = layer


def gather(lane: Lane, flat: Ints) -> Tensor:
    """States of tokens, given by their flat index, (K, d), on the lane's device."""
    return lane.h.flatten(0, 1)[put(flat, lane.h.device)]
