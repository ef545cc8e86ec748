"""Host memory that holds the experts of one layer, in records, or as tensors of a checkpoint that is mapped."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import torch

from moebius.cpu_experts.mapped_file import MappedFile
from moebius.kernels.experts import RECORD_ALIGNMENT, ExpertSpec, ExpertWeights, RecordLayout
from moebius.kernels.numba.arguments import Layer, describe
from moebius.kernels.packing import unpack

_HUGE_PAGE = 2 << 20  # bytes


@dataclass(frozen=True, eq=False)
class ExpertStore:
    """The experts of one layer, in records in the layout's format, or wherever the parts of such records are.

    Fill records through the views of `weights`; afterwards a store is read by any number of threads and never written.

    Args:
        spec: the mathematics of the layer's experts.
        layout: the byte layout of a record.
        num_experts: E.
        content: records uint8 [E, layout.nbytes], contiguous, on the CPU, aligned to `RECORD_ALIGNMENT` bytes; or
            tensors by the names of `layout.parts()`, one an expert, contiguous, on the CPU.
        files: mapped files that have it, if any do.
    """

    spec: ExpertSpec
    layout: RecordLayout
    num_experts: int
    content: torch.Tensor | Mapping[str, Sequence[torch.Tensor]]
    files: tuple[MappedFile, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.content, torch.Tensor):
            return  # checked by whoever computes with it
        records, shape = self.content, (self.num_experts, self.layout.nbytes)
        if records.dtype != torch.uint8 or tuple(records.shape) != shape or not records.is_contiguous():
            raise ValueError(
                f"expert records must be contiguous uint8 {list(shape)}, but are {records.dtype} {list(records.shape)}"
            )
        if records.device.type != "cpu" or records.data_ptr() % RECORD_ALIGNMENT:
            raise ValueError(
                f"expert records must lie in host memory at a multiple of {RECORD_ALIGNMENT} bytes, but are on "
                f"{records.device} at {records.data_ptr():#x}; allocate them with ExpertStore.empty"
            )

    @classmethod
    def empty(cls, spec: ExpertSpec, layout: RecordLayout, num_experts: int) -> ExpertStore:
        """Allocate the records of `num_experts` experts, unfilled.

        Raises:
            MemoryError: the host cannot give that much memory.
        """
        if num_experts < 1:
            raise ValueError(f"a layer needs at least one expert, not {num_experts}")
        nbytes = num_experts * layout.nbytes
        try:
            buffer = allocate(nbytes)
        except (RuntimeError, OSError) as error:
            raise MemoryError(
                f"no host memory for {num_experts} experts of {layout.nbytes:,} bytes ({nbytes / 2**30:.2f} GiB in "
                f"{layout.format}); choose a smaller expert_format or free memory"
            ) from error
        return cls(spec, layout, num_experts, buffer.view(num_experts, layout.nbytes))

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        return self.num_experts * self.layout.nbytes

    @cached_property
    def described(self) -> Layer:
        """As kernels see them. Raises ValueError for experts that are torch code."""
        return describe(self.spec, self.layout, self.parts)

    @property
    def records(self) -> torch.Tensor:
        """The records, of which there are none where experts are used in a checkpoint's files."""
        assert isinstance(self.content, torch.Tensor), "experts in a checkpoint's files have no records"
        return self.content

    @property
    def parts(self) -> Mapping[str, torch.Tensor | Sequence[torch.Tensor]]:
        """Views of every stored tensor by its name in `layout.parts()`, one an expert."""
        return self.layout.stored(self.content) if isinstance(self.content, torch.Tensor) else self.content

    def weights(self, expert: int) -> ExpertWeights:
        """One expert's weights: views to fill, read or restore in a float format, fp32 copies in a quantised one.

        What is in files can only be read.
        """
        return unpack(self.layout, {name: tensors[expert] for name, tensors in self.parts.items()})

    def check_unchanged(self) -> None:
        """Raise ValueError where a file was written to, or cut short, where it lies."""
        for file in self.files:
            file.check_unchanged()


def allocate(nbytes: int) -> torch.Tensor:
    """Unfilled bytes; large stores on huge pages, which made decoding 15 % faster (9 MB records on a Zen 5).

    They begin with a page, since a driver that pins a store's pages refuses those that another store has pinned.
    """
    if nbytes < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        buffer, alignment = torch.empty(nbytes + mmap.PAGESIZE, dtype=torch.uint8, device="cpu"), mmap.PAGESIZE
    else:
        pages = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # advice only: a kernel without huge pages refuses it
            pages.madvise(mmap.MADV_HUGEPAGE)
        buffer, alignment = torch.frombuffer(pages, dtype=torch.uint8), _HUGE_PAGE
    return buffer[-buffer.data_ptr() % alignment :][:nbytes]
