"""Arrays of the bookkeeping go to the device on which tensors are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


def put(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array as a tensor on a device.

    CUDA has its own copy of the array before the call returns, so nothing need wait until the
    device has done what was asked of it before, and the next work queues up behind.
    """
    return torch.from_numpy(array).to(device, non_blocking=device.type == "cuda")
