"""The expert cache on a device whose copies end when the test says so."""

from __future__ import annotations

import gc
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moebius.gpu_cache import pool
from moebius.gpu_cache.cache import ExpertCache
from moebius.gpu_cache.device import Device, open_device
from tests.gpu_cache.fake_device import CopyError, FakeDevice
from tests.gpu_cache.layers import HIDDEN, expected, make_layers, one_token, some

X = torch.linspace(-1, 1, HIDDEN)[None]
NBYTES = make_layers()[0].layout.nbytes


def make_cache(slots: int = 4, **layers: tuple[int, ...]) -> tuple[ExpertCache, FakeDevice]:
    device = FakeDevice()
    return ExpertCache(device, make_layers(**layers), slots * NBYTES), device


def load(cache: ExpertCache, layer: int, experts: np.ndarray) -> None:
    """Make experts resident."""
    cache.layer(layer).used(experts, np.zeros(len(experts), bool))
    assert cache.layer(layer).admit(experts) == len(experts)
    cache.drain()


def test_an_upload_is_a_miss_until_it_has_completed():
    cache, device = make_cache()
    cache.layer(0).used(some(1), np.array([False]))
    assert cache.layer(0).admit(some(1)) == 1
    assert cache.layer(0).lookup(some(1)).tolist() == [-1]
    cache.layer(0).finish()
    device.copies[0].end()
    (slot,) = cache.layer(0).lookup(some(1))
    assert torch.equal(
        cache.layer(0).launch(X, one_token(some(1)), some(slot)).result(), expected(make_layers()[0], X, some(1))
    )


def test_copies_that_complete_out_of_order_publish_their_own_slot():
    cache, device = make_cache(4, experts=(6,), widths=(2,))
    cache.layer(0).used(some(1, 2), np.array([False, False]))
    assert cache.layer(0).admit(some(1, 2)) == 2
    device.copies[1].end()
    assert (cache.layer(0).lookup(some(1, 2)) >= 0).tolist() == [False, True]


def test_a_hit_is_not_displaced_before_finish():
    """Another layer's or the next step's upload into a slot that is being read."""
    cache, device = make_cache(1, experts=(6,), widths=(2,))
    load(cache, 0, some(1))
    slots = cache.layer(0).lookup(some(1))
    cache.layer(0).used(some(2), np.array([False]))
    assert cache.layer(0).admit(some(2)) == 0
    assert cache.layer(0).fetch(some(3)).tolist() == [-1]
    launch = cache.layer(0).launch(X, one_token(some(1)), slots)
    cache.layer(0).finish()
    assert cache.layer(0).admit(some(2)) == 1
    assert not device.copies[0].ready, "the slot is free to be claimed, but its reader has not ended"
    assert torch.equal(launch.result(), expected(make_layers()[0], X, some(1)))
    assert device.copies[0].ready


def test_a_displaced_expert_is_invisible_before_its_copy_starts():
    cache, _ = make_cache(1, experts=(6,), widths=(2,))
    load(cache, 0, some(1))
    cache.layer(0).used(some(2), np.array([False]))
    cache.layer(0).admit(some(2))
    assert cache.layer(0).lookup(some(1, 2)).tolist() == [-1, -1]


def test_fetched_experts_are_computed_when_their_copies_arrive():
    """A launch that reads a slot still loading."""
    cache, device = make_cache()
    assert cache.layer(0).lookup(some(1, 3)).tolist() == [-1, -1]
    slots = cache.layer(0).fetch(some(1, 3))
    launch = cache.layer(0).launch(X, one_token(some(1, 3)), slots)
    assert not device.computations[0].ready
    assert torch.equal(launch.result(), expected(make_layers()[0], X, some(1, 3)))
    assert cache.counters.demand_fetches.tolist() == [2, 0]


