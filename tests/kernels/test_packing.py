"""Records in every format: what is packed comes back, and quantisation is as good as its bits allow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.kernels.experts import RECORD_ALIGNMENT, ExpertSpec, RecordLayout
from moebius.kernels.formats import FLOATS, FORMATS, coding
from moebius.kernels.packing import copy, pack, quantize, unpack, unpack_matrix

specs = st.builds(ExpertSpec, st.integers(1, 70), st.integers(1, 70), st.booleans(), st.booleans())


def weights_of(layout: RecordLayout, experts: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(experts, *shape, generator=generator) for name, shape in layout.shapes().items()}


@settings(derandomize=True, deadline=None, max_examples=60)
@given(spec=specs, format=st.sampled_from(FORMATS), experts=st.integers(1, 3))
def test_weights_come_back(spec: ExpertSpec, format: str, experts: int) -> None:
    """A part that overlaps another, a wrong padding or a swapped nibble would return other weights."""
    layout = RecordLayout.of(spec, format)
    records = torch.zeros(experts, layout.nbytes, dtype=torch.uint8)
    weights = weights_of(layout, experts)
    pack(layout, records, weights)
    restored = unpack(layout, layout.stored(records))._asdict()
    for name, weight in weights.items():
        error = (restored[name].double() - weight).abs()
        if format in FLOATS:
            assert torch.equal(restored[name], weight.to(layout.dtype))
        elif weight.ndim == 2:  # a bias
            assert torch.equal(restored[name], weight)
        else:  # half a step, and the fp16 rounding of the scale: 127 or 8 steps reach the largest weight
            step = weight.abs().max() / {"int8": 127, "int4": 8, "fp8": 28, "mxfp4": 4}[format]
            assert error.max() <= 1.3 * step
    assert all(restored[name] is None for name in restored if name not in weights)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(spec=specs, format=st.sampled_from(FORMATS))
def test_parts_do_not_overlap(spec: ExpertSpec, format: str) -> None:
    layout = RecordLayout.of(spec, format)
    end = 0
    for part in layout.parts().values():
        assert part.offset >= end
        assert part.offset % (RECORD_ALIGNMENT if layout.quantized else layout.dtype.itemsize) == 0
        end = part.offset + part.nbytes
    assert end <= layout.nbytes < end + RECORD_ALIGNMENT
    assert layout.nbytes % RECORD_ALIGNMENT == 0


def test_bits_per_weight() -> None:
    """At sizes of real models: 8.5 and 4.5 bits, scales included."""
    spec = ExpertSpec(2048, 768)
    for format, bits in (("int8", 8.5), ("int4", 4.5)):
        assert RecordLayout.of(spec, format).nbytes * 8 == bits * 3 * 2048 * 768


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.0055), (4, 0.0820)])
def test_error_on_normal_weights(bits: int, bound: float) -> None:
    """Rounding to the nearest with the plain scale gives 0.0061 and 0.0970; the best scale of all 0.0809 at 4 bits."""
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize(weight, bits)
    error = (unpack_matrix(coding(f"int{bits}"), 512, codes, scales) - weight).norm() / weight.norm()
    assert error <= bound


@pytest.mark.parametrize("bits", [8, 4])
def test_extremes(bits: int) -> None:
    """All-zero groups, single weights, and weights whose scale leaves fp16's normal range stay finite."""
    weight = torch.zeros(4, 64)
    weight[1, 3], weight[2, :] = 1.0, 1e-8
    weight[3, ::2], weight[3, 1::2] = 100.0, -100.0
    restored = unpack_matrix(coding(f"int{bits}"), 64, *quantize(weight, bits))
    assert torch.isfinite(restored).all()
    assert torch.equal(restored[0], weight[0])
    assert restored[1, 3] == pytest.approx(1.0, rel=1e-3)
    assert torch.allclose(restored[3], weight[3], rtol=0.01)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70)), stride=st.integers(1, 2), transposed=st.booleans(),
    written=st.booleans(), dtypes=st.permutations([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_copies_of_interleaved_matrices(
    shape: tuple[int, int], stride: int, transposed: bool, written: bool, dtypes: list[torch.dtype]
) -> None:
    """Catches a strip that is left out or lands elsewhere, and a neighbour that is overwritten."""
    rows, columns = shape
    whole = torch.zeros((columns, stride * rows) if transposed else (rows, stride * columns), dtype=dtypes[0])
    view = whole[:, ::stride].T if transposed else whole[:, ::stride]
    plain = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns).to(dtypes[1])
    if written:
        copy(view, plain)
        assert torch.equal(view.contiguous(), plain.to(dtypes[0]))
        assert stride == 1 or not whole[:, 1::2].any()
    else:
        view.copy_(plain)
        found = torch.empty_like(plain)
        copy(found, view)
        assert torch.equal(found, view.to(dtypes[1]))
