"""How long the first call of a process takes where compiled code is in the cache folder, in every format.

    python benchmarks/first_call.py --out benchmarks/results/NAME.json

A process for each format and round imports Moebius, which is not counted, and runs one small layer with two threads at
one token and at sixteen; a round before the first fills the cache.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from moebius.hf_plugin.tools.record import write_record

_CALL = """
import sys, time
import numpy as np, torch
from moebius.cpu_experts.executor import CpuExecutor
from moebius.cpu_experts.store import ExpertStore
from moebius.kernels.experts import ExpertSpec, RecordLayout
from moebius.kernels.routes import build_routes
spec = ExpertSpec(256, 128)
store = ExpertStore.empty(spec, RecordLayout.of(spec, sys.argv[1]), 4)
store.records.zero_()
executor = CpuExecutor(2)
for tokens in (1, 16):
    ids, weights = np.zeros((tokens, 1), np.int64), np.ones((tokens, 1), np.float32)
    x, out = torch.zeros(tokens, 256, dtype=torch.bfloat16), torch.zeros(tokens, 256)
    begun = time.perf_counter()
    executor.run(store, x, build_routes(ids, weights, 4), out)
    print(time.perf_counter() - begun)
executor.close()
"""


def first_calls(format: str) -> list[float]:
    """Seconds of a new process's first call at one token, and of its first at sixteen."""
    done = subprocess.run([sys.executable, "-c", _CALL, format], stdout=subprocess.PIPE, text=True, check=True)
    return [float(line) for line in done.stdout.split()]


def measure(format: str, rounds: int) -> dict[str, Any]:
    first_calls(format)
    times = [first_calls(format) for _ in range(rounds)]
    one, sixteen = (sorted(column) for column in zip(*times, strict=True))
    row = {"format": format, "first_call_s": round(median(one), 3), "slowest_s": round(one[-1], 3)}
    return row | {"sixteen_tokens_s": round(median(sixteen), 4), "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default="fp32,bf16,fp16,int8,int4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = [measure(format, arguments.rounds) for format in arguments.formats.split(",")]
    for row in rows:
        print(*row.values())
    write_record(arguments.out, ["python", "benchmarks/first_call.py", *sys.argv[1:]], {}, rows)


if __name__ == "__main__":
    main()