def test_fetch_takes_over_a_prefetch_under_way():
    """An expert in two slots, or copied twice."""
    cache, _ = make_cache()
    assert cache.layer(0).prefetch(some(1)) == 1
    assert cache.layer(0).prefetch(some(1)) == 0
    slots = cache.layer(0).fetch(some(1))
    assert torch.equal(
        cache.layer(0).launch(X, one_token(some(1)), slots).result(), expected(make_layers()[0], X, some(1))
    )
    assert cache.counters.uploads.tolist() == [1, 0]
    assert cache.counters.prefetch_used.tolist() == [1, 0]


def test_an_expert_that_arrives_between_lookup_and_fetch_is_not_displaced():
    """A slot that `fetch` has promised for one expert and gives to the next."""
    cache, device = make_cache(1, experts=(6,), widths=(2,))
    cache.layer(0).prefetch(some(1))
    assert cache.layer(0).lookup(some(1, 2)).tolist() == [-1, -1]
    device.copies[0].end()
    assert cache.layer(0).fetch(some(1, 2)).tolist() == [0, -1]
    cache.layer(0).launch(X, one_token(some(1)), some(0))
    cache.layer(0).finish()


def test_what_one_fetch_returned_is_released_together():
    """Slots that were on their way and others, which `fetch` pins one after the other."""
    cache, _ = make_cache(3, experts=(6,), widths=(2,))
    cache.layer(0).prefetch(some(2))
    cache.layer(0).lookup(some(1, 2, 3))
    slots = cache.layer(0).fetch(some(1, 2, 3))
    cache.layer(0).launch(X, one_token(some(1, 2, 3)), slots)
    cache.layer(0).release(slots)
    assert not cache._pools[0].table.pins.any()
    cache.layer(0).finish()


def test_prefetches_are_used_once_or_wasted():
    cache, _ = make_cache(2, experts=(6,), widths=(2,))
    for expert in (1, 2):
        assert cache.layer(0).prefetch(some(expert)) == 1
        cache.drain()
    for _ in range(2):
        cache.layer(0).lookup(some(1))
        cache.layer(0).used(some(1), np.array([True]))
        cache.layer(0).finish()
    load(cache, 0, some(3))  # displaces 2, which nobody used
    counters = cache.counters
    assert (counters.prefetch_issued[0], counters.prefetch_used[0], counters.prefetch_wasted[0]) == (2, 1, 1)
    assert counters.upload_bytes[0] == 3 * NBYTES


def test_uploads_that_nobody_waits_for_hold_at_most_half_of_the_slots():
    """A slow link whose queue occupies the cache with slots that serve nobody."""
    cache, _ = make_cache(4, experts=(8,), widths=(2,))
    load(cache, 0, some(0, 1))
    load(cache, 0, some(2, 3))
    cache.layer(0).used(some(4, 5, 6), np.zeros(3, bool))
    assert cache.layer(0).admit(some(4, 5, 6)) == 2
    assert cache.layer(0).prefetch(some(7)) == 0
    assert (cache.layer(0).fetch(some(6)) >= 0).all(), "demand is not bounded"


def test_queued_bytes_are_bounded(monkeypatch):
    monkeypatch.setattr(pool, "QUEUED_BYTES", 3 * NBYTES)
    cache, _ = make_cache(12, experts=(12,), widths=(2,))
    cache.layer(0).used(np.arange(8), np.zeros(8, bool))
    assert cache.layer(0).admit(np.arange(8, dtype=np.int32)) == 3


@pytest.fixture
def one_copy_at_a_time(monkeypatch):
    monkeypatch.setattr(Device, "flying_bytes", 0)
    monkeypatch.setattr(pool, "FLYING_COPIES", 1)
    monkeypatch.setattr(pool, "QUEUED_BYTES", 1 << 20)


def prefetched(cache: ExpertCache) -> dict[str, int]:
    names = ("issued", "used", "wasted", "cancelled")
    return {name: int(getattr(cache.counters, f"prefetch_{name}").sum()) for name in names}


