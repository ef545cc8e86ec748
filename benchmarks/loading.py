"""Loading a checkpoint: seconds beside a plain read of its files, peak memory, seconds to the first token.

Generates a checkpoint of a given size in bf16, and loads it in a process of its own for each variant and repetition,
from a cold page cache, the variants in turn:

    python -m benchmarks.loading --gigabytes 3 --layout fp8 --folder /somewhere --json loading.json

Layouts: `per-expert` (bf16, a tensor for each expert), `packed` (bf16, one for all), `fp8` (per expert, with scales of
128 x 128 blocks, as DeepSeek and Qwen release them), `mxfp4` (packed blocks and scales, as gpt-oss has them).
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
LAYOUTS = ("per-expert", "packed", "fp8", "mxfp4")
QUANTIZATION = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
}
_BLOCK = 16 << 20  # bytes of one read


def generate(folder: Path, gigabytes: float, layout: str) -> None:
    """Write a checkpoint that takes about that many bytes in bf16, layer by layer, in shards."""
    import torch
    from safetensors.torch import save_file

    model = _model(max(32, round(gigabytes * 1e9 / (LAYERS * EXPERTS * 3 * HIDDEN * 2) / 32) * 32), layout)
    folder.mkdir(parents=True)
    model.config.architectures = [type(model).__name__]
    if layout in QUANTIZATION:
        model.config.quantization_config = QUANTIZATION[layout]
    model.config.save_pretrained(folder)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, size in _checkpoint_shapes(model).items():
        layer = name.split(".layers.")[1].split(".")[0] if ".layers." in name else "rest"
        shards.setdefault(layer, {})[name] = size
    weight_map = {}
    for number, tensors in enumerate(shards.values()):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        data: dict[str, torch.Tensor] = {}
        for name, size in tensors.items():
            data |= _random(name, size, layout)
        save_file(data, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(data, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _model(wide: int, layout: str) -> Any:
    import torch
    import transformers

    shape: dict[str, Any] = {
        "hidden_size": HIDDEN, "intermediate_size": wide, "num_experts_per_tok": 4, "num_hidden_layers": LAYERS,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 1024, "dtype": torch.bfloat16,
        "head_dim": HIDDEN // 8, "num_experts": EXPERTS, "num_local_experts": EXPERTS, "moe_intermediate_size": wide,
    }  # fmt: skip
    prefix = {"packed": "GraniteMoe", "mxfp4": "GptOss"}.get(layout, "Qwen3Moe")
    with torch.device("meta"):
        config = getattr(transformers, f"{prefix}Config")(**shape)
        return getattr(transformers, f"{prefix}ForCausalLM")(config).bfloat16()


def _checkpoint_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    from transformers.core_model_loading import revert_weight_conversion

    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, model.state_dict()).items()}


def _random(name: str, size: tuple[int, ...], layout: str) -> dict[str, Any]:
    """A weight of random numbers of 0.02 or so, as the layout stores it."""
    import torch

    if layout == "fp8" and len(size) == 2 and name.endswith("_proj.weight"):
        codes = torch.empty(size).normal_(std=32).to(torch.float8_e4m3fn)
        return {name: codes, f"{name}_scale_inv": torch.full([-(-n // 128) for n in size], 0.02 / 32)}
    if layout == "mxfp4" and len(size) == 3 and name.endswith("_proj"):
        experts, inputs, outputs = size
        rows = (experts, outputs, inputs // 32)
        blocks = torch.randint(0, 256, (*rows, 16), dtype=torch.uint8)
        return {f"{name}_blocks": blocks, f"{name}_scales": torch.full(rows, 120, dtype=torch.uint8)}
    return {name: torch.empty(size, dtype=torch.bfloat16).normal_(std=0.02)}


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
    claim_memory(size_of(folder) * 5 // 4)
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
    claim_memory(size_of(folder) + _bf16_bytes(folder) * 5 // 4)  # for the files in the page cache, and for the experts
    peak = Peak()
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


def size_of(folder: Path) -> int:
    """Bytes of all weights' files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _bf16_bytes(folder: Path) -> int:
    """Bytes of the experts in bf16."""
    config = json.loads((folder / "config.json").read_text())
    return LAYERS * EXPERTS * 3 * HIDDEN * int(config["intermediate_size"]) * 2


class Peak:
    """Watches the memory of this process: what is its own, and what it has mapped."""

    def __init__(self) -> None:
        self._before = _anonymous()
        self._peak, self._stop = self._before, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
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


def use_compiled_kernels(cache: Path) -> None:
    """Let a cache folder of its own have the compiled kernels of the usual one, since compiling takes long."""
    from moebius.kernels.numba.jit import cache_root

    usual = cache_root() / "numba"
    usual.mkdir(parents=True, exist_ok=True)
    (cache / "numba").symlink_to(usual)


def measure(folder: Path, work: Path, variants: list[str], repeats: int) -> list[dict[str, Any]]:
    """One row a variant: medians of runs in processes of their own."""
    (work / "cache").mkdir()
    use_compiled_kernels(work / "cache")
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


def record(
    module: str, out: Path, folders: dict[str, Path | None], facts: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    """Write rows with the command that repeats them, in which names stand for the folders of this machine."""
    from moebius.hf_plugin.tools.record import write_record

    names = {str(folder): name for name, folder in folders.items()}
    arguments = [names.get(argument, argument) for argument in sys.argv[1:]]
    write_record(out, ["python", "-m", module, *arguments], facts, rows)


def main() -> None:
    """Parse arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.05)
    parser.add_argument("--layout", choices=LAYOUTS, default="per-expert")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is, or is to be written; default: temporary")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.load:
        print(json.dumps(load(chosen.load, chosen.folder)))
        return
    if chosen.folder:
        chosen.folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=chosen.folder and chosen.folder.parent) as work:
        folder = chosen.folder or Path(work) / "checkpoint"
        if not folder.exists():
            generate(folder, chosen.gigabytes, chosen.layout)
        scratch = Path(work) / "work"
        scratch.mkdir()
        rows = measure(folder, scratch, chosen.variants.split(","), chosen.repeats)
        nbytes = size_of(folder)
        shutil.rmtree(scratch)
    show(rows, nbytes)
    if chosen.json:
        facts = {"layout": chosen.layout, "file_bytes": nbytes, "repeats": chosen.repeats}
        record("benchmarks.loading", chosen.json, {"FOLDER": chosen.folder}, facts, rows)


if __name__ == "__main__":
    main()
