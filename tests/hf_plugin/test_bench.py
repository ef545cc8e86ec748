"""The benchmarks measure what they say: honest bytes, a checked result, variants in turn on an intact model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import moebius
from moebius.cpu_experts.executor import CpuExecutor
from moebius.hf_plugin.tools import bench_experts, bench_generate, generation, machine
from moebius.hf_plugin.tools.bench_experts import Shape
from moebius.kernels.experts import ExpertSpec, RecordLayout
from moebius.kernels.formats import FORMATS

TINY_MOE = Path(__file__).resolve().parents[1] / "data" / "tiny_moe"
SHAPE = Shape(experts=8, hidden=64, intermediate=32, top_k=2)
ROW_FIELDS = {
    *("format", "tokens", "threads", "isa", "median_us", "p20_us", "p80_us"),
    *("gbytes_per_s", "tflops", "stream_gbytes_per_s", "rel_error"),
}


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> int:
    """A machine with a last-level cache of 100 kB, so that few layers exceed it."""
    size = 100_000
    cpu = machine.Cpu("test", [], 1, 1, 1, [machine.Cache(1, 1000, 1), machine.Cache(3, size, 1)])
    monkeypatch.setattr(machine, "cpu", lambda: cpu)
    return size


def measure(shape: Shape = SHAPE, **settings: Any) -> list[bench_experts.Row]:
    tokens, formats = settings.pop("tokens", [1]), settings.pop("formats", ["fp32"])
    return list(bench_experts.run(shape, tokens, formats, settings.pop("threads", 1), repeats=2, **settings))


@pytest.mark.usefixtures("small_cache")
def test_experts_rows_have_the_documented_fields() -> None:
    rows = measure(tokens=[1, 3], formats=[*FORMATS])
    assert [(row.format, row.tokens) for row in rows] == [(name, n) for name in FORMATS for n in (1, 3)]
    assert set(asdict(rows[0])) >= ROW_FIELDS
    for row in rows:
        assert row.p20_us <= row.median_us <= row.p80_us
        assert row.gbytes_per_s > 0
        assert row.stream_gbytes_per_s > 0


@pytest.mark.parametrize("format", FORMATS)
def test_experts_cycle_over_more_memory_than_the_cache_holds(format: str, small_cache: int) -> None:
    """Layers that stay in the cache would show the cache's speed as the memory's."""
    [row] = measure(formats=[format])
    record = RecordLayout.of(ExpertSpec(SHAPE.hidden, SHAPE.intermediate), format).nbytes
    assert row.layers * SHAPE.experts * record >= 4 * small_cache
    assert (row.layers - 1) * SHAPE.experts * record < 4 * small_cache


@pytest.mark.usefixtures("small_cache")
def test_experts_refuse_layers_that_fit_the_cache() -> None:
    with pytest.raises(ValueError, match="honest figure"):
        measure(layers=1)


@pytest.mark.usefixtures("small_cache")
def test_experts_name_the_formats_there_are() -> None:
    with pytest.raises(ValueError, match=r"'int3'.*fp32, bf16, fp16"):
        measure(formats=["fp32", "int3"])


@pytest.mark.usefixtures("small_cache")
def test_experts_count_each_distinct_experts_bytes_once() -> None:
    """Counting every token's experts would multiply GB/s by the tokens that share them."""
    shape = Shape(experts=4, hidden=64, intermediate=32, top_k=4)  # every call uses all 4
    [row] = bench_experts.run(shape, [16], ["bf16"], 1, repeats=1)
    record = RecordLayout.of(ExpertSpec(64, 32), "bf16").nbytes
    assert row.gbytes_per_s * 1e9 * row.median_us * 1e-6 == pytest.approx(4 * record, rel=0.05)
    assert row.tflops * 1e12 * row.median_us * 1e-6 == pytest.approx(2 * 3 * 64 * 32 * 4 * 16, rel=0.05)


@pytest.mark.usefixtures("small_cache")
@pytest.mark.parametrize("format", FORMATS)
def test_experts_error_is_that_of_rounding(format: str) -> None:
    """Weights drawn in bf16 are exact in the float formats; others lose what their bits cannot hold, and show it."""
    [row] = measure(tokens=[80], formats=[format])
    bounds = {"bf16": (0.0, 0.006), "int8": (1e-3, 0.015), "int4": (0.05, 0.16)}
    bounds |= {"fp8": (0.02, 0.06), "mxfp4": (0.1, 0.25)}  # bf16: of intermediates
    least, most = bounds.get(format, (0.0, 1e-5))
    assert least <= row.rel_error <= most


