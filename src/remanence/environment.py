"""What a reader of the figures must know about the machine, the versions and the process."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

_PACKAGES = ("remanence", "torch", "transformers", "peft", "accelerate", "numpy", "scikit-learn", "safetensors")


def environment() -> dict[str, Any]:
    """What a reader of the figures must know about the machine and the versions."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False).stdout.strip()
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor())
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "commit": commit or "unknown",
        **{name: version(name) for name in _PACKAGES},
    }


def resident_bytes() -> int | None:
    """Physical memory that this process has now; None where the system does not tell (it does on Linux)."""
    path = Path("/proc/self/statm")
    return int(path.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else None


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
