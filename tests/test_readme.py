"""README.md against the code: the options table, the example, the commands, the links."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from typer.main import get_command

import moebius
from moebius.hf_plugin.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted(ROOT.glob("*/README.md")),
    *sorted(ROOT.glob("docs/*.md")),
]


def section(title: str) -> str:
    return README.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_options_table_is_the_dataclass() -> None:
    """An option that is missing here, or has another default, is one that nobody finds or everybody misjudges."""
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", section("Options"), re.MULTILINE)
    expected = [(f.name, repr(f.default).replace("'", '"')) for f in fields(moebius.Options)]
    assert rows == expected


def test_every_public_name_is_explained() -> None:
    assert set(re.findall(r"`moebius\.(\w+)", section("Names"))) == set(moebius.__all__) - {"__version__"}


def test_commands_exist() -> None:
    """A command that the README names must be there, and one that is there must be named."""
    root = get_command(app).commands  # type: ignore[attr-defined]
    names = {f"moebius {name}" for name in root if name != "bench"}
    names |= {f"moebius bench {name}" for name in root["bench"].commands}
    assert set(re.findall(r"^\| `(moebius [\w ]+)` \|", section("Command line"), re.MULTILINE)) == names


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    documents = README + (ROOT / "tests" / "README.md").read_text()
    assert set(re.findall(r"\bmake ([a-z-]+)(?= |$|`)", documents, re.MULTILINE)) - {"it"} <= targets


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_named_tests_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("http")]
    missing = [link for link in links if not (path.parent / link).exists()]
    missing += [name for name in re.findall(r"ARGS=(tests/[\w/.]+)", text) if not (ROOT / name).exists()]
    assert not missing


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The first code that a reader copies; it checks itself that the text equals stock's."""
    [code] = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "tiny_moe" in block]
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})
    assert "uploads" in capsys.readouterr().out
