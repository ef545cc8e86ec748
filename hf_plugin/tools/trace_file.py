"""Files of recorded routing: which experts each layer chose for each token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np


@dataclass(frozen=True, slots=True)
class Trace:
    """Routing of decoded tokens, one sequence after another.

    Args:
        name: of the file.
        ids: int32 [T, L, k], distinct in each row, below `experts`.
        offsets: int64 [S + 1]; sequence s is the rows ``offsets[s]:offsets[s + 1]``.
        groups: subject of each sequence, [S]; empty strings where the file has none.
        experts: number of experts E of each layer.
    """

    name: str
    ids: np.ndarray
    offsets: np.ndarray
    groups: list[str]
    experts: int

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def layers(self) -> int:
        return self.ids.shape[1]

    @property
    def top_k(self) -> int:
        return self.ids.shape[2]

    def only(self, sequences: np.ndarray) -> Trace:
        """The trace of some sequences (integer [n]), in that order."""
        parts = [self.ids[self.offsets[s] : self.offsets[s + 1]] for s in sequences]
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
        ids = np.concatenate(parts) if parts else self.ids[:0]
        return Trace(self.name, ids, offsets, [self.groups[s] for s in sequences], self.experts)


def read_trace(path: str | Path) -> Trace:
    """Read and check a trace: ``ids`` (uint8 or uint16 [T, L, k]), ``offsets`` ([S + 1]), ``n_experts``, ``group``.

    Without ``offsets`` all tokens are one sequence; without ``n_experts`` it is the highest id plus one.

    Raises:
        ValueError: the file is no such trace; the message says what was found.
        OSError: it cannot be read.
    """
    path = Path(path)
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise ValueError("it is a single array")
        with archive:
            arrays = {name: archive[name] for name in ("ids", "offsets", "n_experts", "group") if name in archive.files}
            names = archive.files
    except (BadZipFile, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not an npz archive of arrays ({error}); give a recorded trace") from error
    if "ids" not in arrays:
        raise ValueError(f"{path} has no array 'ids', only {', '.join(names) or 'nothing'}; give a recorded trace")
    return _checked(path, arrays)


def _checked(path: Path, arrays: dict[str, np.ndarray]) -> Trace:
    ids = arrays["ids"]
    if ids.ndim != 3 or not np.issubdtype(ids.dtype, np.integer) or not ids.size:
        raise ValueError(f"{path}: ids are {ids.dtype} {list(ids.shape)}; they must be integers [tokens, layers, k]")
    if int(ids.min()) < 0:
        raise ValueError(f"{path}: ids go down to {int(ids.min())}; they must be at least 0")
    experts = int(arrays["n_experts"]) if "n_experts" in arrays else int(ids.max()) + 1
    if int(ids.max()) >= experts:
        raise ValueError(f"{path}: ids go up to {int(ids.max())}, but n_experts is {experts}")
    ids = np.ascontiguousarray(ids, np.int32)
    ordered = np.sort(ids, axis=2)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise ValueError(f"{path}: a token was routed to one expert twice; the {ids.shape[2]} ids of a row must differ")
    offsets = np.asarray(arrays.get("offsets", [0, len(ids)]), np.int64)
    if (
        offsets.ndim != 1
        or len(offsets) < 2
        or (offsets[[0, -1]] != [0, len(ids)]).any()
        or (np.diff(offsets) < 0).any()
    ):
        raise ValueError(f"{path}: offsets must rise from 0 to the number of tokens, {len(ids)}")
    groups = [str(group) for group in arrays.get("group", [""] * (len(offsets) - 1))]
    if len(groups) != len(offsets) - 1:
        raise ValueError(f"{path}: {len(groups)} groups are given for {len(offsets) - 1} sequences")
    return Trace(path.name, ids, offsets, groups, experts)
