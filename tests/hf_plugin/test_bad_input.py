"""Whatever is wrong with a model, an option or a call has a defined result, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import moebius
from tests import zoo
from tests.hf_plugin import helpers
from tests.hf_plugin.helpers import EMULATED, assert_close, everywhere, logits, patched, prompt, unchanged

PLACES = ({"device": "cpu"}, EMULATED)


# ---- options

EXPERT_BYTES = 3 * 64 * 32 * 4  # of zoo's qwen3_moe in float32

BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"gpu_memory": EXPERT_BYTES - 1}, ValueError, r"less than one expert .*give more"),
    ({"gpu_memory": "5%"}, ValueError, r"gpu_memory='5%' is 19,660 bytes, less than one expert .*give more"),
    ({"gpu_memory": -1}, ValueError, r"memory -1 .*use bytes"),
    ({"gpu_memory": 0}, ValueError, r"memory 0 .*use bytes"),
    ({"gpu_memory": 0.0}, ValueError, r"memory 0\.0 .*use bytes"),
    ({"gpu_memory": 1.5}, ValueError, r"memory 1\.5 .*fraction in \(0, 1\]"),
    ({"gpu_memory": float("nan")}, ValueError, r"memory nan .*use bytes"),
    ({"gpu_memory": "lots"}, ValueError, r"memory 'lots' .*\"8GiB\""),
    ({"gpu_memory": "-3GiB"}, ValueError, r"memory '-3GiB' .*use bytes"),
    ({"gpu_memory": "150%"}, ValueError, r"memory .*use bytes"),
    ({"gpu_memory": "%"}, ValueError, r"memory '%' .*use bytes"),
    ({"gpu_memory": ""}, ValueError, r"memory '' .*use bytes"),
    ({"gpu_memory": None}, ValueError, r"memory None .*use bytes"),
    ({"gpu_memory": True}, ValueError, r"memory True .*use bytes"),
    ({"gpu_memory": [1]}, ValueError, r"memory \[1\] .*use bytes"),
    ({"cpu_memory": "many"}, ValueError, r"memory 'many' .*\"8GiB\""),
    ({"cpu_memory": 0.9}, ValueError, r"cpu_memory=0\.9 is 353,894 bytes, .*take 393,216: .*from_pretrained"),
    ({"cache_policy": "fifo"}, ValueError, r"cache_policy='fifo' is unknown; use one of lru"),
    ({"predictor": "oracle"}, ValueError, r"predictor='oracle' is unknown; use one of blend, next_gate_residual"),
    ({"expert_format": "int3"}, ValueError, r"expert_format='int3' is unknown; use one of native"),
    ({"expert_format": None}, ValueError, r"expert_format=None is unknown; use one of native"),
    ({"device": "tpu"}, ValueError, r"device='tpu' is unknown; use \"auto\""),
    ({"device": "cuda:x"}, ValueError, r"device='cuda:x' is unknown; use"),
    ({"device": "emulated:1"}, ValueError, r"device='emulated:1' is unknown; use"),
    ({"device": "cuda:"}, ValueError, r"device='cuda:' is unknown; use"),
    ({"device": None}, ValueError, r"device=None is unknown; use"),
    ({"cpu_threads": "4"}, ValueError, r"cpu_threads='4' must be at least 1"),
    ({"cpu_threads": 2.5}, ValueError, r"cpu_threads=2\.5 must be at least 1"),
    ({"prefetch": "no"}, ValueError, r"prefetch='no' must be True or False"),
    ({"keep_original": None}, ValueError, r"keep_original=None must be True or False"),
    ({"emulated_link": "fast"}, ValueError, r"emulated_link='fast' must be a positive"),
    ({"cpu_threads": 0}, ValueError, r"cpu_threads=0 must be at least 1"),
    ({"cpu_threads": 10**6}, ValueError, r"cpu_threads=1000000 must be .* at most 1024"),
    ({"cpu_threads": True}, ValueError, r"cpu_threads=True must be at least 1"),
    ({"emulated_link": 0}, ValueError, r"emulated_link=0 must be a positive"),
    ({"emulated_link": -2.0}, ValueError, r"emulated_link=-2\.0 must be a positive"),
    ({"emulated_link": float("nan")}, ValueError, r"emulated_link=nan must be a positive"),
    ({"gpu_mem": 1}, TypeError, r"unknown option 'gpu_mem'; did you mean 'gpu_memory'\? Options are device"),
    ({"expert_format": "bf16"}, ValueError, r"would change weights .*keep_original=True"),
    ({"expert_format": "fp16"}, ValueError, r"would change weights .*keep_original=True"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD_OPTIONS, ids=[str(o) for o, _, _ in BAD_OPTIONS])
def test_bad_options(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    """Catches an option that is ignored or fails late, and a message without cause and remedy."""
    model = zoo.build("qwen3_moe")
    with unchanged(model), pytest.raises(kind, match=message):
        moebius.patch(model, **(EMULATED | options))
    assert not moebius.is_patched(model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_cuda_without_cuda(device: str) -> None:
    """Catches a silent fallback to the CPU."""
    model = zoo.build("qwen3_moe")
    with unchanged(model), pytest.raises(RuntimeError, match=r"(?i)device=.*(cpu|auto|emulated)"):
        moebius.patch(model, device=device)


def test_a_budget_larger_than_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an allocation beyond the device's memory, at patch and at resize."""
    from moebius.gpu_cache.emulated import EmulatedDevice

    model = zoo.build("qwen3_moe")
    monkeypatch.setattr(EmulatedDevice, "free_memory", lambda self: 5 * EXPERT_BYTES)
    with unchanged(model):
        for budget in (1.0, "100000GiB", 6 * EXPERT_BYTES):
            with pytest.raises(ValueError, match=r"asks for .* are free on emulated; give less, or 'auto'"):
                moebius.patch(model, device="emulated", gpu_memory=budget)
        with pytest.raises(ValueError, match=r"finds no room for experts: .*give gpu_memory, or device='cpu'"):
            moebius.patch(model, device="emulated", gpu_memory="auto")
    moebius.patch(model, device="emulated", gpu_memory=4 * EXPERT_BYTES)
    with pytest.raises(ValueError, match=r"asks for .* give less"):
        moebius.resize(model, gpu_memory=1.0)
    assert moebius.stats(model).slots == 4
    moebius.unpatch(model)


