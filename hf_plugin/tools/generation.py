"""Greedy generation with times, and the comparison of two texts token by token, for the demo and the benchmarks."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import moebius

TIE_MARGIN = 1e-4  # where stock's two best logits are closer than this, rounding may choose either


@dataclass(slots=True)
class Generation:
    """New tokens of one sequence, and when each was there, in seconds of `perf_counter`.

    Args:
        begun: when `generate` was called.
        arrivals: when each token was there.
    """

    tokens: list[int]
    begun: float
    arrivals: list[float]

    @property
    def first_token_s(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0] - self.begun

    @property
    def steps(self) -> list[tuple[float, float]]:
        """Beginning and end of each step after the first token, P - 1 for P tokens."""
        return list(pairwise(self.arrivals))

    @property
    def step_s(self) -> list[float]:
        """Seconds of each step after the first token."""
        return [end - begin for begin, end in self.steps]

    @property
    def decode_tok_s(self) -> float:
        """Tokens per second after the first one; 0 where there is only one."""
        return len(self.step_s) / sum(self.step_s) if self.step_s else 0.0


@dataclass(frozen=True, slots=True)
class Agreement:
    """Whether two token sequences are equal, and stock's top-2 margin at the first difference (None where equal)."""

    first_difference: int | None = None
    margin: float | None = None

    @property
    def same(self) -> bool:
        return self.first_difference is None

    @property
    def tie(self) -> bool:
        """Whether the sequences part where stock itself is undecided."""
        return self.margin is not None and self.margin < TIE_MARGIN


@dataclass(slots=True)
class _Clock(BaseStreamer):
    """Notes when each token arrives; the first `put` is the prompt."""

    times: list[float] = field(default_factory=list)

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate_greedily(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> Generation:
    """Continue a prompt by exactly `new_tokens` tokens.

    Args:
        prompt: int64 [1, P] on any device.
    """
    clock = _Clock()
    ids = prompt.to(model.device)
    start = time.perf_counter()
    output = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0,
        streamer=clock,
    )
    return Generation(output[0, prompt.shape[1] :].tolist(), start, clock.times[1:])


def compare_with_stock(
    stock: PreTrainedModel, prompt: torch.Tensor, expected: list[int], found: list[int]
) -> Agreement:
    """Compare tokens with stock's; where they part, look at how decided stock was.

    Args:
        stock: the unpatched model, to ask for its logits at the first difference.
        prompt: int64 [1, P].
    """
    pairs = enumerate(zip(expected, found, strict=True))
    position = next((i for i, (ours, theirs) in pairs if ours != theirs), None)
    if position is None:
        return Agreement()
    prefix = torch.cat([prompt, torch.tensor([expected[:position]], dtype=prompt.dtype)], dim=1)
    with torch.inference_mode():
        logits = stock(prefix.to(stock.device)).logits[0, -1].float()
    best, second = logits.topk(2).values.tolist()
    return Agreement(position, best - second)


def default_model() -> Path | None:
    """The small trained model of the checkout; None where Moebius runs from an installed wheel."""
    folder = Path(moebius.__file__).parent.parent / "tests" / "data" / "tiny_moe"
    return folder if (folder / "config.json").is_file() else None


def require_model(path: str | None) -> str:
    """The given model, or the checkout's.

    Raises:
        ValueError: none was given and there is no checkout, or a path that does not exist.
    """
    if path is not None and path.startswith(("/", ".", "~")) and not Path(path).exists():
        raise ValueError(f"--model {path} does not exist; give a model's folder or its name on the hub")
    found = path or default_model()
    if found is None:
        raise ValueError(
            "no model: the small trained model comes with a checkout of Moebius only (tests/data/tiny_moe); give the "
            "folder or the hub name of a Mixture-of-Experts model with --model"
        )
    return str(found)
