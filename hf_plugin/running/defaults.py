"""What this machine gives where the user asks for nothing in particular."""

from __future__ import annotations

import os

import psutil

from moebius.gpu_cache.device import default_device


def default_threads() -> int:
    """Physical cores that this process may use."""
    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    return min(physical, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else physical


def resolve_device(name: str) -> str:
    """The device that "auto" means here; others are returned as they are."""
    return default_device() if name == "auto" else name