def test_the_device_gets_few_copies_and_the_next_when_one_has_ended(one_copy_at_a_time):
    """Copies on a stream cannot be withdrawn, and demand waits for them."""
    cache, device = make_cache(8)
    assert cache.layer(0).prefetch(some(1, 2, 3)) == 3
    assert len(device.copies) == 1
    device.copies[0].end()
    cache.layer(1).lookup(some(0))
    cache.layer(1).finish()
    assert len(device.copies) == 1
    cache.drain()
    assert cache.resident.tolist() == [3, 0]


def test_prefetches_that_have_not_begun_are_withdrawn_when_their_layer_begins(one_copy_at_a_time):
    """Late uploads, of experts that the router did not even choose, in front of those that are needed."""
    cache, _ = make_cache(8)
    cache.layer(0).prefetch(some(1))
    assert cache.layer(1).prefetch(some(0, 1, 2)) == 3
    cache.layer(0).lookup(some(1))
    assert prefetched(cache)["cancelled"] == 0, "another layer's"
    cache.layer(1).lookup(some(0))
    assert prefetched(cache) == {"issued": 1, "used": 0, "wasted": 0, "cancelled": 3}
    cache.layer(0).finish()
    cache.layer(1).finish()
    cache.drain()
    assert cache.resident.tolist() == [1, 0]
    assert cache.counters.prefetch_cancelled.tolist() == [0, 3]


def test_a_prefetch_that_is_withdrawn_has_displaced_nobody(one_copy_at_a_time):
    """A slot taken from an expert for the sake of one that never came."""
    cache, _ = make_cache(4, experts=(4, 4), widths=(2, 2))
    load(cache, 1, some(1))
    load(cache, 1, some(2))
    cache.layer(0).prefetch(some(1))
    cache.layer(1).prefetch(some(3, 0))
    assert (cache.layer(1).lookup(some(1, 2)) >= 0).all()


def test_demand_overtakes_what_waits(one_copy_at_a_time):
    """An expert that is waited for behind a queue; or uploaded a second time when its turn comes."""
    cache, device = make_cache(8)
    cache.layer(1).prefetch(some(0))
    cache.layer(0).used(some(1, 2), np.zeros(2, bool))
    assert cache.layer(0).admit(some(1, 2)) == 2
    assert cache.layer(0).fetch(some(2)).min() >= 0
    assert len(device.copies) == 2
    cache.drain()
    assert cache.counters.uploads.tolist() == [2, 1]
    assert cache.counters.demand_fetches.tolist() == [1, 0]


def test_prefetches_go_before_admissions(one_copy_at_a_time):
    """A prefetch is of use for a layer, an admission for a token."""
    cache, device = make_cache(8)
    cache.layer(1).prefetch(some(0))
    cache.layer(0).used(some(1, 2), np.zeros(2, bool))
    cache.layer(0).admit(some(1, 2))
    cache.layer(1).prefetch(some(3))
    device.copies[0].end()
    cache.layer(0).lookup(some(5))
    assert cache._pools[0].table.occupied(1, some(3)).min() >= 0


def test_resize_forgets_what_waits(one_copy_at_a_time):
    cache, _ = make_cache(8)
    cache.layer(0).prefetch(some(1, 2, 3))
    cache.resize(8 * NBYTES)
    cache.drain()
    assert cache.resident.sum() == 0
    assert prefetched(cache) == {"issued": 1, "used": 0, "wasted": 1, "cancelled": 2}


def test_times_of_copies_are_summed_and_handed_out_once():
    """A failed copy has no duration, and one that is seen twice would count double."""
    cache, device = make_cache()
    cache.layer(0).prefetch(some(1, 2))
    for copy, took in zip(list(device.copies), (100.0, 50.0), strict=True):
        copy.took_us = took
        copy.end()
    cache.layer(1).prefetch(some(0))
    device.copies[0].end(CopyError("injected"))
    with pytest.raises(RuntimeError):
        cache.drain()
    assert sorted(cache.copy_times()) == [50.0, 100.0]
    assert cache.copy_times() == []
    assert cache.counters.copies.tolist() == [2, 0]
    assert cache.counters.copy_us.tolist() == [150.0, 0.0]


