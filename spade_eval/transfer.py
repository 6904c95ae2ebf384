"""Arrays of the bookkeeping go to the device on which tensors are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


def put(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array as a tensor on a device.

    On CUDA the call does not wait for the work that was queued before: memory that is not pinned is
    copied aside before it returns, so the array may change or go at once.
    """
    return torch.from_numpy(array).to(device, non_blocking=device.type == "cuda")
