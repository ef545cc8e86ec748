"""Dense layers of a model whose experts all run on the CPU: a few rows at a time go through our own kernel.

What stays of a token once its experts are read at the speed of memory is mostly attention's projections and the head.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional

from moebius.cpu_experts import linear


class HostLinear(nn.Linear):
    """A dense layer, also in class: only its products of a few rows outside training are computed otherwise."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # torch's name
        out = None
        weight, bias = self.weight, self.bias
        if _is_plain(input, weight) and linear.is_faster(input.numel() // weight.shape[1], weight):
            out = linear.multiply(input, weight, bias)
        return functional.linear(input, weight, bias) if out is None else out


def _is_plain(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether both lie in host memory as they are, and nobody records, traces or casts what is done with them."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(x) is torch.Tensor
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and weight.is_contiguous()
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
    )


def install(module: nn.Module) -> None:
    """Make a large dense layer in host memory a `HostLinear`; any other module stays as it is."""
    if type(module) is nn.Linear and module.weight.device.type == "cpu" and linear.worthwhile(module.weight):
        module.__class__ = HostLinear


def remove(module: nn.Module) -> None:
    """Make a `HostLinear` a dense layer of torch's again."""
    if type(module) is HostLinear:
        cast("nn.Module", module).__class__ = nn.Linear