def test_a_budget_larger_than_the_experts() -> None:
    """Catches slots that no expert will ever fill, and a refusal of what simply holds everything."""
    model = zoo.build("qwen3_moe")
    with patched(model, device="emulated", gpu_memory="100000GiB"):
        stats = moebius.stats(model)
        assert stats.slots == 16
        assert stats.cache_bytes == stats.expert_bytes == 16 * EXPERT_BYTES


# ---- models


@pytest.mark.parametrize("options", PLACES, ids=["cpu", "emulated"])
def test_a_dense_model(options: dict[str, Any]) -> None:
    """Catches a patch that does nothing and says nothing."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, **sizes))
    message = "LlamaForCausalLM has no routed experts: it is a dense model, which runs as it is"
    with unchanged(model), pytest.raises(ValueError, match=message):
        moebius.patch(model, **options)


@everywhere
def test_a_patched_model(options: dict[str, Any]) -> None:
    """Catches a second patch that takes over the first, after which nothing could be restored."""
    model = zoo.build("qwen3_moe")
    ids, before = prompt(model), helpers.weights(model)
    want = logits(model, ids)
    with patched(model, **options):
        with pytest.raises(ValueError, match=r"already patched; call moebius\.unpatch\(model\) first"):
            moebius.patch(model, **options)
        assert_close(logits(model, ids), want)
    helpers.assert_same_weights(model, before)


@pytest.mark.parametrize("use", [moebius.patch, moebius.unpatch, moebius.is_patched, moebius.stats])
def test_what_is_no_model(use: Callable[[Any], Any]) -> None:
    """Catches an AttributeError from somewhere inside for a pipeline, or the name of a model."""
    with pytest.raises(TypeError, match=r"a str is no model: give the torch module.*from_pretrained"):
        use("Qwen/Qwen3-30B-A3B")


def test_what_needs_a_patched_model() -> None:
    """Catches functions that fail on a stock model with an unrelated error."""
    model = zoo.build("qwen3_moe")
    calls = (moebius.unpatch, moebius.stats, moebius.reset_stats, lambda m: moebius.resize(m, gpu_memory=0.5))
    with unchanged(model):
        for call in calls:
            with pytest.raises(ValueError, match="the model is not patched"):
                call(model)
    assert not moebius.is_patched(model)


def test_resize_of_a_model_without_cache() -> None:
    """Catches a budget that is accepted and ignored."""
    model = zoo.build("qwen3_moe")
    with (
        patched(model, device="cpu"),
        pytest.raises(ValueError, match="has no cache to resize; patch it with a device"),
    ):
        moebius.resize(model, gpu_memory=0.5)


def test_a_model_on_meta() -> None:
    """Catches a patch that copies nothing and leaves a model of random experts."""
    with torch.device("meta"):
        model = zoo.build("qwen3_moe").to("meta")
    message = r"has no data: gate_up_proj is on the meta device; load the weights before patching"
    with pytest.raises(ValueError, match=message):
        moebius.patch(model, device="cpu")
    assert not moebius.is_patched(model)


def test_experts_on_meta_alone() -> None:
    """Catches a check of the first parameters only."""
    model = zoo.build("qwen3_moe")
    model.model.layers[1].mlp.experts.to("meta")
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.experts' has no data"):
        moebius.patch(model, device="cpu")
    assert not moebius.is_patched(model)


def test_experts_split_by_tensor_parallelism() -> None:
    """Catches a local shard that is taken for all of the weights."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = zoo.build("qwen3_moe")
    [experts, *_] = helpers.experts_modules(model)
    whole = experts.down_proj
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        experts.down_proj = nn.Parameter(distribute_tensor(whole.data, mesh, [Shard(0)]))
        with pytest.raises(ValueError, match=r"split over processes .* without tp_plan"):
            moebius.patch(model, device="cpu")
        assert not moebius.is_patched(model)
        experts.down_proj = whole
    finally:
        dist.destroy_process_group()
    with patched(model, device="cpu"):
        assert moebius.is_patched(model)


