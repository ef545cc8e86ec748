"""A file's bytes where the kernel keeps them: the right ones, or an error instead of the end of the process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from moebius.cpu_experts.mapped_file import MappedFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 64)  # four pages
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
@pytest.mark.parametrize("offset", [0, 1, 2, 4097])
def test_tensors_at_any_byte(dtype: torch.dtype, offset: int, path: Path) -> None:
    """Bug: an offset that is rounded to whole numbers; a view that outlives its mapping."""
    file = MappedFile(path)
    file.populate(offset, offset + 100)
    tensor = file.tensor(offset, dtype, (3, 5))
    del file
    want = path.read_bytes()[offset : offset + tensor.nbytes]
    assert (tensor.dtype, tensor.shape) == (dtype, (3, 5))
    assert tensor.clone().view(-1).view(torch.uint8).numpy().tobytes() == want


def test_one_that_is_cut_short_is_an_error(path: Path) -> None:
    """Bug: SIGBUS, which nobody can catch."""
    file = MappedFile(path)
    os.truncate(path, 4096)
    with pytest.raises(ValueError, match=r"file was changed while it was in use.* load the model again"):
        file.populate(0, 16384)
    with pytest.raises(ValueError, match="was changed"):
        file.check_unchanged()


def test_one_that_is_replaced_or_deleted_stays(path: Path) -> None:
    """Bug: a change that is seen under the name of the file."""
    file, want = MappedFile(path), path.read_bytes()
    path.with_name("other").write_bytes(b"other")
    os.replace(path.with_name("other"), path)
    path.unlink()
    file.check_unchanged()
    file.populate(0, 16384)
    assert file.bytes.numpy().tobytes() == want


def test_it_is_closed_with_the_last_who_uses_it(path: Path) -> None:
    """Bug: file descriptors that run out after some models."""
    before = len(os.listdir("/proc/self/fd"))
    files = [MappedFile(path) for _ in range(10)]
    tensor = files[0].tensor(0, torch.uint8, (5,))
    assert len(os.listdir("/proc/self/fd")) >= before + 10
    del files
    assert tensor.tolist() == [0, 1, 2, 3, 4]
    del tensor
    assert len(os.listdir("/proc/self/fd")) == before
