"""Recording of live routing: what the routers chose, and nothing that belongs to prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import moebius
from moebius.gpu_cache.policy import make_policy
from moebius.hf_plugin.tools.recording import Recorder, read_event_logs, recording, save_event_logs, start_event_logs
from tests import zoo

NEW = 6


def test_recorded_ids_are_the_routers(tmp_path: Path) -> None:
    """Rows are decode steps, layers in order, ids by descending weight: as stock's own router logits say."""
    model = zoo.build("qwen3_moe")
    prompt = zoo.inputs(model, batch=1, length=7)["input_ids"]
    logits: list[torch.Tensor] = []
    routers = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    hooks = [router.register_forward_hook(lambda _m, _i, out: logits.append(out[0])) for router in routers]
    moebius.patch(model, device="cpu")
    with recording(model) as recorder:
        for group in ("a", "b"):
            logits.clear()
            model.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
            assert recorder.end_sequence(group) == NEW - 1
    recorder.save(tmp_path / "trace.npz")
    for hook in hooks:
        hook.remove()
    saved = np.load(tmp_path / "trace.npz")
    k = saved["ids"].shape[2]
    expected = [row.topk(k).indices[0].tolist() for row in logits if len(row) == 1]
    assert saved["ids"][NEW - 1 :].reshape(-1, k).tolist() == expected
    assert saved["offsets"].tolist() == [0, NEW - 1, 2 * NEW - 2]
    assert saved["group"].tolist() == ["a", "b"]
    assert (int(saved["n_experts"]), int(saved["top_k"])) == (8, 2)
    np.testing.assert_allclose(saved["probs"].astype(np.float32).sum(-1), 1, atol=2e-3)


def test_recording_ends_with_the_block() -> None:
    """A recorder that stayed attached would grow for ever."""
    model = moebius.patch(zoo.build("qwen3_moe"), device="cpu")
    with recording(model) as recorder, torch.no_grad():
        model(torch.tensor([[5]]))
    with torch.no_grad():
        model(torch.tensor([[5]]))
    assert recorder.end_sequence("") == 1


def test_what_no_trace_can_hold_is_refused(tmp_path: Path) -> None:
    """Layers of different width, sentinels, and nothing at all."""
    with pytest.raises(ValueError, match="same number of experts"):
        Recorder([8, 4])
    recorder = Recorder([4])
    with pytest.raises(ValueError, match="nothing was recorded"):
        recorder.save(tmp_path / "x.npz")
    recorder.record(0, np.array([[1, 4]]), np.array([[0.5, 0.5]], np.float32))
    recorder.end_sequence("")
    with pytest.raises(ValueError, match="past the experts"):
        recorder.save(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="not patched"), recording(torch.nn.Linear(1, 1)):
        pass


@pytest.mark.parametrize("policy", ["default", "lru"])
def test_replay_repeats_what_live_execution_decided(policy: str, tmp_path: Path) -> None:
    """Decisions that depend on anything but ids, prices, chances and the order of completion, all of them on file."""
    model = zoo.build("qwen3_moe")
    moebius.patch(model, device="emulated", gpu_memory=0.3, cache_policy=policy, emulated_link=5.0)
    logs = start_event_logs(model)
    generator = torch.Generator().manual_seed(0)
    for length in [6, *[1] * 60]:
        with torch.no_grad():
            model(torch.randint(0, 50, (1, length), generator=generator))
    save_event_logs(tmp_path / "events.npz", logs)
    moebius.unpatch(model)
    [log] = read_event_logs(tmp_path / "events.npz")
    assert {event.name for event in log.events} >= {"used", "place", "reserve", "publish", "pin", "unpin"}
    assert sum(event.name == "used" for event in log.events) == 2 * 61, "a step of several tokens is one event"
    answers = log.repeat(make_policy(policy, log.experts))
    assert sum(int((slots >= 0).sum()) for slots in answers) > log.slots
    assert [slots.tolist() for slots in answers] == [slots.tolist() for slots in logs[0].placements]
    other = log.repeat(make_policy("lfu", log.experts))
    assert [slots.tolist() for slots in other] != [slots.tolist() for slots in answers]


def test_event_logs_of_nothing(tmp_path: Path) -> None:
    """A file of another kind, and a model without a cache."""
    np.savez(tmp_path / "x.npz", **{"0.shape": np.zeros(2)})
    with pytest.raises(ValueError, match="not an event log"):
        read_event_logs(tmp_path / "x.npz")
    model = moebius.patch(zoo.build("qwen3_moe"), device="cpu")
    with pytest.raises(ValueError, match="no cache"):
        start_event_logs(model)
