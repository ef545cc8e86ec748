"""Which code computes a layer's experts on the device."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch

from moebius.kernels.experts import ExpertSpec, RecordLayout
from moebius.kernels.packing import unpack
from moebius.kernels.reference import moe_forward
from moebius.kernels.routes import Routes, select

HOW_TO_INSTALL = "pip install triton-windows" if sys.platform == "win32" else "pip install triton"

# (pool uint8 [S, nbytes], x [T, H], routes, slots int32 [A]) -> fp32 [T, H]; slots[i] has routes.experts[i],
# or is -1 where that is left out
Executor = Callable[[torch.Tensor, torch.Tensor, Routes, np.ndarray], torch.Tensor]
# a launch's index table, int32 [n] -> the same on the device, for work on the current stream
Send = Callable[[np.ndarray], torch.Tensor]


def make_executor(spec: ExpertSpec, layout: RecordLayout, device: torch.device, send: Send | None = None) -> Executor:
    """Triton on an accelerator, torch on the emulated device (Triton there too under TRITON_INTERPRET=1).

    Experts with torch code of their own (`Act.CUSTOM`, `post_norm`) run through torch everywhere.

    Args:
        send: brings index tables to the device; without it they are copied there one by one, while the host waits.

    Raises:
        RuntimeError: Triton is needed and not installed.
    """
    if spec.torch_code or (device.type == "cpu" and not interpreted()):
        return partial(run_reference, spec, layout)
    if find_spec("triton") is None:
        raise RuntimeError(
            f"experts on {device} run through Triton, which is not installed: {HOW_TO_INSTALL}, or use device='cpu'"
        )
    from moebius.kernels.triton import experts  # here, because an emulated run does not need triton

    return partial(experts.moe_forward, spec, layout, send=send)


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def run_reference(
    spec: ExpertSpec, layout: RecordLayout, pool: torch.Tensor, x: torch.Tensor, routes: Routes, slots: np.ndarray
) -> torch.Tensor:
    """The experts in plain torch on the device of x, fp32 throughout."""
    out, there = torch.zeros(x.shape, dtype=torch.float32, device=x.device), slots >= 0
    weights = [unpack(layout, layout.stored(pool[int(slot)])) for slot in slots[there]]
    moe_forward(spec, weights, x, select(routes, there), out)
    return out
