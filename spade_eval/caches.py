"""Keys and values of a batch whose layers hold different numbers of tokens.

Rows are left-padded, so the newest token of every sequence stands in the same column. After exits a
layer holds of each row the columns before some end, and those that follow are pending. Rows climb
together from the same column on: what they hold before it and the tokens that climb are one block
of columns without a hole, as attention windows, which count columns, need it.

    columns    base .. begin .. end
    keys       [cached  | new      ]      a view where all rows climb, a copy where some do
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import Cache, CacheLayerMixin

if TYPE_CHECKING:
    from torch import Tensor

ROOM = 128  # columns that a buffer gains at once: growing copies it


@dataclass(frozen=True)
class Span:
    """What climbs: some rows, and of them the columns from `begin` to `end`.

    Attributes:
        rows: Indices of the rows, (G,); None for all.
        base: First column that any of them has a token in; the keys begin there.
        begin: First column that climbs.
        end: One past the last.
    """

    rows: Tensor | None
    base: int
    begin: int
    end: int


class Columns:
    """A buffer over rows and columns that grows as columns are written; zero where none was.

    Args:
        rows: B.
        dim: The dimension of the columns; the rows are the first.
    """

    def __init__(self, rows: int, dim: int):
        self._rows, self._dim = rows, dim
        self._data: Tensor | None = None

    def write(self, span: Span, values: Tensor) -> None:
        """Store values, (G, ..., end - begin, ...), at the span's rows and columns."""
        data = self._reserve(span.end, values).narrow(
            self._dim, span.begin, span.end - span.begin
        )  # (B, ..., end - begin, ...)
        if span.rows is None:
            data.copy_(values)
        else:
            data.index_copy_(0, span.rows.to(data.device), values)

    def read(self, span: Span, begin: int) -> Tensor:
        """The span's rows and their columns from `begin` to its end, (G, ..., end - begin, ...)."""
        assert self._data is not None  # a span is read where columns were written
        data = self._data.narrow(self._dim, begin, span.end - begin)
        return data if span.rows is None else data.index_select(0, span.rows.to(data.device))

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, (B',)."""
        self._rows = len(rows)
        if self._data is not None:
            self._data = self._data.index_select(0, rows.to(self._data.device))

    def _reserve(self, end: int, like: Tensor) -> Tensor:
        held = 0 if self._data is None else self._data.shape[self._dim]
        if self._data is None or held < end:
            shape = [self._rows, *like.shape[1:]]
            # The first columns are a prompt, which may be all there is.
            shape[self._dim] = end + (ROOM if held else 0)
            # Zeros: what is masked must still be a number.
            data = like.new_zeros(shape)
            if self._data is not None:
                data.narrow(self._dim, 0, held).copy_(self._data)
            self._data = data
        return self._data


class _Layer(CacheLayerMixin):
    """One layer's part, for the span that climbs at the moment."""

    def __init__(self, owner: KeyValues, rows: int):
        super().__init__()
        self._owner = owner
        self._columns = Columns(rows, 2), Columns(rows, 2)  # keys and values (B, heads, T, width)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store what is new; return all that the span sees: (G, heads, end - base, width) twice."""
        span = self._owner.span
        for columns, states in zip(self._columns, (key_states, value_states), strict=True):
            columns.write(span, states)
        keys, values = (columns.read(span, span.base) for columns in self._columns)
        return keys, values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: buffers grow as they are written."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that the span's tokens see."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens before those that climb, at whatever depth they are."""
        return self._owner.span.begin - self._owner.span.base

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        for columns in self._columns:
            columns.keep(rows)


class KeyValues:
    """The keys and values of all layers.

    Args:
        n_layers: L.
        rows: B.

    Attributes:
        cache: What the model is given as its cache.
        span: What climbs at the moment. To the model every layer has the span's length, so that
            one hollow pass serves whatever depth the span is at.
    """

    def __init__(self, n_layers: int, rows: int):
        self.span = Span(None, 0, 0, 0)
        self._layers = [_Layer(self, rows) for _ in range(n_layers)]
        self.cache = Cache(layers=list(self._layers))

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, (B',), from every layer."""
        for layer in self._layers:
            layer.keep(rows)
