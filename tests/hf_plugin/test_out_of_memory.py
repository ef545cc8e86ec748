"""Memory that runs out anywhere: the cache shrinks, and the model goes on with the right text or says why not."""

from __future__ import annotations

import copy
import inspect
import logging
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache
from transformers.cache_utils import DynamicCache, DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

import moebius
from moebius.cpu_experts.executor import CpuExecutor
from moebius.gpu_cache import executor
from moebius.gpu_cache.emulated import EmulatedDevice
from moebius.hf_plugin.running.memory_guard import KvState
from tests import zoo
from tests.hf_plugin import helpers
from tests.hf_plugin.helpers import assert_close, greedy, logits, patched, prompt


def exhausted(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("injected: out of memory")


@contextmanager
def failing(target: Any, name: str, calls: Callable[[int], bool], after: bool = False) -> Iterator[None]:
    """Memory runs out in those calls of a method that `calls` chooses by number, before or after its work."""
    original, number = getattr(target, name), 0

    def method(*args: Any, **kwargs: Any) -> Any:
        nonlocal number
        number += 1
        failed = calls(number)
        if failed and not after:
            exhausted()
        result = original(*args, **kwargs)
        return exhausted() if failed else result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, method)
        yield
        assert number, "it was called"


class FailingOperation(TorchDispatchMode):
    """Memory runs out in the n-th operation of torch in this thread."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            exhausted()
        return func(*args, **(kwargs or {}))


# ---- our own memory


def test_a_cache_that_finds_less_room_than_it_was_told(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a patch that fails although a smaller cache would do, and one that shrinks without a word."""
    model = helpers.trained()
    ids = prompt(model)
    want = greedy(model, ids)
    with failing(EmulatedDevice, "allocate", lambda number: number <= 2), caplog.at_level(logging.WARNING):
        moebius.patch(model, device="emulated", gpu_memory=1.0)
    assert moebius.stats(model).slots == 108, "192 slots, and twice a quarter less"
    assert caplog.text.count("emulated is out of memory: the expert cache shrinks to") == 2
    assert greedy(model, ids) == want
    moebius.unpatch(model)


def test_no_room_at_all() -> None:
    """Catches an endless search for a size that fits, and a model that is left half patched."""
    model = zoo.build("qwen3_moe")
    full = failing(EmulatedDevice, "allocate", lambda number: True)
    with helpers.unchanged(model), full, pytest.raises(torch.OutOfMemoryError):
        moebius.patch(model, device="emulated", gpu_memory=1.0)


def test_a_resize_that_finds_less_room() -> None:
    model = helpers.trained()
    with patched(model, device="emulated", gpu_memory=0.25):
        with failing(EmulatedDevice, "allocate", lambda number: number in (1, 2)):
            moebius.resize(model, gpu_memory=1.0)  # the new pool fails, the former as well, the smaller one fits
        assert moebius.stats(model).slots == 144
        with failing(EmulatedDevice, "allocate", lambda number: True), pytest.raises(torch.OutOfMemoryError):
            moebius.resize(model, gpu_memory=1.0)
        assert_close(logits(model, prompt(model)), logits(helpers.trained(), prompt(model)))


# ---- everybody's memory


PLACES: list[tuple[Any, str, bool]] = [
    (DynamicLayer, "update", False),
    (DynamicLayer, "update", True),
    (torch.nn.functional, "scaled_dot_product_attention", False),
    (CpuExecutor, "run", True),
]


@pytest.mark.parametrize("call", [1, 9])
@pytest.mark.parametrize(
    ("target", "name", "after"), PLACES, ids=[f"{n}-{'after' if a else 'before'}" for _, n, a in PLACES]
)
def test_generate_goes_on(target: Any, name: str, after: bool, call: int) -> None:
    """Catches keys that are in the KV cache twice after a forward ran again, and memory that is not given back."""
    model = helpers.trained()
    ids = prompt(model)
    want = greedy(model, ids)
    with patched(model, device="emulated", gpu_memory=0.5):
        with failing(target, name, lambda number: number == call, after):
            assert greedy(model, ids) == want
        stats = moebius.stats(model)
        assert stats.slots == 72
        assert stats.notes[0].startswith("emulated: out of memory 1 times, for which the cache shrank to ")
        assert greedy(model, ids) == want


def test_an_error_of_the_device_itself() -> None:
    """Catches memory for a launch's result that runs out on the device's side."""
    model = helpers.trained()
    ids = prompt(model)
    want = greedy(model, ids)
    with patched(model, device="emulated", gpu_memory=0.5):
        with failing(executor, "moe_forward", lambda number: number in (2, 30)):
            assert greedy(model, ids) == want
        assert moebius.stats(model).slots == 54


