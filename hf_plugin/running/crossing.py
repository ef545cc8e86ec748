"""What a layer step takes across between the model's device and the host: once to the host, once back.

The host waits for the first crossing, since it has to know the experts. The way back makes it wait for nothing: a copy
from memory that is not pinned would hold it up until the device has computed its share, and with it the next layer's
launches.
"""

from __future__ import annotations

import torch

# Rows of up to so many tokens go back from pinned memory, which torch's allocator keeps for the next layer: 64 tokens
# of 4096 values. A prompt's rows would stay pinned for ever, and its layers take milliseconds.
PINNED_BYTES = 1 << 20


def to_host(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The same tensors, contiguous in host memory; those on a device, which is one, come by one copy."""
    parts = [tensor.contiguous() for tensor in tensors]
    if parts[0].device.type == "cpu":
        return parts
    joined = torch.cat([part.view(torch.uint8).flatten() for part in parts]).cpu()
    pieces = joined.split([part.nbytes for part in parts])
    return [piece.clone().view(part.dtype).view(part.shape) for piece, part in zip(pieces, parts, strict=True)]


def zeros(rows: torch.Tensor, target: torch.device) -> torch.Tensor:
    """Host memory for a sum of the shape of `rows` [T, H] that is sent to `target`, fp32 zeros."""
    apart = target.type not in ("cpu", "mps")  # the memory of mps is the host's
    pinned = apart and rows.numel() * 4 <= PINNED_BYTES
    return torch.zeros(rows.shape, dtype=torch.float32, device="cpu", pin_memory=pinned)


def send(rows: torch.Tensor, target: torch.device) -> torch.Tensor:
    """`zeros` that were filled, on the device `target`; copied on its current stream."""
    return rows.to(target, non_blocking=rows.numel() * 4 <= PINNED_BYTES)