def test_a_failed_copy_frees_its_slot_and_is_reported_once():
    cache, device = make_cache(1, experts=(6,), widths=(2,))
    assert cache.layer(0).prefetch(some(1)) == 1
    device.copies[0].end(CopyError("injected"))
    with pytest.raises(RuntimeError, match="copying expert 1 of layer 0 into the cache failed: ") as raised:
        cache.layer(0).lookup(some(1))
    assert isinstance(raised.value.__cause__, CopyError)
    cache.layer(0).finish()
    assert cache.counters.prefetch_wasted.tolist() == [1]
    load(cache, 0, some(1))
    assert cache.layer(0).lookup(some(1)).tolist() == [0]


def test_a_failed_fetch_is_reported_by_its_launch_alone():
    """An error that the next, unrelated generate would see again."""
    cache, device = make_cache()
    launch = cache.layer(0).launch(X, one_token(some(1)), cache.layer(0).fetch(some(1)))
    device.copies[0].end(CopyError("injected"))
    with pytest.raises(CopyError):
        launch.result()
    cache.layer(0).finish()
    assert cache.layer(0).lookup(some(1)).tolist() == [-1]
    cache.drain()


def test_a_copy_that_is_refused_leaves_the_slot_free():
    cache, device = make_cache(1, experts=(6,), widths=(2,))
    device.refuse = True
    with pytest.raises(CopyError):
        cache.layer(0).prefetch(some(1))
    device.refuse = False
    assert cache.layer(0).prefetch(some(1)) == 1


def test_finish_after_a_failed_lookup_is_harmless():
    """The caller's `finally` must not hide the error that it follows."""
    cache, device = make_cache()
    cache.layer(0).prefetch(some(1))
    device.copies[0].end(CopyError("injected"))
    with pytest.raises(RuntimeError):
        cache.layer(0).lookup(some(1))
    cache.layer(0).finish()


