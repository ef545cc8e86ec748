"""Record what another engine's own benchmark prints, with the machine and the versions it was measured with.

    python benchmarks/peer.py --name "kt-kernel 0.7.2" --shape 128,2048,768,8 --out benchmarks/results/NAME.json \\
        -- python THEIR_SCRIPT.py {format} {threads} {tokens}

The command runs once for each format and number of threads, with those in the place of the braces (``{tokens}`` is the
list, with commas), and prints JSON objects, one a line, with the fields of `moebius bench experts` that `FIELDS` names;
other lines are ignored. It has to be fair: the same shape, random ids in every call, and as many layers as make the
packed weights four times the last-level cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from moebius.hf_plugin.tools.record import write_record

FIELDS = {"tokens", "median_us", "p20_us", "p80_us", "gbytes_per_s", "rel_error"}


def rows_of(output: str) -> list[dict[str, Any]]:
    """The JSON objects among the lines that a command printed.

    Raises:
        ValueError: there is none, or one lacks a field.
    """
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    lacking = [name for name in sorted(FIELDS) if not all(name in row for row in rows)]
    if not rows or lacking:
        raise ValueError(f"the command must print JSON objects with {', '.join(lacking or sorted(FIELDS))}:\n{output}")
    return rows


def measure(command: list[str], format: str, threads: int, tokens: str) -> list[dict[str, Any]]:
    """Run the command once."""
    filled = [part.format(format=format, threads=threads, tokens=tokens) for part in command]
    done = subprocess.run(filled, stdout=subprocess.PIPE, text=True, check=True)
    return [{"format": format, "threads": threads} | row for row in rows_of(done.stdout)]


def without_folders(command: list[str]) -> list[str]:
    """The command as it is recorded: folders of one machine mean nothing on another."""
    return [Path(part).name if part.startswith(("/", ".", "~")) else part for part in command]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True, help="the engine and its version")
    parser.add_argument("--shape", default="128,2048,768,8", help="experts, hidden, intermediate, top-k")
    parser.add_argument("--formats", default="bf16,int8,int4")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--tokens", default="1,4,32,256")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for format in arguments.formats.split(","):
        for threads in arguments.threads.split(","):
            rows += measure(arguments.command, format, int(threads), arguments.tokens)
            print(*(f"{row['tokens']}: {row['median_us']:.0f} us" for row in rows[-len(arguments.tokens.split(",")) :]))
    settings = {
        "engine": arguments.name,
        "shape": arguments.shape,
        "engine_command": without_folders(arguments.command),
    }
    write_record(arguments.out, ["python", "benchmarks/peer.py", *without_folders(sys.argv[1:])], settings, rows)


if __name__ == "__main__":
    main()
