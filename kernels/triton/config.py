"""How kernels are launched."""

from __future__ import annotations

import os
from typing import Any

INTERPRETED: bool = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton itself decides when it decorates a kernel

OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}  # fused multiply-add, said here because Triton's default changes
