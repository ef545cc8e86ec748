"""Rows of `benchmarks.gpu`, written as they come, with the machine that they are of."""

from __future__ import annotations

import gc
import json
import os
import platform
import traceback
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import moebius


class Report:
    """Rows and errors, written to a file after each; parts that come after the deadline are skipped."""

    def __init__(self, out: Path | None, seconds: float, device: torch.device) -> None:
        self.out, self.device = out, device
        self.deadline = perf_counter() + seconds
        self.data: dict[str, Any] = {"machine": machine(device), "rows": [], "errors": [], "skipped": [], "parts": {}}
        self.bandwidth: float | None = None  # of a copy on the device, bytes per second

    def add(self, **row: Any) -> None:
        print(json.dumps(row), flush=True)
        self.data["rows"].append(row)
        self.save()

    def part(self, name: str, run: Callable[[], None]) -> None:
        """Run a part; its seconds and the device memory that it leaves are written down, or why it failed."""
        begun = perf_counter()
        if begun > self.deadline:
            self.data["skipped"].append(name)
            self.save()
            return
        try:
            run()
        except Exception:  # noqa: BLE001 (kept in the results; the other parts are still worth having)
            self.data["errors"].append({"part": name, "error": traceback.format_exc()})
            print(traceback.format_exc(), flush=True)
        self.data["parts"][name] = {"seconds": perf_counter() - begun} | self._memory()
        self.save()

    def _memory(self) -> dict[str, int]:
        if self.device.type == "cpu":
            return {}
        gc.collect()
        torch.cuda.empty_cache()
        return {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}

    def save(self) -> None:
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            written = self.out.with_suffix(".part")  # a run that is killed while it writes leaves the former file
            written.write_text(json.dumps(self.data, indent=1) + "\n")
            os.replace(written, self.out)


def machine(device: torch.device) -> dict[str, Any]:
    import psutil
    import transformers

    facts: dict[str, Any] = {"device": platform.processor(), "triton": None}
    if device.type != "cpu":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        total = torch.cuda.get_device_properties(device).total_memory
        facts = {"device": torch.cuda.get_device_name(device), "capability": capability, "device_bytes": total}
        facts |= {"cuda": torch.version.cuda, "triton": __import__("triton").__version__}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "moebius": moebius.__version__}
    host = {"cores": psutil.cpu_count(logical=False), "host_bytes": psutil.virtual_memory().total}
    return facts | versions | {"transformers": transformers.__version__} | host
