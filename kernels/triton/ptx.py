"""What Triton has no words for, said in PTX; on other devices nothing, or the same in more instructions.

Integers become floats without the instruction for it, of which a multiprocessor starts 16 a cycle where it starts 128
products: int4 at the speed of an H200's memory would take 32. They are put in the middle of the bits of a float,
by one permutation of bytes each.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from moebius.kernels.triton.config import INTERPRETED

COMPILED: tl.constexpr = tl.constexpr(not INTERPRETED)


def _placing(prepare: str, byte: int, constant: int) -> Any:
    """Puts each of four bytes, prepared, in the place of a byte of the constant: one permutation for each."""
    chosen = ["".join(str(source if place == byte else 4 + place) for place in (3, 2, 1, 0)) for source in range(4)]
    moves = " ".join(f"prmt.b32 ${number}, t, {constant:#x}, 0x{digits};" for number, digits in enumerate(chosen))
    return tl.constexpr(f"{{ .reg .b32 t; {prepare} {moves} }}")


def _halving(moves: str, mask: int, sign: str = "") -> Any:
    """Makes fp16 of four small floats, two at once: exponents and mantissas move, signs stay or move, the rest goes."""
    two = f"{moves} and.b32 t, t, {mask:#x}; {sign} and.b32 a, a, 0x80008000;"
    pairs = ((0, 0x1404), (1, 0x3424))  # the bytes go to the upper halves of 16 bits
    steps = [f"prmt.b32 a, $2, 0, {chosen:#x}; {two} or.b32 ${output}, a, t;" for output, chosen in pairs]
    return tl.constexpr(f"{{ .reg .b32 a, t; {' '.join(steps)} }}")


PLACE_BYTE = _placing("xor.b32 t, $4, 0x80808080;", 0, 0x4B000000)
PLACE_LOW = _placing("shl.b32 t, $4, 3; and.b32 t, t, 0x78787878;", 2, 0x3F000000)
PLACE_HIGH = _placing("shr.b32 t, $4, 1; and.b32 t, t, 0x78787878;", 2, 0x3F000000)
HALVE_E4M3 = _halving("shr.b32 t, a, 1;", 0x3F803F80)
HALVE_LOW = _halving("shl.b32 t, a, 1;", 0x0E000E00, "shl.b32 a, a, 4;")
HALVE_HIGH = _halving("shr.b32 t, a, 3;", 0x0E000E00)


@triton.jit
def spread_byte(codes):
    """int8 codes as fp32: the number."""
    if COMPILED and tl.target_info.is_cuda():
        bits = _placed(codes, PLACE_BYTE)
    else:
        bits = (codes ^ 128).to(tl.int32) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) - 8388736.0  # 2 ** 23 + 128


@triton.jit
def spread_nibble(codes, HIGH: tl.constexpr):
    """The low or high half of bytes as fp32: 0.5 + code / 32."""
    if COMPILED and tl.target_info.is_cuda():
        bits = _placed(codes, PLACE_HIGH if HIGH else PLACE_LOW)
    else:
        bits = ((codes >> 1 if HIGH else codes << 3) & 0x78).to(tl.int32) << 16 | 0x3F000000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def halve_byte(codes):
    """e4m3 codes as fp32: the number / 256."""
    if COMPILED and tl.target_info.is_cuda():
        bits = _halved(codes, HALVE_E4M3)
    else:
        wide = codes.to(tl.int32)
        bits = ((wide & 127) << 7 | (wide & 128) << 8).to(tl.int16)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def halve_nibble(codes, HIGH: tl.constexpr):
    """e2m1 codes, the low or high half of bytes, as fp32: the number / 16384."""
    if COMPILED and tl.target_info.is_cuda():
        bits = _halved(codes, HALVE_HIGH if HIGH else HALVE_LOW)
    else:
        wide = (codes >> 4 if HIGH else codes).to(tl.int32)
        bits = ((wide & 7) << 9 | (wide & 8) << 12).to(tl.int16)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _halved(codes, HALVE: tl.constexpr):
    return tl.inline_asm_elementwise(HALVE, "=r,=r,r", [codes], dtype=tl.int16, is_pure=True, pack=4)


@triton.jit
def _placed(codes, PLACE: tl.constexpr):
    return tl.inline_asm_elementwise(PLACE, "=r,=r,=r,=r,r", [codes], dtype=tl.int32, is_pure=True, pack=4)


@cache
def early_launch(device: torch.device) -> dict[str, Any]:
    """Options of a kernel that calls `wait`: it may start while the one before it on the stream still runs."""
    if INTERPRETED or device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (9, 0):
        return {}
    return {"launch_pdl": True}


@triton.jit
def wait():
    """Until the kernel before this one on the stream has ended, and what it wrote is visible."""
    if COMPILED and tl.target_info.cuda_capability_geq(9):
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def let_next_start():
    """The next kernel on the stream may start once all programs of this one have said so, if it calls `wait`."""
    if COMPILED and tl.target_info.cuda_capability_geq(9):
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
