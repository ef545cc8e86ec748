"""Moebius: Mixture-of-Experts models of transformers on CPU and GPU together, by one line.

>>> model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B", dtype="auto")  # doctest: +SKIP
>>> moebius.patch(model, gpu_memory="8GiB")  # doctest: +SKIP
"""

from __future__ import annotations

import os as _os
from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

# In a checkout (bare or installed with `pip install -e`) the sub-packages are siblings of this folder: the five
# folders have no __init__.py, so that none of them can shadow another distribution's top-level name.
_here = _os.path.dirname(_os.path.abspath(__file__))
if not _os.path.isdir(_os.path.join(_here, "kernels")):
    __path__.append(_os.path.dirname(_here))

__version__ = "0.1.0"

if _TYPE_CHECKING:
    from moebius.hf_plugin.checkpoints.loading import from_pretrained as from_pretrained
    from moebius.hf_plugin.checkpoints.quantizer import MoebiusConfig as MoebiusConfig
    from moebius.hf_plugin.options import Options as Options
    from moebius.hf_plugin.patching import is_patched as is_patched
    from moebius.hf_plugin.patching import patch as patch
    from moebius.hf_plugin.patching import resize as resize
    from moebius.hf_plugin.patching import unpatch as unpatch
    from moebius.hf_plugin.profile import save_profile as save_profile
    from moebius.hf_plugin.stats import Stats as Stats
    from moebius.hf_plugin.stats import reset_stats as reset_stats
    from moebius.hf_plugin.stats import stats as stats

_PUBLIC = {
    "Options": "moebius.hf_plugin.options",
    "MoebiusConfig": "moebius.hf_plugin.checkpoints.quantizer",
    "from_pretrained": "moebius.hf_plugin.checkpoints.loading",
    "patch": "moebius.hf_plugin.patching",
    "unpatch": "moebius.hf_plugin.patching",
    "is_patched": "moebius.hf_plugin.patching",
    "resize": "moebius.hf_plugin.patching",
    "save_profile": "moebius.hf_plugin.profile",
    "Stats": "moebius.hf_plugin.stats",
    "stats": "moebius.hf_plugin.stats",
    "reset_stats": "moebius.hf_plugin.stats",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> _Any:
    if name in _PUBLIC:
        return getattr(_import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'moebius' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
