"""The host memory of one layer's experts."""

from __future__ import annotations

import copy

import pytest
import torch

from moebius.cpu_experts.store import ExpertStore
from moebius.kernels.experts import RECORD_ALIGNMENT, ExpertSpec, RecordLayout


@pytest.mark.parametrize("format", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("gated", [True, False])
def test_views_of_all_experts_tile_the_records(format: str, gated: bool) -> None:
    """Bug: two parts or two experts overlap, so that filling one damages another."""
    spec = ExpertSpec(hidden=5, intermediate=7, gated=gated, biased=True)
    store = ExpertStore.empty(spec, RecordLayout.of(spec, format), 3)
    store.records.zero_()
    parts = [part for expert in range(3) for part in store.weights(expert) if part is not None]
    for number, part in enumerate(parts, 1):
        part.fill_(number)
    assert all((part == number).all() for number, part in enumerate(parts, 1))
    written = sum(part.numel() for part in parts)
    assert int((store.records.view(store.layout.dtype) != 0).sum()) == written


def test_records_are_aligned_and_counted() -> None:
    """Bug: records straddle cache lines, or the reported size is not what was allocated."""
    spec = ExpertSpec(3, 3)
    store = ExpertStore.empty(spec, RecordLayout.of(spec, "bf16"), 5)
    assert all(store.records[e].data_ptr() % RECORD_ALIGNMENT == 0 for e in range(5))
    assert store.nbytes == store.records.numel() == 5 * 64


def test_a_store_on_huge_pages_is_whole_and_copies_like_a_tensor() -> None:
    """Bug: the large allocation is too short, shared between stores, or dies while a view is in use."""
    spec = ExpertSpec(512, 512)
    store = ExpertStore.empty(spec, RecordLayout.of(spec, "fp32"), 2)
    other = ExpertStore.empty(spec, store.layout, 2)
    store.records.fill_(1)
    other.records.fill_(2)
    copied, last = copy.deepcopy(store), store.weights(1).down
    assert store.nbytes == 2 * 3 * 512 * 512 * 4
    del store
    assert (last.contiguous().view(torch.uint8) == 1).all()
    copied.records.fill_(3)
    assert (last.contiguous().view(torch.uint8) == 1).all()
    assert (other.records == 2).all()


def test_more_than_the_host_has_is_a_memory_error_with_the_size() -> None:
    """Bug: torch's allocator error, without a hint of what needed the memory."""
    spec = ExpertSpec(1 << 20, 1 << 20)
    with pytest.raises(MemoryError, match=r"1000 experts .* GiB in fp32"):
        ExpertStore.empty(spec, RecordLayout.of(spec, "fp32"), 1000)


def test_records_of_another_shape_or_alignment_are_refused() -> None:
    """Bug: kernels read beyond a buffer that is too short."""
    spec = ExpertSpec(3, 3)
    layout = RecordLayout.of(spec, "bf16")
    with pytest.raises(ValueError, match="contiguous uint8"):
        ExpertStore(spec, layout, 5, torch.empty(4, layout.nbytes, dtype=torch.uint8))
    shifted = torch.empty(5 * layout.nbytes + 65, dtype=torch.uint8)
    start = -shifted.data_ptr() % RECORD_ALIGNMENT + 1
    with pytest.raises(ValueError, match="multiple of 64"):
        ExpertStore(spec, layout, 5, shifted[start : start + 5 * layout.nbytes].view(5, -1))
    with pytest.raises(ValueError, match="at least one expert"):
        ExpertStore.empty(spec, layout, 0)
