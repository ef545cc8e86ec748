"""Loading a checkpoint: seconds beside a plain read of its files, peak memory, seconds to the first token.

Generates a bf16 checkpoint of a given size, with a tensor per expert or with packed experts, and loads it in a process
of its own for each variant and repetition, from a cold page cache, the variants in turn:

    python benchmarks/loading.py --gigabytes 3 --folder /somewhere --json loading.json

Variants: `read` (a plain read of the files), `stock`, `native`, `int8`, `int4` (streamed into memory), `converted`
(int4, converted before, mapped) and `disk` (native, with memory for half of the experts; the file is written before).
One variant at a time keeps a run short: --variants read,native.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil

VARIANTS = ("read", "stock", "native", "int8", "int4", "converted", "disk")
LAYERS, EXPERTS, HIDDEN = 8, 32, 1024
_BLOCK = 16 << 20  # bytes of one read


def generate(folder: Path, gigabytes: float, packed: bool) -> None:
    """Write a checkpoint of about that size, layer by layer, in shards."""
    import torch
    from safetensors.torch import save_file
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    wide = max(32, round(gigabytes * 1e9 / (LAYERS * EXPERTS * 3 * HIDDEN * 2) / 32) * 32)
    shape: dict[str, Any] = {
        "hidden_size": HIDDEN, "intermediate_size": wide, "num_experts_per_tok": 4, "num_hidden_layers": LAYERS,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 1024, "dtype": torch.bfloat16,
    }  # fmt: skip
    with torch.device("meta"):
        if packed:
            model: Any = GraniteMoeForCausalLM(GraniteMoeConfig(**shape, num_local_experts=EXPERTS))
        else:
            model = Qwen3MoeForCausalLM(
                Qwen3MoeConfig(**shape, num_experts=EXPERTS, moe_intermediate_size=wide, head_dim=128)
            )
    model = model.bfloat16()
    folder.mkdir(parents=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    names = _checkpoint_shapes(model)
    shards: dict[str, dict[str, Any]] = {}
    for name, size in names.items():
        layer = name.split(".layers.")[1].split(".")[0] if ".layers." in name else "rest"
        shards.setdefault(layer, {})[name] = size
    weight_map = {}
    for number, (_, tensors) in enumerate(shards.items()):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        data = {name: torch.empty(size, dtype=torch.bfloat16).normal_(std=0.02) for name, size in tensors.items()}
        save_file(data, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(data, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _checkpoint_shapes(model: Any) -> dict[str, Any]:
    from transformers.core_model_loading import revert_weight_conversion

    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    state["lm_head.weight"] = model.state_dict()["lm_head.weight"]
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}


def forget(folder: Path) -> None:
    """Drop the files' pages from the page cache, so that the next read is of the disk."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def claim_memory(nbytes: int) -> None:
    """Use as much memory and give it back: a virtual machine gets what it has not used lately at 0.4 to 0.8 GB/s only.

    Without it a load measures the host, since each variant finds another share of free memory that is really there.
    """
    if hasattr(mmap, "MADV_HUGEPAGE"):
        nbytes = min(nbytes, psutil.virtual_memory().available * 3 // 4)
        with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
            pages.madvise(mmap.MADV_HUGEPAGE)
            for start in range(0, nbytes, mmap.PAGESIZE):
                pages[start] = 1


def plain_read(folder: Path) -> float:
    """Seconds to read all weights' files, in large blocks."""
    buffer = bytearray(_BLOCK)
    claim_memory(_size(folder) * 5 // 4)
    begun = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - begun


def load(variant: str, folder: Path) -> dict[str, float]:
    """Load a variant in this process and generate a token."""
    import torch
    from transformers import AutoModelForCausalLM

    import moebius
    import moebius.hf_plugin.checkpoints.loading  # imports are no part of loading

    options: dict[str, Any] = {"device": "cpu"}
    if variant in ("int8", "int4"):
        options["expert_format"] = variant
    if variant == "disk":
        options["cpu_memory"] = 0.5
    claim_memory(_size(folder) * 9 // 4)  # for the files in the page cache, and for the experts
    peak = _Peak()
    begun = time.perf_counter()
    if variant == "stock":
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
    else:
        model = moebius.from_pretrained(str(folder), **options)
    seconds = time.perf_counter() - begun
    model.generate(torch.arange(16)[None] % 1024, max_new_tokens=1, do_sample=False)
    first = time.perf_counter() - begun
    rows = {"load_s": seconds, "first_token_s": first, **peak.stop()}
    if variant != "stock":
        rows["expert_bytes"] = moebius.stats(model).to_dict()["expert_bytes"]
    return rows


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


class _Peak:
    """Watches the memory of this process: what is its own, and what it has mapped."""

    def __init__(self) -> None:
        self._before = _anonymous()
        self._peak, self._stop = self._before, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self._peak = max(self._peak, _anonymous())

    def stop(self) -> dict[str, float]:
        self._stop.set()
        self._thread.join()
        return {"peak_bytes": self._peak - self._before, "end_bytes": _anonymous() - self._before}


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure(folder: Path, work: Path, variants: list[str], repeats: int) -> list[dict[str, Any]]:
    """One row a variant: medians of runs in processes of their own."""
    places = dict.fromkeys(variants, folder)
    if "converted" in variants:
        places["converted"] = work / "converted"
        _run_python(
            "from moebius.hf_plugin.checkpoints.converting import convert; convert(*sys.argv[1:])",
            folder,
            places["converted"],
            "int4",
        )
    if "disk" in variants:
        _child("disk", folder, work)  # writes the file
    runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    for _ in range(repeats):
        for variant in variants:
            forget(places[variant])
            forget(work)
            runs[variant].append(
                {"load_s": plain_read(folder)} if variant == "read" else _child(variant, places[variant], work)
            )
    return [
        {"variant": variant, **{key: median(run[key] for run in of_variant) for key in of_variant[0]}}
        for variant, of_variant in runs.items()
    ]


def _child(variant: str, folder: Path, work: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--load", variant, "--folder", str(folder)]
    environment = {**os.environ, "MOEBIUS_CACHE_DIR": str(work / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{variant} failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _run_python(code: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-c", f"import sys; {code}", *map(str, arguments)], check=True, capture_output=True)


def show(rows: list[dict[str, Any]], nbytes: int, write: Callable[[str], None] = print) -> None:
    """The rows as a table."""
    write(f"{nbytes / 1e9:.2f} GB of files")
    write(f"{'variant':>10} {'load s':>8} {'GB/s':>7} {'first token s':>14} {'peak GB':>8} {'after GB':>9}")
    for row in rows:
        rate = nbytes / 1e9 / row["load_s"]
        more = [row.get("first_token_s"), row.get("peak_bytes"), row.get("end_bytes")]
        cells = [
            "-" if value is None else f"{value / scale:.2f}" for value, scale in zip(more, (1, 1e9, 1e9), strict=True)
        ]
        write(f"{row['variant']:>10} {row['load_s']:8.2f} {rate:7.2f} {cells[0]:>14} {cells[1]:>8} {cells[2]:>9}")


def main() -> None:
    """Parse arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.05)
    parser.add_argument("--layout", choices=["per-expert", "packed"], default="per-expert")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is, or is to be written; default: temporary")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.load:
        print(json.dumps(load(chosen.load, chosen.folder)))
        return
    with tempfile.TemporaryDirectory(dir=chosen.folder and chosen.folder.parent) as work:
        folder = chosen.folder or Path(work) / "checkpoint"
        if not folder.exists():
            generate(folder, chosen.gigabytes, chosen.layout == "packed")
        scratch = Path(work) / "work"
        scratch.mkdir()
        rows = measure(folder, scratch, chosen.variants.split(","), chosen.repeats)
        nbytes = _size(folder)
        shutil.rmtree(scratch)
    show(rows, nbytes)
    if chosen.json:
        facts = {"layout": chosen.layout, "file_bytes": nbytes, "repeats": chosen.repeats}
        chosen.json.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
