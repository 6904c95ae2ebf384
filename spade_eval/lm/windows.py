"""What a model's attention windows and kernels mean for packed rows.

A packed row brings its own 4D mask, which replaces the model's. transformers builds two kinds of
windows into masks: they vanish, so no path in a packed row may be longer. Any other window is
applied inside attention, to the distance between columns of the row, and forbids packing; what
scales by the column alone bounds the row.
"""

from __future__ import annotations

import sys
from typing import Any

IN_MASKS = ("sliding_window", "attention_chunk_size")
NO_WINDOWS = ("use_sliding_window", "max_window_layers")  # switches beside a window, not windows


def window(config: Any) -> int | None:
    """The shortest window that transformers builds into masks, in tokens; None if there is none."""
    return min((w for name in IN_MASKS if (w := getattr(config, name, None))), default=None)


def widest(config: Any) -> int:
    """The most columns that a packed row may have.

    Some models scale queries by the column that they stand in, from `floor_scale` on.
    """
    scale = getattr(config, "floor_scale", None)
    if scale and getattr(config, "attn_temperature_tuning", False):
        return int(scale) - 1
    return sys.maxsize


def may_pack(config: Any) -> bool:
    """Whether the config leaves room for packed rows; flash attention takes no 4D mask."""
    other = any(
        # A pattern tells which layers have the window that is named elsewhere.
        value and "window" in name and "pattern" not in name and name not in IN_MASKS + NO_WINDOWS
        for name, value in config.to_dict().items()
    )
    return not other and "flash" not in str(getattr(config, "_attn_implementation", ""))
