"""Plots are optional, and so is matplotlib; it is asked for here only."""

from __future__ import annotations

from typing import Any


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of that many inches, which needs no display.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "plots need matplotlib, which is not installed: pip install 'moebius-moe[plot]', or pip install matplotlib"
        ) from None
    return Figure(figsize=(width, height), layout="constrained")
