"""Let the C library keep freed memory, so that large tensors on a CPU need no new pages each time.

glibc maps blocks above 32 MB afresh at every request, and touching new pages takes as long as the
arithmetic: an epoch of descent takes 7.5 s with its own rule and 4.0 s without, and scoring 150
items of BoolQ with Qwen2.5-Coder-0.5B, whose feed-forward layers are wide, 66 s and 32 s.
"""

from __future__ import annotations

import ctypes
import sys

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)
_KEPT = 2**30


def keep_freed_blocks() -> None:
    """Set it for this process; elsewhere than under glibc it does nothing."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _KEPT)
        mallopt(_TRIM_THRESHOLD, _KEPT)


def peak_memory() -> dict[str, int]:
    """`peak_memory_mb` of this process and, if it used any, `peak_gpu_memory_mb` of one GPU."""
    if sys.platform == "win32":
        import psutil  # accelerate brings it

        peak = psutil.Process().memory_info().peak_wset
    else:
        import resource  # which Windows does not have

        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    found = {"peak_memory_mb": peak // 2**20}
    if torch.cuda.is_initialized():
        gpus = range(torch.cuda.device_count())
        found["peak_gpu_memory_mb"] = max(map(torch.cuda.max_memory_allocated, gpus)) // 2**20
    return found
