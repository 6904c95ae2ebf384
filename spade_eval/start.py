"""States of start tokens, computed once per token and reused.

The start token attends to nothing but itself, so its states h^0..h^L and its keys and values at
every layer depend on its id alone. `StartStore` keeps them in a bounded LRU; `StartStates.cache`
offers the keys and values to the model as a cache of length one that stores nothing, so a tail
costs one token per answer. Of models that keep more than these only the states are stored.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

if TYPE_CHECKING:
    from collections.abc import Callable

CAPACITY = 512  # start tokens kept; one takes 0.1 MB for 135M in fp32, 0.8 MB for 7B in bf16


class _StartLayer(CacheLayerMixin):
    """One layer's keys and values of the start token, put in front of whatever comes."""

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor):
        super().__init__()
        self.keys, self.values, self.rows = keys, values, rows  # (U, heads, 1, width) twice, (P,)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values of [start, new tokens]: (P, heads, 1 + new, width)."""
        rows = self.rows.to(self.keys.device)
        return (
            torch.cat([self.keys.index_select(0, rows), key_states], dim=-2),
            torch.cat([self.values.index_select(0, rows), value_states], dim=-2),
        )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the keys are there."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that `query_length` new tokens see."""
        return 1 + query_length, 0

    def get_seq_length(self) -> int:
        """One token is in the cache."""
        return 1

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


@dataclass(frozen=True)
class StartStates:
    """The start tokens of P pairs.

    Attributes:
        states: h^0..h^L of the distinct start tokens, (U, L + 1, d).
        keys: Per layer (U, heads, 1, width); empty if the model keeps none.
        values: As the keys.
        rows: Which of the U each pair has, (P,).
    """

    states: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    rows: Tensor

    def hidden(self, layer: int | Tensor) -> Tensor:
        """The start token's own state after `layer`, one for all or one for each, (P, d)."""
        if isinstance(layer, Tensor):
            layer = layer.to(self.states.device)
        return self.states[self.rows, layer]

    def cache(self) -> Cache:
        """A cache of length one for the P pairs."""
        layers = [_StartLayer(k, v, self.rows) for k, v in zip(self.keys, self.values, strict=True)]
        return Cache(layers=layers)


class StartStore:
    """A bounded LRU of start-token states.

    Args:
        compute: Maps distinct ids (U,) to states (U, L + 1, d) and a cache filled by them, if any.
        capacity: Start tokens kept between calls.
    """

    def __init__(
        self, compute: Callable[[Tensor], tuple[Tensor, Cache | None]], capacity: int = CAPACITY
    ):
        self.computed = 0  # start tokens run through the model so far
        self._compute, self._capacity = compute, capacity
        self._entries: OrderedDict[int, tuple[Tensor, list[tuple[Tensor, Tensor]]]] = OrderedDict()
        self._last: tuple[list[int], StartStates] | None = None  # most tasks have one start token
        self._autocast: tuple[bool, torch.dtype] | None = None  # under which they were computed

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget all states: the model has changed."""
        self._entries.clear()
        self._last = None

    def get(self, ids: Tensor) -> StartStates:
        """The states of the start tokens `ids`, (P,); those not yet known are computed at once."""
        kind = ids.device.type
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        if autocast != self._autocast:  # keys and values would be of another dtype
            self.clear()
            self._autocast = autocast
        unique, rows = ids.unique(return_inverse=True)
        wanted = unique.tolist()
        if self._last is not None and self._last[0] == wanted:
            known = self._last[1]
            return StartStates(known.states, known.keys, known.values, rows)
        new = [i for i in wanted if i not in self._entries]
        if new:
            self._add(new, ids.device)
        entries = [self._entries[i] for i in wanted]
        for i in wanted:
            self._entries.move_to_end(i)
        n_layers = len(entries[0][1])
        found = StartStates(
            torch.stack([states for states, _ in entries]),
            [torch.stack([kv[layer][0] for _, kv in entries]) for layer in range(n_layers)],
            [torch.stack([kv[layer][1] for _, kv in entries]) for layer in range(n_layers)],
            rows,
        )
        if len(wanted) == 1:
            self._last = (wanted, found)
        while len(self._entries) > self._capacity:
            self._entries.popitem(last=False)
        return found

    def _add(self, new: list[int], device: torch.device) -> None:
        states, cache = self._compute(torch.tensor(new, device=device))
        self.computed += len(new)
        for row, i in enumerate(new):
            # Clones, so that an evicted token's memory is freed with its entry.
            layers = [] if cache is None else cache.layers
            pairs = [(kv.keys[row].clone(), kv.values[row].clone()) for kv in layers]
            self._entries[i] = (states[row].clone(), pairs)
