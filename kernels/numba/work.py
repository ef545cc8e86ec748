"""The compiled function of each format: takes units of a job and computes them until none is left."""

from __future__ import annotations

from typing import Any

import numpy as np

from moebius.kernels.numba import coded, portable, quantized, words
from moebius.kernels.numba.bfloats import products_of
from moebius.kernels.numba.decoding import E2M1_CODE, E4M3_CODE, INT4_CODE, INT8_CODE
from moebius.kernels.numba.integers import INT4, INT8
from moebius.kernels.numba.jit import entry, helper_of
from moebius.kernels.numba.outer_tiles import begin_tiles, end_tiles
from moebius.kernels.numba.panels import float_bytes, floats_at, make_panels, pack_inputs, unpack_floats
from moebius.kernels.numba.units import (
    CONTRACT,
    EXPAND,
    NONE,
    PACK,
    columns_of,
    has_many,
    report,
    take_unit,
    wait_for,
    word,
)

_F32 = np.float32(0)


def make_work(kind: str, prepare: Any, few: tuple[Any, Any], many: tuple[Any, Any]) -> Any:
    """The function by which a thread works on a job.

    Args:
        kind: a name for it.
        prepare: (job, layer, token, element) makes a token's input ready for `few`.
        few, many: the functions (expand, contract) for experts with few and with many pairs;
            expand(job, layer, active, start, then, element, bias, vector) computes a unit of phase 1, and
            contract(job, layer, active, start, stop, then, element, bias, vector) one expert's part of a unit of
            phase 2, where `then` are the index of the active expert and the row that the thread computes next, `bias`
            is the type of the biases and `vector` (not for `few`) that of packed vectors.
    """
    expand_few, contract_few = few
    expand_many, contract_many = many

    @helper_of(kind)
    def expand(job, layer, active, start, then, element, bias, pairs):  # type: ignore[no-untyped-def]
        if not has_many(job, active):
            expand_few(job, layer, active, start, then, element, bias)
        elif word(job, words.PAIRED):
            expand_many(job, layer, active, start, then, element, bias, products_of(pairs))
        else:
            expand_many(job, layer, active, start, then, element, bias, _F32)

    @helper_of(kind)
    def contract(job, layer, start, following, element, bias, pairs):  # type: ignore[no-untyped-def]
        """Output columns from `start` on of all experts, in ascending order; then come those from `following` on."""
        stop, active = min(start + columns_of(job, layer, start), word(layer, words.HIDDEN)), word(job, words.ACTIVE)
        for i in range(active):
            then = (i + 1, start) if i + 1 < active else (0, following)
            if not has_many(job, i):
                contract_few(job, layer, i, start, stop, then, element, bias)
            elif word(job, words.PAIRED):
                contract_many(job, layer, i, start, stop, then, element, bias, products_of(pairs))
            else:
                contract_many(job, layer, i, start, stop, then, element, bias, _F32)

    @helper_of(kind)
    def work(job, element, bias, pairs):  # type: ignore[no-untyped-def]
        """Work on a job: `element`, `bias` and `pairs` tell the types of weights, biases and, beside bf16, of products.

        The next unit is taken before one is computed, so that its first rows can be asked for at the end.
        """
        layer = word(job, words.LAYER)
        begin_tiles(job)
        phase, place, start = take_unit(job, layer)
        while phase != NONE:
            next_phase, next_place, next_start = take_unit(job, layer)
            wait_for(job, layer, phase)
            then = (next_place, next_start) if next_phase == phase else (place, start)
            if phase == CONTRACT:
                contract(job, layer, start, then[1], element, bias, pairs)
            else:
                if phase == EXPAND:
                    expand(job, layer, place, start, then, element, bias, pairs)
                elif phase == PACK:
                    if word(job, words.PAIRED):
                        pack_inputs(job, layer, place, products_of(pairs))
                    else:
                        pack_inputs(job, layer, place, _F32)
                else:
                    prepare(job, layer, place, element)
                report(job)
            phase, place, start = next_phase, next_place, next_start
        end_tiles(job)

    return work


_work_floats = make_work(
    "floats",
    portable.prepare,
    (portable.expand, portable.contract),
    make_panels("floats", floats_at, float_bytes, unpack_floats),
)
_work_rounding = make_work(
    "rounding",
    quantized.prepare,
    (quantized.expand, quantized.contract),
    make_panels("rounding", quantized.codes_at, quantized.code_bytes, quantized.unpack_codes),
)
_work_coded = make_work(
    "coded",
    portable.prepare,
    (coded.expand, coded.contract),
    make_panels("coded", coded.codes_at, coded.code_bytes, coded.unpack_codes),
)


@entry("void(int64)", callback=True)
def work_fp32(job):  # type: ignore[no-untyped-def]
    _work_floats(job, np.float32(0), np.float32(0), np.float32(0))


@entry("void(int64)", callback=True)
def work_bf16(job):  # type: ignore[no-untyped-def]
    _work_floats(job, np.uint16(0), np.uint16(0), np.uint16(0))


@entry("void(int64)", callback=True)
def work_fp16(job):  # type: ignore[no-untyped-def]
    _work_floats(job, np.int16(0), np.int16(0), np.float32(0))


@entry("void(int64)", callback=True)
def work_rounding_int8(job):  # type: ignore[no-untyped-def]
    _work_rounding(job, INT8, np.float32(0), np.uint16(0))


@entry("void(int64)", callback=True)
def work_rounding_int4(job):  # type: ignore[no-untyped-def]
    _work_rounding(job, INT4, np.float32(0), np.uint16(0))


@entry("void(int64)", callback=True)
def work_int8(job):  # type: ignore[no-untyped-def]
    _work_coded(job, INT8_CODE, np.float32(0), np.uint16(0))


@entry("void(int64)", callback=True)
def work_int4(job):  # type: ignore[no-untyped-def]
    _work_coded(job, INT4_CODE, np.float32(0), np.uint16(0))


@entry("void(int64)", callback=True)
def work_e4m3(job):  # type: ignore[no-untyped-def]
    _work_coded(job, E4M3_CODE, np.float32(0), np.uint16(0))


@entry("void(int64)", callback=True)
def work_e2m1(job):  # type: ignore[no-untyped-def]
    _work_coded(job, E2M1_CODE, np.float32(0), np.uint16(0))


@entry("void(int64)", callback=True)
def work_mxfp4(job):  # type: ignore[no-untyped-def]
    if word(job, words.SOURCE_KIND) == 0:  # as exact as fp32, which rounding to 16 bits is not
        _work_coded(job, E2M1_CODE, np.float32(0), np.uint16(0))
    else:
        _work_rounding(job, E2M1_CODE, np.float32(0), np.uint16(0))
