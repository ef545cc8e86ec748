"""Before each forward of a model with experts in mapped files: whether these are still what they were.

A file that was cut short ends the process (SIGBUS) when what is gone is touched. Layers look before they compute, but
first come embedding and attention, whose weights transformers maps from the same files. What is left is a file that is
cut short while a forward runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from moebius.hf_plugin.running.runtime import ModelRuntime


class FileCheck:
    """A hook before a patched model's forward; raises ValueError where a file was changed, or cut short, in place."""

    def __init__(self, runtime: ModelRuntime) -> None:
        self._runtime = runtime

    def __call__(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            for file in {file for store in self._runtime.stores for file in store.files}:
                file.check_unchanged()


def install(model: nn.Module, runtime: ModelRuntime) -> None:
    """Check the files before each forward of `model`, if there are any."""
    if any(store.files for store in runtime.stores):
        model.register_forward_pre_hook(FileCheck(runtime))


def remove(module: nn.Module) -> None:
    """Undo `install` for one module."""
    for number, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, FileCheck):
            del module._forward_pre_hooks[number]
