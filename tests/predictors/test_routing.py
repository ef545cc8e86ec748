"""What the predictors look at, and the mean change of hidden states."""

from __future__ import annotations

import torch

from moebius.predictors.routing import PREDICTORS, Offsets


def test_blend_looks_at_everything_and_none_at_nothing() -> None:
    """Catches a table whose default leaves something out."""
    blend, none = PREDICTORS["blend"], PREDICTORS["none"]
    assert (blend.ids, blend.gate, blend.residual) == (True, True, True)
    assert (none.ids, none.gate, none.residual) == (False, False, False)


def test_offsets_are_the_mean_change_from_layer_to_layer() -> None:
    """Catches offsets of the wrong layer, the wrong sign, or of one token only."""
    generator = torch.Generator().manual_seed(0)
    offsets = Offsets(3)
    moves = torch.tensor([[1.0, -2.0], [5.0, 0.5]])
    for _ in range(400):
        x = torch.randn(2, 2, generator=generator)
        for layer in range(3):
            offsets.observe(layer, x)
            if layer < 2:
                x = x + moves[layer] + 0.1 * torch.randn(2, 2, generator=generator)
    x = torch.zeros(1, 2, dtype=torch.bfloat16)
    for layer in (1, 2):
        moved = offsets.move(layer, x)
        assert moved.dtype == x.dtype
        torch.testing.assert_close(moved[0].float(), moves[layer - 1], atol=0.06, rtol=0.02)
    assert torch.equal(offsets.move(0, x), x)


def test_offsets_of_layers_farther_apart() -> None:
    """Catches a distance that is ignored."""
    offsets = Offsets(3, ahead=2)
    for layer, value in enumerate((1.0, 10.0, 4.0)):
        offsets.observe(layer, torch.full((1, 2), value))
    assert offsets.move(2, torch.zeros(1, 2)).tolist() == [[3.0, 3.0]]
    assert offsets.move(1, torch.zeros(1, 2)).tolist() == [[0.0, 0.0]]


def test_layers_of_different_width_have_no_offset() -> None:
    """Catches a crash in models whose experts see inputs of several widths."""
    offsets = Offsets(2)
    offsets.observe(0, torch.ones(1, 2))
    offsets.observe(1, torch.ones(1, 3))
    assert offsets.move(1, torch.zeros(1, 2)).tolist() == [[0.0, 0.0]]