def test_expert_parallelism() -> None:
    """Catches experts whose ids mean another range on each process."""
    model = zoo.build("qwen3_moe")
    helpers.experts_modules(model)[1]._is_expert_parallel = True
    with unchanged(model), pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts' is split over processes"):
        moebius.patch(model, device="cpu")


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.float64, r"stores gate_up_proj as torch\.float64; supported are fp32, bf16 and fp16"),
        (torch.float8_e4m3fn, r"stores gate_up_proj as torch\.float8_e4m3fn; supported are fp32"),
    ],
)
def test_experts_of_another_dtype(dtype: torch.dtype, message: str) -> None:
    """Catches weights that are converted with loss, or read as something else."""
    model = zoo.build("qwen3_moe")
    [experts, *_] = helpers.experts_modules(model)
    experts.gate_up_proj.data = experts.gate_up_proj.data.to(dtype)
    experts.down_proj.data = experts.down_proj.data.to(dtype)
    with unchanged(model), pytest.raises(ValueError, match=message):
        moebius.patch(model, device="cpu")


def test_experts_of_mixed_dtypes() -> None:
    """Catches a down projection that is stored in the dtype of the gates."""
    model = zoo.build("qwen3_moe")
    [experts, *_] = helpers.experts_modules(model)
    experts.down_proj.data = experts.down_proj.data.bfloat16()
    with unchanged(model), pytest.raises(ValueError, match="mixes dtypes in its expert weights; convert them to one"):
        moebius.patch(model, device="cpu")


# ---- calls


class Calls:
    """One experts module, to be called directly; `reference` computes each route on its own in float64."""

    def __init__(self) -> None:
        self.model = zoo.build("qwen3_moe")
        [self.experts, *_] = helpers.experts_modules(self.model)
        self.weights = [p.detach().double() for p in (self.experts.gate_up_proj, self.experts.down_proj)]
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(6, 64, generator=generator)
        self.ids = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(6)])
        self.scale = torch.rand(6, 2, generator=generator)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        return self.experts(self.x, self.ids, self.scale)

    def reference(self) -> Tensor:
        out = torch.zeros(self.x.shape, dtype=torch.float64)
        for token, (ids, scale) in enumerate(zip(self.ids.tolist(), self.scale.double(), strict=True)):
            for expert, weight in zip(ids, scale, strict=True):
                if 0 <= expert < 8 and weight != 0:
                    gate, up = (self.weights[0][expert] @ self.x[token].double()).chunk(2)
                    out[token] += weight * (self.weights[1][expert] @ (nn.functional.silu(gate) * up))
        return out

    def check(self) -> None:
        """Cold and warm: the first call misses, later ones hit."""
        want = self.reference().float()
        for _ in range(3):
            assert_close(self(), want)


@pytest.fixture(params=PLACES, ids=["cpu", "emulated"])
def calls(request: pytest.FixtureRequest) -> Iterator[Calls]:
    calls = Calls()
    with patched(calls.model, **request.param):
        yield calls
    before = zoo.build("qwen3_moe").state_dict()
    helpers.assert_same_weights(calls.model, before)


def test_plain_call(calls: Calls) -> None:
    """The reference of the tests below is itself right."""
    calls.check()


@pytest.mark.parametrize("bad", [-2, 9, 1 << 31, -(1 << 40)])
def test_ids_out_of_range_raise_and_leave_all_usable(calls: Calls, bad: int) -> None:
    """Catches a read beyond the records, and pins or locks that an error leaves behind."""
    good = calls.ids.clone()
    calls.ids[3, 1] = bad
    for _ in range(2):
        with pytest.raises(ValueError, match=r"0\.\.7 exist \(-1 and 8 mean no expert\)"):
            calls()
    calls.ids = good
    calls.check()
    logits(calls.model, prompt(calls.model))


