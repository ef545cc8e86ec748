"""What a user can choose: one dataclass whose fields are the keyword arguments of `moebius.patch`."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int

from moebius.kernels.formats import FORMATS

DEVICES = '"auto", "cpu", "cuda", "cuda:<n>", another accelerator of torch, or "emulated"'
MEMORY_FORMS = 'bytes as an int, a string such as "8GiB" or "25%", a fraction in (0, 1] as a float, or "auto"'
_MOST_THREADS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of `moebius.patch`.

    Args:
        device: where the expert cache lives: "cuda", "cuda:1", "cpu" (no cache, all experts on the CPU), "emulated"
            (the GPU's code path on CPU tensors) or "auto" (a GPU if there is one, else the CPU). The rest of the model
            moves to a GPU that is chosen here. A model that is spread over several GPUs already stays so: unless a
            number is given, every layer has its cache on the GPU where it computes.
        gpu_memory: bound of the expert cache: bytes (int), "8GiB", "25%" or 0.25 (of all expert bytes), or "auto"
            (the free device memory minus a reserve for the KV cache of up to 16,384 tokens, activations, workspace).
            Where the device runs out of memory nevertheless, the cache shrinks. With several GPUs it holds for each,
            and a fraction is one of the experts there.
        cpu_memory: bound of host memory for experts, in the same forms; "auto" is the free memory minus a reserve. What
            exceeds it stays in a file and is read when needed; that takes `moebius.from_pretrained`.
        expert_format: "native" keeps the experts' dtype; "fp32", "bf16", "fp16", "int8" (8.5 bits a weight) or "int4"
            (4.5 bits) store them so in host memory and cache. A format that would change a weight needs
            `keep_original`, or `moebius.from_pretrained`, which reads the originals from the checkpoint.
        cpu_threads: threads of the CPU experts; None for the number of physical cores.
        cache_policy: which expert deserves a slot: "default" (learns expected uses while running), "ema_table", "ema",
            "mrs", "lfu", "lru" or "static".
        predictor: what foresees the next layer's experts: "blend" (its router and past routing), "next_gate_residual"
            (its router alone, on hidden states moved by their usual change), "next_gate" (on the current ones), "ids"
            (past routing alone) or "none".
        prefetch: bring predicted experts into the cache before their layer runs.
        profile: file of routing statistics from which the cache and the predictor start, made by `moebius.save_profile`
            or `moebius trace --profile`; None for knowing nothing. Without a cache it has no effect.
        emulated_link: GB/s of the emulated device's link; None copies as fast as memory allows.
        keep_original: keep the original expert tensors in host memory, which a lossy `expert_format` needs.
    """

    device: str = "auto"
    gpu_memory: int | float | str = "auto"
    cpu_memory: int | float | str = "auto"
    expert_format: str = "native"
    cpu_threads: int | None = None
    cache_policy: str = "default"
    predictor: str = "blend"
    prefetch: bool = True
    profile: str | None = None
    emulated_link: float | None = None
    keep_original: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.device, str) or not _is_device(self.device):
            raise ValueError(f"device={self.device!r} is unknown; use {DEVICES}")
        parse_memory(self.gpu_memory, total=1 << 40)
        parse_memory(self.cpu_memory, total=1 << 40)
        if self.expert_format not in ("native", *FORMATS):
            allowed = ", ".join(["native", *FORMATS])
            raise ValueError(f"expert_format={self.expert_format!r} is unknown; use one of {allowed}")
        threads = self.cpu_threads
        if threads is not None and not (_is_number(threads, int) and 1 <= threads <= _MOST_THREADS):
            raise ValueError(
                f"cpu_threads={threads!r} must be at least 1 and at most {_MOST_THREADS}, or None for the number of "
                "physical cores"
            )
        if self.emulated_link is not None and not (_is_number(self.emulated_link) and self.emulated_link > 0):
            raise ValueError(f"emulated_link={self.emulated_link!r} must be a positive number of GB/s, or None")
        if self.profile is not None and not isinstance(self.profile, str):
            raise ValueError(f"profile={self.profile!r} must be the path of a file as a string, or None")
        for name in ("prefetch", "keep_original"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name}={value!r} must be True or False")


def unknown_option(name: str, otherwise: str = "") -> TypeError:
    """The error for a keyword argument that is no field of `Options`; `otherwise` tells what else it is not."""
    nearest = get_close_matches(name, Options.__slots__, 1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    return TypeError(f"unknown option {name!r}{otherwise}{hint} Options are {', '.join(Options.__slots__)}")


def _is_device(name: str) -> bool:
    """Whether torch knows an accelerator of that name, there or not, or it is one of ours."""
    if name in ("auto", "cpu", "emulated"):
        return True
    try:
        return torch.device(name).type not in ("cpu", "meta")
    except RuntimeError:
        return False


def _is_number(value: object, kinds: Any = int | float) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def parse_memory(value: int | float | str, total: int) -> int | None:
    """Bytes meant by a memory option, or None for "auto".

    Args:
        value: as `Options.gpu_memory`.
        total: bytes of which a fraction or percentage is taken.

    Raises:
        ValueError: not one of the forms, negative, or zero.
    """
    refused = ValueError(f"memory {value!r} is not understood or not positive; use {MEMORY_FORMS}")
    if value == "auto":
        return None
    if isinstance(value, str):
        value = value.strip()
        try:
            value = float(value[:-1]) / 100 if value.endswith("%") else convert_file_size_to_int(value)
        except ValueError:
            raise refused from None
    if not _is_number(value) or not value > 0:
        raise refused
    if isinstance(value, float):
        if value > 1:
            raise refused
        return int(value * total)
    return value
