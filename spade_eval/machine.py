"""The processor and the GPU: arithmetic in half precision depends on them."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path

import torch


def machine() -> dict[str, str]:
    """The `cpu` and, if this process used one, the `gpu`, by their makers' names."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):  # only Linux has the file
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    found = {"cpu": f"{cpu}, {os.cpu_count()} cores"}
    if torch.cuda.is_initialized():
        found["gpu"] = torch.cuda.get_device_name()
    return found
