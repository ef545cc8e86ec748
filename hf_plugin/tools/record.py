"""The file that a benchmark leaves: its rows, and what is needed to judge and to repeat them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moebius.hf_plugin.tools import doctor, machine


def write_record(file: Path, command: Sequence[str], settings: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write rows with date, command, settings, versions and machine as one JSON document; makes the folder."""
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "settings": settings,
        "versions": doctor.versions(),
        "cpu": asdict(machine.cpu()),
        "gpus": [asdict(gpu) for gpu in doctor.find_gpus()],
        "rows": list(rows),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")