@pytest.mark.usefixtures("small_cache")
def test_experts_error_shows_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast executor that computes nothing must not get a good row."""
    monkeypatch.setattr(CpuExecutor, "run", lambda self, store, x, routes, out: None)
    [row] = measure()
    assert row.rel_error == pytest.approx(1.0)


def test_experts_draw_distinct_ids_anew_for_every_call() -> None:
    """The same ids in every call would find their experts in the cache; doubled ids would count too few bytes."""
    random = np.random.default_rng(0)
    first, weights = bench_experts._draw(random, Shape(32, 8, 8, 6), 10)
    second, _ = bench_experts._draw(random, Shape(32, 8, 8, 6), 10)
    assert all(len(set(row)) == 6 for row in first.tolist())
    assert (first != second).any()
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)


def test_every_expert_has_weights_of_its_own() -> None:
    """Equal experts would hide a wrong expert id from the relative error."""
    source = bench_experts.RandomExperts(SHAPE)
    seen = {tuple(source.weights(layer, e).up.flatten()[:8].tolist()) for layer in range(3) for e in range(8)}
    assert len(seen) == 24
    again = bench_experts.RandomExperts(SHAPE).weights(1, 3)
    assert torch.equal(again.down, source.weights(1, 3).down)


@pytest.mark.parametrize("text", ["1,2,3", "a,b,c,d", "8,64,32,9", "0,64,32,1", ""])
def test_shapes_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="shape"):
        Shape.parse(text)


@pytest.fixture(scope="module")
def tiny_moe() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompt(tiny_moe: PreTrainedModel) -> torch.Tensor:
    return bench_generate.make_prompt(str(TINY_MOE), tiny_moe, 12)


@pytest.mark.slow
def test_generate_measures_variants_in_turn(
    tiny_moe: PreTrainedModel, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round by round: if each variant ran in one block, a busy minute would hit one of them only."""
    visits, generate = [], bench_generate.generate_greedily

    def spy(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int) -> generation.Generation:
        visits.append(moebius.stats(model).device if moebius.is_patched(model) else "stock")
        return generate(model, ids, new_tokens)

    monkeypatch.setattr(bench_generate, "generate_greedily", spy)
    options = {"gpu_memory": 0.25, "cpu_threads": 1}
    rows = bench_generate.run(tiny_moe, prompt, ["stock", "cpu", "emulated"], 4, 2, options)
    assert visits == ["stock", *2 * ("stock", "stock", "cpu", "cpu", "emulated", "emulated")]
    assert not moebius.is_patched(tiny_moe)
    assert [row.variant for row in rows] == ["stock", "cpu", "emulated"]
    assert all(row.same_tokens and row.first_difference is None for row in rows)
    assert all(row.ttft_s > 0 and row.p20 <= row.p80 and row.peak_rss_bytes > 1e8 for row in rows)
    assert [row.hits is None for row in rows] == [True, False, False]
    assert rows[1].hits == 0
    assert rows[2].hits


def test_generate_writes_a_trace_of_the_patched_variants(
    tiny_moe: PreTrainedModel, prompt: torch.Tensor, tmp_path: Path
) -> None:
    """A trace of stock, which has no experts to show; an overlap without its steps; rows that JSON cannot hold."""
    file, options = tmp_path / "trace.json", {"gpu_memory": 0.25, "cpu_threads": 1}
    rows = bench_generate.run(tiny_moe, prompt, ["stock", "cpu", "emulated"], 4, 1, options, trace=file)
    events = json.loads(file.read_text())["traceEvents"]
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["cpu", "emulated"]
    assert sum(e.get("cat") == "steps" for e in events) == 2 * 3
    assert rows[0].overlap is None
    for row in rows[1:]:
        assert row.overlap.step_ms > 0 < row.overlap.empty_ms
        assert row.overlap.cpu_ms > 0
    assert rows[1].overlap.device_ms == 0 < rows[2].overlap.device_ms
    json.dumps([asdict(row) for row in rows], allow_nan=False)


