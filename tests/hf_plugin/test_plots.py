"""Plots: drawn where matplotlib is, refused with the remedy where it is not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from moebius.hf_plugin.cli import app as cli
from moebius.hf_plugin.tools import plots

EXCERPT = Path(__file__).parent.parent / "data" / "traces" / "gpt_oss_20b_excerpt.npz"


def replay(plot: Path) -> Result:
    return CliRunner().invoke(cli.app, ["replay", str(EXCERPT), "--policy", "lru", "--plot", str(plot), "--json"])


def test_a_missing_matplotlib_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: an ImportError with a traceback, from an option that the help offers."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'moebius-moe\[plot\]'"):
        plots.new_figure(4, 3)


def test_replay_draws_its_policies(tmp_path: Path) -> None:
    """Bug: an option of matplotlib, or a field of a row, that is no longer there."""
    pytest.importorskip("matplotlib", reason="matplotlib is optional")
    done = replay(tmp_path / "plot.png")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
