"""What tests of whole models share."""

from __future__ import annotations

import pytest

from moebius.cpu_experts import linear
from moebius.predictors.switch import Switch


@pytest.fixture
def prefetching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefetching never rests, though no miss of a tiny model costs as much as foreseeing does."""
    begin_token = Switch.begin_token

    def awake(switch: Switch) -> bool:
        begin_token(switch)
        switch.awake = True
        return True

    monkeypatch.setattr(Switch, "begin_token", awake)
    monkeypatch.setattr(Switch, "_refusal", lambda *args: None)


@pytest.fixture
def dense_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense layers of any size go through our kernel on `device="cpu"`: those of tiny models would be left to torch."""
    monkeypatch.setattr(linear, "_LEAST_BYTES", 0)
