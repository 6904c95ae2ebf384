"""In which precision matrix products are fast here: a fact of the hardware, not a timing.

A timing could come out otherwise when a run resumes.
"""

from __future__ import annotations

import torch


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32.

    On a CPU that takes AMX. Without it oneDNN computes them too, at a quarter of float32's speed.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # older versions of torch lack it
    return (
        device.type == "cpu" and capabilities is not None and bool(capabilities().get("amx_bf16"))
    )