SAYINGS = {
    "Triton Error [CUDA]: out of memory": True,
    "Triton Error [HIP]:  Code: 2, Messsage: out of memory": True,
    "CUDA error: out of memory": True,
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`": True,
    "CUDA error: an illegal memory access was encountered": False,
    "the cache is out of memory slots": False,
}


@pytest.mark.parametrize(("said", "counts"), SAYINGS.items())
def test_who_else_runs_out_of_memory(said: str, counts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the driver's own error, which Triton passes on where a kernel finds no room, and others taken for it."""
    model = helpers.trained()
    ids = prompt(model)
    want, real, calls = greedy(model, ids), executor.moe_forward, iter(range(1, 10**6))

    def launch(*arguments: Any) -> Any:
        if next(calls) in (2, 30):
            raise RuntimeError(said)
        return real(*arguments)

    with patched(model, device="emulated", gpu_memory=0.5):
        monkeypatch.setattr(executor, "moe_forward", launch)
        with nullcontext() if counts else pytest.raises(RuntimeError, match=re.escape(said)):
            assert greedy(model, ids) == want
        assert moebius.stats(model).slots == (54 if counts else 96)
        monkeypatch.undo()
        assert greedy(model, ids) == want


def test_a_kernel_that_finds_no_room_while_patching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a cache that takes the memory for the kernels' code, when they are first launched."""
    model, real, calls = helpers.trained(), executor.moe_forward, iter(range(1, 10**6))

    def launch(*arguments: Any) -> Any:
        if next(calls) == 1:
            raise RuntimeError("Triton Error [CUDA]: out of memory")
        return real(*arguments)

    monkeypatch.setattr(executor, "moe_forward", launch)
    with patched(model, device="emulated", gpu_memory=1.0):
        assert moebius.stats(model).slots == 144, "192 slots, and a quarter less"


@pytest.mark.parametrize("first", range(4))
def test_any_operation_may_fail(first: int) -> None:
    """Catches any place in a forward whose half-done work a second run finds: text, pins, locks, counters."""
    model = zoo.build("gpt_oss")  # windows in every other layer
    ids = prompt(model, 2, 24)
    want = greedy(model, ids)
    numbers, went_on = range(60 + 97 * first, 2200, 391), 0
    with patched(model, device="emulated", gpu_memory=1.0):
        for number in numbers:
            moebius.resize(model, gpu_memory=1.0)
            with FailingOperation(number) as mode:
                try:
                    assert greedy(model, ids) == want
                    went_on += 1
                except torch.OutOfMemoryError as error:  # in generate's own code, between two forwards
                    passed = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
                    assert not passed & {"forward", "_forward"}, passed
            assert mode.left <= 0
            assert greedy(model, ids) == want
    assert went_on >= len(numbers) // 2


def test_memory_that_stays_short() -> None:
    """Catches a forward that is repeated for ever, and a cache that is lost for the next call."""
    model = helpers.trained()
    ids = prompt(model)
    want = greedy(model, ids)
    with patched(model, device="emulated", gpu_memory=0.5):
        with failing(DynamicLayer, "update", lambda number: True), pytest.raises(torch.OutOfMemoryError):
            greedy(model, ids)
        assert moebius.stats(model).slots == 1
        assert greedy(model, ids) == want
        moebius.resize(model, gpu_memory=0.5)
        assert greedy(model, ids) == want


def test_a_cache_that_cannot_even_shrink() -> None:
    """Catches a model without any slots, which no later call can use."""
    model = helpers.trained()
    ids = prompt(model)
    want = greedy(model, ids)
    with patched(model, device="emulated", gpu_memory=0.5):
        full = failing(DynamicLayer, "update", lambda _: True), failing(EmulatedDevice, "allocate", lambda _: True)
        with full[0], full[1], pytest.raises(torch.OutOfMemoryError):
            greedy(model, ids)
        assert greedy(model, ids) == want
        assert moebius.stats(model).slots == 96


@pytest.mark.parametrize("kind", ["static", "linear"])
def test_a_forward_that_cannot_be_repeated_says_so(kind: str) -> None:
    """Catches a state that has taken in the same tokens twice."""
    model = zoo.build("qwen3_next" if kind == "linear" else "qwen3_moe")
    ids = prompt(model, 1)
    more: dict[str, Any] = {"cache_implementation": "static"} if kind == "static" else {}
    want = greedy(model, ids, **more)
    with patched(model, device="emulated", gpu_memory=0.5):
        before = moebius.stats(model).cache_bytes
        full = failing(torch.nn.Linear, "forward", lambda number: number == 30)
        with full, pytest.raises(torch.OutOfMemoryError) as raised:
            greedy(model, ids, **more)
        assert "call again from the start" in raised.value.__notes__[0]
        assert moebius.stats(model).cache_bytes < before
        assert greedy(model, ids, **more) == want


@pytest.mark.parametrize("name", ["glm_moe_dsa", "deepseek_v32"])
@pytest.mark.parametrize("call", [1, 2, 3, 6])
def test_an_indexer_that_finds_no_room(name: str, call: int) -> None:
    """Catches keys of sparse attention's indexer that are appended twice, and a forward given up though they are
    known."""
    model = zoo.build(name)
    ids = prompt(model, 1)
    want = greedy(model, ids)
    with patched(model, device="emulated", gpu_memory=0.5):
        with failing(DynamicIndexedLayer, "update_indexer", lambda number: number == call, after=True):
            assert greedy(model, ids) == want
        assert greedy(model, ids) == want


def test_a_direct_forward() -> None:
    """Catches a guard that only generate knows."""
    model = helpers.trained()
    ids = prompt(model)
    want = logits(model, ids)
    full = failing(torch.nn.functional, "scaled_dot_product_attention", lambda number: number == 3)
    with patched(model, device="emulated", gpu_memory=0.5), full:
        assert_close(logits(model, ids), want)


# ---- the guard


def test_the_forward_looks_as_before() -> None:
    """Catches generate's check of arguments against the signature, and a guard that unpatch or a copy leaves behind."""
    model = zoo.build("qwen3_moe")
    before = inspect.signature(model.forward)
    moebius.patch(model, device="emulated", gpu_memory=0.5)
    assert inspect.signature(model.forward) == before
    twin = copy.deepcopy(model)
    assert twin.__dict__["forward"]._alive() is twin
    moebius.unpatch(model)
    assert "forward" not in vars(model)
    with failing(DynamicLayer, "update", lambda number: number == 2):
        greedy(twin, prompt(twin))
    assert moebius.stats(twin).slots == 6
    moebius.unpatch(twin)


def test_a_forward_of_the_users_own_comes_back() -> None:
    model = zoo.build("qwen3_moe")
    own = model.forward
    model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    mine = model.forward
    with patched(model, device="emulated"):
        greedy(model, prompt(model))
    assert vars(model)["forward"] is mine


def _filled(cache: DynamicCache, tokens: int) -> None:
    for number in range(2):
        states = torch.arange(tokens, dtype=torch.float32)[None, None, :, None].expand(1, 2, tokens, 4) + number
        cache.update(states, -states, number)


@pytest.mark.parametrize("tokens", [0, 3, 9])
@pytest.mark.parametrize("layer", [DynamicLayer, lambda: DynamicSlidingWindowLayer(4)], ids=["full", "sliding"])
def test_kv_caches_are_as_before(layer: Callable[[], Any], tokens: int) -> None:
    """Catches keys that remain, a window that has moved on, and a length that counts both."""
    caches = [DynamicCache() for _ in range(2)]
    for cache in caches:
        cache.layers = [layer(), layer()]
        if tokens:
            _filled(cache, tokens)
    tried, plain = caches
    state = KvState([tried, None, torch.ones(1)])
    assert state.known
    for again in range(2):
        tried.update(torch.full((1, 2, 2, 4), float(again)), torch.ones(1, 2, 2, 4), 0)
        state.restore()
    for cache in caches:
        _filled(cache, 2)
    for mine, other in zip(tried.layers, plain.layers, strict=True):
        assert torch.equal(mine.keys, other.keys)
        assert torch.equal(mine.values, other.values)
        assert vars(mine).keys() == vars(other).keys()
    assert tried.get_seq_length() == plain.get_seq_length() == tokens + 2


def test_layers_that_came_meanwhile_go() -> None:
    """Catches a cache without layers at first, which grows by one for each layer of the model."""
    cache = DynamicCache()
    state = KvState([cache])
    _filled(cache, 3)
    state.restore()
    assert cache.layers == []


def test_caches_of_other_kinds_are_not_known() -> None:
    config = zoo.build("qwen3_moe").config
    assert not KvState([StaticCache(config=config, max_cache_len=8)]).known
    assert not KvState([object()]).known
    assert KvState([torch.ones(1), 1, None, "x", True, 0.5]).known