@pytest.mark.parametrize(
    ("budget", "slots"), [(2 * NBYTES, [1, 1]), (5 * NBYTES + NBYTES // 2, [3, 2]), (99 * NBYTES, [6, 4])]
)
def test_budget_is_kept_and_never_exceeds_the_experts(budget, slots):
    layers = make_layers()
    cache = ExpertCache(FakeDevice(), layers, budget)
    assert cache.nbytes == cache.slots * NBYTES <= budget
    for layer, count in enumerate(slots):
        experts = np.arange(len(layers[layer].records), dtype=np.int32)
        for expert in experts:  # one by one: an event does not displace itself
            cache.layer(layer).used(some(expert), np.array([False]))
            cache.layer(layer).admit(some(expert))
            cache.drain()
        assert cache.resident[layer] == count


def test_layers_of_different_sizes_have_pools_of_their_own():
    """A record copied into a slot of another size, or one size that takes the whole budget."""
    layers = make_layers((6, 4, 6), (2, 40, 2))
    small, large = layers[0].records.shape[1], layers[1].records.shape[1]
    for budget in range(small + large, 12 * small + 4 * large + 1, small // 2):
        cache = ExpertCache(FakeDevice(), layers, budget)
        assert cache.nbytes <= budget
        assert (budget - cache.nbytes < large) or cache.slots == 16
    for layer in range(3):
        load(cache, layer, some(2))
        slots = cache.layer(layer).lookup(some(2))
        got = cache.layer(layer).launch(X, one_token(some(2)), slots).result()
        assert torch.equal(got, expected(layers[layer], X, some(2)))


def test_a_budget_below_one_expert_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match=rf"budget of {NBYTES - 1} bytes .* \({NBYTES} bytes\)"):
        ExpertCache(FakeDevice(), make_layers(), NBYTES - 1)


def test_unknown_policy_is_refused_before_anything_is_allocated():
    with pytest.raises(ValueError, match="'best' is unknown"):
        ExpertCache(FakeDevice(room=0), make_layers(), NBYTES, policy="best")


def test_out_of_memory_at_construction_gives_everything_back():
    device = FakeDevice(room=NBYTES)
    with pytest.raises(RuntimeError, match="out of memory"):
        ExpertCache(device, make_layers(), 4 * NBYTES)
    assert device.closed == 1
    assert device.pinned == []


def test_resize_changes_the_budget_and_keeps_serving():
    cache, _ = make_cache(2)
    load(cache, 0, some(1))
    cache.resize(8 * NBYTES)
    assert cache.slots == 8
    assert cache.layer(0).lookup(some(1)).tolist() == [-1]
    cache.layer(0).finish()
    load(cache, 0, some(1, 2, 3))
    assert cache.resident.tolist() == [3, 0]


def test_resize_without_room_keeps_the_former_budget():
    cache, device = make_cache(2)
    device.room = 2 * NBYTES
    with pytest.raises(RuntimeError, match="out of memory"):
        cache.resize(8 * NBYTES)
    with pytest.raises(ValueError, match="give more"):
        cache.resize(1)
    assert cache.slots == 2
    load(cache, 0, some(1))


def test_resize_within_a_step_is_refused():
    cache, _ = make_cache()
    cache.layer(0).lookup(some(1))
    with pytest.raises(RuntimeError, match="layer 0 is computing"):
        cache.resize(8 * NBYTES)


def test_close_is_final_and_idempotent():
    cache, device = make_cache()
    load(cache, 0, some(1))
    assert len(device.pinned) == 2
    cache.close()
    cache.close()
    assert (device.closed, device.pinned, cache.slots, cache.resident.tolist()) == (1, [], 0, [0, 0])
    with pytest.raises(RuntimeError, match="closed"):
        cache.layer(0).lookup(some(1))


def test_a_forgotten_cache_gives_its_threads_back():
    """A model that is deleted without unpatch."""
    before = threading.active_count()
    cache = ExpertCache(open_device("emulated"), make_layers(), 4 * NBYTES)
    load(cache, 0, some(1))
    cache.layer(0).launch(X, one_token(some(1)), cache.layer(0).lookup(some(1))).result()
    assert threading.active_count() == before + 2
    del cache
    gc.collect()
    assert threading.active_count() == before


def test_two_hundred_cycles_leave_no_thread_behind():
    before = threading.active_count()
    for _ in range(200):
        cache = ExpertCache(open_device("emulated"), make_layers(), 4 * NBYTES)
        load(cache, 0, some(1))
        cache.layer(0).launch(X, one_token(some(1)), cache.layer(0).lookup(some(1))).result()
        cache.close()
    assert threading.active_count() == before


def test_an_exception_in_the_computation_reaches_the_caller_and_spares_the_cache():
    """The compute thread that dies with its error."""
    cache = ExpertCache(open_device("emulated"), make_layers(), 4 * NBYTES)
    try:
        load(cache, 0, some(1))
        slots = cache.layer(0).lookup(some(1))
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            cache.layer(0).launch(torch.ones(1, HIDDEN + 1), one_token(some(1)), slots).result()
        got = cache.layer(0).launch(X, one_token(some(1)), slots).result()
        assert torch.equal(got, expected(make_layers()[0], X, some(1)))
    finally:
        cache.close()


@pytest.mark.parametrize("inference", [True, False])
def test_emulation_works_across_inference_mode(inference):
    """A pool made in inference mode that the copy thread may not write, or an autograd graph that keeps it alive."""
    with torch.inference_mode(inference):
        cache = ExpertCache(open_device("emulated"), make_layers(), 4 * NBYTES)
    try:
        load(cache, 0, some(1))
        with torch.inference_mode(not inference):
            x = X.clone().requires_grad_(inference)
            got = cache.layer(0).launch(x, one_token(some(1)), cache.layer(0).lookup(some(1))).result()
        assert not got.requires_grad
        torch.testing.assert_close(got, expected(make_layers()[0], X, some(1)))
    finally:
        cache.close()


def test_counters_reset():
    cache, _ = make_cache()
    load(cache, 0, some(1))
    cache.counters.reset()
    assert SimpleNamespace(total=cache.counters.uploads.sum()).total == 0
