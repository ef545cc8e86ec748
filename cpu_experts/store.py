"""Host memory that holds the experts of one layer, one contiguous record per expert."""

from __future__ import annotations

import mmap
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import torch

from moebius.kernels.experts import RECORD_ALIGNMENT, ExpertSpec, ExpertWeights, RecordLayout
from moebius.kernels.numba.arguments import Layer, describe
from moebius.kernels.packing import unpack

_HUGE_PAGE = 2 << 20  # bytes


@dataclass(frozen=True, eq=False)
class ExpertStore:
    """The experts of one layer: record e holds expert e's weights in the layout's format.

    Fill it through the views of `weights`; afterwards it is read by any number of threads and never written.

    Args:
        spec: the mathematics of the layer's experts.
        layout: the byte layout of a record.
        num_experts: E.
        records: uint8 [E, layout.nbytes], contiguous, on the CPU, aligned to `RECORD_ALIGNMENT` bytes.
    """

    spec: ExpertSpec
    layout: RecordLayout
    num_experts: int
    records: torch.Tensor

    def __post_init__(self) -> None:
        records, shape = self.records, (self.num_experts, self.layout.nbytes)
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
        return describe(self.spec, self.layout, self.records)

    def weights(self, expert: int) -> ExpertWeights:
        """One expert's weights: views to fill, read or restore in a float format, fp32 copies in a quantised one."""
        return unpack(self.layout, self.records[expert])


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
