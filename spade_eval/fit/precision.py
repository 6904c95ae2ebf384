"""In which precision matrix products are fast here: a fact of the hardware, not a timing.

A timing could come out otherwise when a run resumes.
"""

from __future__ import annotations

import torch

UNITS = ("amx_bf16", "avx512_bf16")  # as torch.cpu.get_capabilities names them


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32.

    On a CPU that takes instructions for them. Without, oneDNN computes them too, at a quarter of
    float32's speed; with AVX-512's they are three to four times faster than float32.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # older versions of torch lack it
    if device.type != "cpu" or capabilities is None:
        return False
    return any(capabilities().get(unit) for unit in UNITS)
