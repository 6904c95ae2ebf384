"""The processor and the GPU: arithmetic in half precision depends on them."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path

import torch


def machine(device: torch.device | str = "cpu") -> dict[str, str]:
    """The `cpu` and, if that is the device, the `gpu`, by their makers' names."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):  # only Linux has the file
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    found = {"cpu": f"{cpu}, {os.cpu_count()} cores"}
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found
