"""The command `moebius`: one JSON document on stdout, errors that say what to do, a demo that can fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import moebius
from moebius.hf_plugin.cli import app as cli
from moebius.hf_plugin.cli import bench, demo
from moebius.hf_plugin.profile import read_profile
from moebius.hf_plugin.running import expert_files
from moebius.hf_plugin.tools import doctor, generation, machine, memory_read
from moebius.kernels.formats import FORMATS

SMALL_EXPERTS = ["bench", "experts", "--shape", "8,64,32,2", "--threads", "1", "--repeats", "2"]
SMALL_GENERATE = [
    "bench",
    "generate",
    "--dtype",
    "float32",
    "--prompt-tokens",
    "8",
    "--new-tokens",
    "3",
    "--rounds",
    "1",
]


TINY = str(generation.require_model(None))


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "160"})


def exit_status(*arguments: str) -> int:
    """Run `main` as a shell does, to its exit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["moebius", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A last-level cache so small that measurements take milliseconds."""
    cpu = machine.Cpu("test", [], 1, 1, 1, [machine.Cache(3, 100_000, 1)])
    monkeypatch.setattr(machine, "cpu", lambda: cpu)
    monkeypatch.setattr(doctor, "read_bandwidth", lambda threads, _: memory_read.read_bandwidth(threads, 1 << 20, 1))


def test_help_names_what_works_today() -> None:
    """A command that is listed and does nothing is worse than none."""
    text = invoke("--help").stdout
    assert all(name in text for name in ("demo", "doctor", "bench", "warmup", "trace", "replay", "convert"))
    assert not any(name in text for name in ("serve", "chat"))
    assert invoke("--version").stdout.strip() == f"moebius {moebius.__version__}"


@pytest.mark.usefixtures("small_machine")
@pytest.mark.parametrize(
    ("arguments", "kind"),
    [(["doctor"], dict), (SMALL_EXPERTS, list), (SMALL_GENERATE, list)],
    ids=lambda a: str(a)[:30],
)
def test_json_is_the_only_thing_on_stdout(arguments: list[str], kind: type) -> None:
    """A progress bar or a warning on stdout breaks every script that reads the document."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert isinstance(json.loads(result.stdout), kind)


@pytest.mark.usefixtures("small_machine")
def test_doctor_says_what_memory_bounds_have_left_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches gigabytes in a hidden folder of which nobody knows."""
    monkeypatch.setattr(expert_files, "cache_root", lambda: tmp_path)
    assert "expert cache empty" in _text("doctor")
    (tmp_path / "experts").mkdir()
    (tmp_path / "experts" / "old-123.safetensors").write_bytes(bytes(20_000_000))
    text = _text("doctor")
    assert "expert cache 0.02 GB in" in text
    assert "(1 files, 1 of them of checkpoints that are gone or have changed)" in text
    [file] = json.loads(invoke("doctor", "--json").stdout)["expert_cache"]
    assert (file["nbytes"], file["usable"]) == (20_000_000, False)


def _text(*arguments: str) -> str:
    """What a command prints, without lines of tables."""
    return " ".join(invoke(*arguments).stdout.replace("│", " ").split())


@pytest.mark.usefixtures("small_machine")
def test_doctor_prints_what_falls_back() -> None:
    text = " ".join(invoke("doctor").stdout.split())
    assert "What Moebius will use" in text
    assert "GB/s with 1 threads (measured)" in text


@pytest.mark.usefixtures("small_machine")
def test_bench_tables_name_their_units() -> None:
    text = invoke(*SMALL_EXPERTS, "--format", "fp32,bf16").stdout
    assert "GB/s" in text
    assert "bf16" in text
    text = invoke(*SMALL_GENERATE, "--variants", "stock,cpu").stdout
    assert "tokens/s" in text
    assert "cpu" in text


@pytest.mark.usefixtures("small_machine")
def test_results_file_says_where_they_come_from(tmp_path: Path) -> None:
    """Numbers without machine, versions and settings cannot be compared later."""
    file = tmp_path / "results" / "generate.json"
    result = invoke(*SMALL_GENERATE, "--variants", "stock,emulated", "--json", "--out", str(file))
    document = json.loads(file.read_text())
    assert document["rows"] == json.loads(result.stdout)
    assert document["settings"]["gpu_memory"] == "25%"
    assert document["settings"]["model"] == "tiny_moe"
    assert document["versions"]["torch"]
    assert document["cpu"]["model"] == "test"
    assert document["rows"][1]["hits"] + document["rows"][1]["misses"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*SMALL_EXPERTS, "--format", "int3"], "fp32, bf16, fp16"),
        (["bench", "experts", "--shape", "1,2"], "E,H,I,K"),
        (["bench", "experts", "--tokens", "1,x"], "--tokens"),
        (["bench", "generate", "--variants", "stock,fast"], "fast"),
        (["bench", "generate", "--variants", "stock,cpu:int3"], "int4"),
        (["bench", "generate", "--expert-format", "int3", "--model", "./nowhere"], "int3"),
        (["bench", "generate", "--model", "./nowhere"], "./nowhere"),
        ([*SMALL_GENERATE, "--variants", "cpu", "--gpu-memory", "lots"], "lots"),
        (["demo", "--model", "/nowhere"], "/nowhere"),
    ],
    ids=["format", "shape", "tokens", "variant", "its format", "experts' format", "model", "memory", "demo model"],
)
def test_mistakes_are_said_in_one_line(arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A traceback buries the remedy."""
    status = exit_status(*arguments)
    output = capfd.readouterr()
    assert status == 2
    assert words in " ".join(output.err.split())
    assert "Traceback" not in output.err
    assert output.out == ""


def test_errors_of_other_libraries_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ValueError out of torch is a bug of ours: without the traceback nobody can report it."""
    monkeypatch.setattr(sys, "argv", ["moebius", *SMALL_GENERATE])
    monkeypatch.setattr("moebius.hf_plugin.tools.bench_generate.load", lambda path, dtype: torch.zeros(2).view(3))
    with pytest.raises(RuntimeError, match="shape"):
        cli.main()


@pytest.mark.parametrize(("text", "value"), [("25%", "25%"), ("0.25", 0.25), ("1000", 1000), ("auto", "auto")])
def test_memory_options_mean_what_they_mean_in_python(text: str, value: Any) -> None:
    """As text, "0.25" would be refused; as a float, 1000 would be a fraction above 1."""
    found = bench._memory(text)
    assert (found, type(found)) == (value, type(value))


def test_demo_outside_a_checkout_asks_for_a_model(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generation, "default_model", lambda: None)
    assert exit_status("demo") == 2
    assert "--model" in capfd.readouterr().err


def test_demo_shows_the_same_text_and_where_experts_ran() -> None:
    result = invoke("demo", "--new-tokens", "6")
    assert result.exit_code == 0, result.output
    assert "6 of 6 tokens" in result.stdout
    assert "tokens/s" in result.stdout
    assert "uploads" in result.stdout
    assert "byte for byte" in result.stdout


@pytest.mark.parametrize(("margin", "status", "words"), [(1.0, 1, "this is a bug"), (1e-6, 0, "a tie")])
def test_demo_fails_where_the_text_differs(
    margin: float, status: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A demo that cannot fail shows nothing; a tie is reported, and is no failure."""
    different = generation.Agreement(first_difference=2, margin=margin)
    monkeypatch.setattr(demo, "compare_with_stock", lambda *_: different)
    result = invoke("demo", "--new-tokens", "3")
    assert result.exit_code == status
    assert words in " ".join(result.stdout.split())


def test_demo_fails_where_a_weight_is_not_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    unpatch = moebius.unpatch

    def careless(model: Any) -> Any:
        with torch.no_grad():
            next(unpatch(model).parameters()).flatten()[0] += 1
        return model

    monkeypatch.setattr(demo, "moebius", SimpleNamespace(**{n: getattr(moebius, n) for n in moebius.__all__}))
    monkeypatch.setattr(demo.moebius, "unpatch", careless)
    result = invoke("demo", "--new-tokens", "3")
    assert result.exit_code == 1
    assert "weights differ" in " ".join(result.stdout.split())


def test_weights_are_compared_bit_by_bit() -> None:
    """-0.0 equals 0.0 and NaN differs from itself: only bits tell whether a weight is the same."""
    nan = {"w": torch.tensor([float("nan"), 0.0])}
    assert demo._equal_bytes(nan, {"w": nan["w"].clone()})
    assert not demo._equal_bytes(nan, {"w": torch.tensor([float("nan"), -0.0])})
    assert not demo._equal_bytes(nan, {})
    assert not demo._equal_bytes(nan, {"w": nan["w"].double()})


def test_warmup_compiles_every_format(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One row a format; a model's own format alone where a model is named."""

    def kernels(*arguments: str) -> list[str]:
        return [row["kernels"] for row in json.loads(invoke("warmup", *arguments, "--json").stdout)]

    rest = ["dense layers", "cache"]
    assert kernels() == [*FORMATS, *rest]
    assert kernels(TINY) == ["bf16", *rest]
    assert kernels(str(Path(TINY) / "config.json")) == ["bf16", *rest]  # a model that is not here yet
    assert kernels(TINY, "--expert-format", "int8, fp32") == ["int8", "fp32", *rest]
    assert "unknown" in str(invoke("warmup", "--expert-format", "int3").exception)


def test_warmup_tunes_a_named_model_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tuning that never happens, happens twice, or for a format that was not asked for; here by a fake timer."""
    from moebius.hf_plugin.cli import warmup
    from moebius.kernels.triton import choice, tuning
    from moebius.kernels.triton.config import DecodeTile

    monkeypatch.setenv("MOEBIUS_CACHE_DIR", str(tmp_path))
    choice.tuned.cache_clear()
    monkeypatch.setattr(warmup, "default_device", lambda: "cuda")
    monkeypatch.setattr(choice, "device_name", lambda device: "NVIDIA Imaginary")
    monkeypatch.setattr(tuning, "device_timer", lambda *_: lambda tokens: lambda tile: 3.0)
    arguments = ("warmup", TINY, "--expert-format", "int4", "--json")
    first, second = ([row for row in json.loads(invoke(*arguments).stdout) if "tile" in row] for _ in range(2))
    choice.tuned.cache_clear()
    assert [row["kernels"] for row in first] == [f"int4 gated 128 64 {name}" for name in ("decode", "batch", "prompt")]
    assert tuple(first[0]["tile"]) == DecodeTile._fields
    assert second == []


def test_trace_is_read_by_replay(tmp_path: Path) -> None:
    """What one command writes the other takes."""
    (tmp_path / "code.txt").write_text("import os\n\ndef read(path):\n")
    trace, prompts = str(tmp_path / "trace.npz"), str(tmp_path / "code.txt")
    profile = str(tmp_path / "profile.safetensors")
    options = ("--new-tokens", "8", "--device", "cpu", "--profile", profile)
    done = invoke("trace", TINY, "--prompts", prompts, "--out", trace, *options)
    assert len(read_profile(profile).habits) == 6
    assert done.exit_code == 0, done.output
    document = json.loads(invoke("replay", trace, "--capacity", "0.25", "--policy", "lru", "--json").stdout)
    assert 0 < document["rows"][0]["hit_rate"] < document["bound"]["hit_rate"] < 1
    (tmp_path / "code.txt").write_text("\n")
    refused = invoke("trace", TINY, "--prompts", prompts, "--out", trace)
    assert "no prompts" in str(refused.exception)