@pytest.mark.slow
def test_generate_measures_expert_formats_beside_stock(
    tiny_moe: PreTrainedModel, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: `cpu:int4` runs in the model's own format, or gives its rounded weights to the variants after it."""
    before, used, patch = {n: w.clone() for n, w in tiny_moe.state_dict().items()}, [], moebius.patch

    def spy(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
        patch(model, **options)
        [layer, *_] = (m.__dict__["_moebius"] for m in model.modules() if "_moebius" in m.__dict__)
        used.append(layer.held.store.layout.format)
        return model

    monkeypatch.setattr(moebius, "patch", spy)
    options = {"cpu_threads": 1, "expert_format": "bf16"}
    rows = bench_generate.run(tiny_moe, prompt, ["stock", "cpu:int4", "cpu", "cpu:fp32"], 4, 2, options)
    assert used == ["int4", "bf16", "fp32"] * 2
    assert [row.expert_format for row in rows] == ["fp32", "int4", "bf16", "fp32"]
    assert rows[-1].same_tokens
    assert all(torch.equal(weight, before[name]) for name, weight in tiny_moe.state_dict().items())


def test_generate_shows_a_variant_that_writes_another_text(
    tiny_moe: PreTrainedModel, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A speed without its text compared proves nothing: a broken variant must be seen in its row."""
    generate = bench_generate.generate_greedily

    def broken(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int) -> generation.Generation:
        found = generate(model, ids, new_tokens)
        if moebius.is_patched(model):
            found.tokens[2] += 1
        return found

    monkeypatch.setattr(bench_generate, "generate_greedily", broken)
    stock, cpu = bench_generate.run(tiny_moe, prompt, ["stock", "cpu"], 4, 1, {"cpu_threads": 1})
    assert stock.same_tokens
    assert (cpu.same_tokens, cpu.first_difference) == (False, 2)
    assert cpu.stock_margin is not None


def test_generate_leaves_the_model_unpatched_after_an_error(
    tiny_moe: PreTrainedModel, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_generate, "_one_round", fail)
    with pytest.raises(KeyboardInterrupt):
        bench_generate.run(tiny_moe, prompt, ["cpu"], 4, 1, {"cpu_threads": 1})
    assert not moebius.is_patched(tiny_moe)


@pytest.mark.parametrize(
    ("variants", "new_tokens", "rounds"),
    [
        *((["stock", name], 4, 1) for name in ("fast", "fast:int4", "cpu:int3", "cpu:", "stock:int4")),
        *(([], 4, 1), (["stock"], 1, 1), (["stock"], 4, 0)),
    ],
)
def test_generate_refuses_settings_before_loading(variants: list[str], new_tokens: int, rounds: int) -> None:
    with pytest.raises(ValueError, match=r"variants? |decode speed"):
        bench_generate.check_settings(variants, new_tokens, rounds)


def test_prompt_has_the_length_that_was_asked_for(tiny_moe: PreTrainedModel, tmp_path: Path) -> None:
    for tokens in (1, 500, 20_000):
        assert bench_generate.make_prompt(str(TINY_MOE), tiny_moe, tokens).shape == (1, tokens)
    assert bench_generate.make_prompt(str(tmp_path), tiny_moe, 9).shape == (1, 9)  # no tokenizer there


def test_config_without_weights_gets_random_ones(tiny_moe: PreTrainedModel, tmp_path: Path) -> None:
    """Shapes too large to download can be timed; two loads must be the same model."""
    tiny_moe.config.save_pretrained(tmp_path)
    one, two = (bench_generate.load(str(tmp_path), "float32").state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("gap", "tie"), [(5e-5, True), (2e-4, False)])
def test_a_tie_is_where_stock_is_undecided(gap: float, tie: bool) -> None:
    """A wrong token must not pass as a tie, and rounding between equal logits must not fail the demo."""

    class Stock(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, ids: torch.Tensor) -> Any:
            assert ids.tolist() == [[7, 7, 1]]  # the prompt and the tokens before the difference
            return type("Output", (), {"logits": torch.tensor([[[0.0, 1.0, 1.0 - gap]]])})

    found = generation.compare_with_stock(Stock(), torch.tensor([[7, 7]]), [1, 1, 0], [1, 2, 0])  # type: ignore[arg-type]
    assert (found.same, found.first_difference, found.tie) == (False, 1, tie)
    assert generation.compare_with_stock(Stock(), torch.tensor([[7]]), [1, 2], [1, 2]).same  # type: ignore[arg-type]