def test_sentinels_mean_no_expert(calls: Calls) -> None:
    """Catches an expert that is computed for -1 or E, in part of a row or in all of it."""
    calls.ids[0, 0], calls.ids[1, 1], calls.ids[2] = -1, 8, torch.tensor([8, -1])
    calls.check()
    assert (calls()[2] == 0).all()
    calls.ids = torch.full_like(calls.ids, 8)
    assert (calls() == 0).all()


def test_duplicates_add_up(calls: Calls) -> None:
    """Catches an expert that counts once where a token has it twice."""
    calls.ids[:, 1] = calls.ids[:, 0]
    calls.check()


def test_one_expert_for_all(calls: Calls) -> None:
    """Catches batching by expert that assumes several."""
    calls.ids = torch.full_like(calls.ids, 7)
    calls.check()


def test_zero_tokens(calls: Calls) -> None:
    """Catches kernels launched on nothing."""
    calls.x, calls.ids, calls.scale = calls.x[:0], calls.ids[:0], calls.scale[:0]
    for _ in range(2):
        assert calls().shape == (0, 64)


def test_ids_and_weights_of_other_types(calls: Calls) -> None:
    """Catches int32 ids or float64 weights that are read as another type."""
    calls.ids, calls.scale = calls.ids.int(), calls.scale.double()
    calls.check()
    calls.scale = calls.scale.bfloat16()
    calls.check()


def test_strided_inputs(calls: Calls) -> None:
    """Catches kernels that take any tensor for contiguous."""
    calls.x = torch.stack([calls.x, calls.x], -1)[..., 0]
    calls.ids, calls.scale = calls.ids.T.contiguous().T, calls.scale.T.contiguous().T
    assert not calls.x.is_contiguous()
    calls.check()


def test_shapes_that_do_not_match(calls: Calls) -> None:
    """Catches routes of another number of tokens."""
    scale, calls.scale = calls.scale, calls.scale[:, :1]
    with pytest.raises(ValueError, match=r"must have the same shape \[T, k\]"):
        calls()
    calls.scale = scale
    calls.check()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_in_hidden_states(value: float, calls: Calls) -> None:
    """Catches a NaN that spreads to other tokens, or that disappears: the pattern must be stock's."""
    calls.x[1, 5], calls.x[4] = value, value
    stock = zoo.build("qwen3_moe")
    with torch.no_grad():
        want = helpers.experts_modules(stock)[0](calls.x, calls.ids, calls.scale)
    assert want.isnan().any(dim=-1).tolist() == [False, True, False, False, True, False]
    for _ in range(3):
        got = calls()
        assert torch.equal(got.isnan(), want.isnan())
        assert_close(got[[0, 2, 3, 5]], want[[0, 2, 3, 5]])


def test_nan_in_a_weight_of_the_router(calls: Calls) -> None:
    """Catches a NaN routing weight that is treated like zero."""
    calls.scale[2, 0] = float("nan")
    got = calls()
    assert got[2].isnan().all()
    assert not got[[0, 1, 3, 4, 5]].isnan().any()


@everywhere
def test_a_broken_expert_is_not_felt_at_weight_zero(options: dict[str, Any]) -> None:
    """Catches 0 * NaN: an expert of NaN weights must not reach tokens that give it no weight."""
    calls = Calls()
    with torch.no_grad():
        calls.experts.down_proj[3] = float("nan")
    calls.ids = torch.tensor([[0, 3], [3, 1], [2, 4], [3, 3], [5, 3], [6, 7]])
    calls.scale = torch.where(calls.ids == 3, 0.0, calls.scale)
    want = calls.reference().float()
    with patched(calls.model, **options):
        for _ in range(3):
            assert_close(calls(), want)
        calls.scale[0, 1] = 0.5
        assert calls()[0].isnan().all()


@everywhere
def test_nan_in_a_whole_model(options: dict[str, Any]) -> None:
    """Catches a NaN that crosses from one sequence of a batch to another, through routing, cache or prediction."""
    model = zoo.build("qwen3_moe")
    ids = prompt(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[ids[1, 4]] = float("nan")
    ids[0] = torch.where(ids[0] == ids[1, 4], 5, ids[0])
    want = logits(model, ids)
    assert want[1].isnan().any()
    assert not want[0].isnan().any()
    with patched(model, **options):
        for _ in range(2):
            got = logits(model, ids)
            assert torch.equal(got.isnan(), want.isnan())
            assert_close(got[0], want[0])
        logits(model, ids[:1])
