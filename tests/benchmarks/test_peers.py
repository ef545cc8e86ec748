"""Recording and drawing other engines' results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import peer, plot_experts

_ROW = {"tokens": 4, "median_us": 100.0, "p20_us": 90.0, "p80_us": 120.0, "gbytes_per_s": 5.0, "rel_error": 0.1}
_SHAPE = "8,64,32,2"


def _document(rows: list[dict[str, object]], **settings: str) -> dict[str, object]:
    return {"settings": {"shape": _SHAPE, **settings}, "cpu": {"model": "test"}, "rows": rows}


def test_a_peers_rows_are_recorded_with_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: rows without their format and threads, or folders of this machine in the file."""
    script, file = tmp_path / "engine.py", tmp_path / "results" / "peer.json"
    script.write_text(f"import sys\nprint('Hello', *sys.argv[1:])\nprint({json.dumps(json.dumps(_ROW))})\n")
    command = [sys.executable, str(script), "{format}", "{threads}", "{tokens}"]
    arguments = ["--name", "engine 1", "--formats", "int8,int4", "--threads", "2", "--out", str(file), "--", *command]
    monkeypatch.setattr(sys, "argv", ["peer.py", *arguments])
    peer.main()
    document = json.loads(file.read_text())
    assert document["rows"] == [_ROW | {"format": format, "threads": 2} for format in ("int8", "int4")]
    assert document["settings"]["engine"] == "engine 1"
    assert document["versions"]["torch"]
    assert str(tmp_path) not in json.dumps([document["command"], document["settings"]])


@pytest.mark.parametrize("output", ["no rows\n", '{"tokens": 1}\n'])
def test_a_peer_without_rows_is_refused(output: str) -> None:
    """Bug: an engine that failed leaves an empty file that looks like a result."""
    with pytest.raises(ValueError, match="must print"):
        peer.rows_of(output)


def test_points_of_each_kind_of_file() -> None:
    """Bug: a peer's slower thread count, another unit of time, or bytes that count an expert twice."""
    slow = _ROW | {"format": "int4", "threads": 2, "median_us": 200.0, "gbytes_per_s": 2.5}
    peers = plot_experts.points_of(_document([slow, _ROW | {"format": "int4", "threads": 1}], engine="engine"))
    assert peers == [("engine", "int4", 4, 5.0, 40_000.0)]
    ours = _ROW | {"format": "bf16", "stream_gbytes_per_s": 10.0}
    own, ceiling = plot_experts.points_of(_document([ours]))
    assert own == ("Moebius", "bf16", 4, 5.0, 40_000.0)
    assert ceiling == ("plain read", "bf16", 4, 10.0, 80_000.0)
    rows = [
        {"tokens": 1, "variant": "stock bf16", "median_ms": 0.1},
        {"tokens": 1, "variant": "int8", "median_ms": 0.1},
    ]
    stock, int8 = plot_experts.points_of({"shape": _SHAPE, "rows": rows})
    assert stock[:3] == ("transformers", "bf16", 1)
    assert stock.gbytes_per_s == pytest.approx(2 * 3 * 64 * 32 * 2 / 1e5)  # two experts of one token, in GB/s
    assert int8[:3] == ("Moebius", "int8", 1)


def test_recorded_results_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is optional")
    files = [tmp_path / "ours.json", tmp_path / "peer.json"]
    files[0].write_text(json.dumps(_document([_ROW | {"format": "bf16", "stream_gbytes_per_s": 10.0}])))
    files[1].write_text(json.dumps(_document([_ROW | {"format": "int4", "threads": 1}], engine="engine")))
    monkeypatch.setattr(sys, "argv", ["plot_experts.py", *map(str, files), "--out", str(tmp_path / "plot.png")])
    plot_experts.main()
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
