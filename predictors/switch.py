"""Whether foreseeing pays here: measured costs against measured savings, so that it rests where it does not."""

from __future__ import annotations

from dataclasses import dataclass

WINDOW = 32  # tokens between judgements,
FIRST = 8  # and before the first, all of which are foreseen
LEARNING = 64  # tokens foreseen after which a predictor that does not pay is tried less often
BURST = 4  # tokens that are foreseen at rest, to measure and to learn,
TRYING, PERIOD = 32, 128  # of so many while it is learning and there is something to win, and else
_FADING = 0.8  # of sums, per judgement


def least_chance(price: float) -> float:
    """Probability p from which a prefetch pays.

    A right one saves a miss, a wrong one costs an upload that nobody needed; a right one's upload is what the admission
    of a used expert costs in any case. So p must make up for (1 - p) price: ``p >= price / (1 + price)``, where the
    price is that of an upload in misses. How much of an upload hides under other work is for the price to say.
    """
    return price / (1 + price)


@dataclass(slots=True)
class Switch:
    """Wakes and rests a model's predictor.

    Foreseeing pays while the misses saved per token, ``right - price * wrong``, cost more than foreseeing does. Until
    that is seen, some tokens are foreseen and nothing is copied: being right can be counted without. If even all misses
    of a token together cost less, or copies come too late, there is nothing to learn either.
    """

    awake: bool = False  # every token is foreseen, and copies are made
    tokens: int = 0
    learned: int = 0  # tokens foreseen
    _before: int = 0  # tokens at the last judgement
    _measured: float = 0.0  # fading number of tokens foreseen,
    _saved: float = 0.0  # and of the misses saved in them
    _hopeful: bool = True  # there is something to win
    reason: str | None = None  # why it rests

    def begin_token(self) -> bool:
        """Whether this token is to be foreseen."""
        self.tokens += 1
        period = TRYING if self._hopeful and self.learned < LEARNING else PERIOD
        looking = self.awake or self.tokens <= FIRST or self.tokens % period < BURST
        self.learned += looking
        self._measured += looking
        return looking

    @property
    def due(self) -> bool:
        """Whether `judge` is to be called, at the beginning of a token."""
        return self.tokens == FIRST or self.tokens % WINDOW == 0

    def judge(
        self, missed: int, right: int, wrong: int, price: float, miss_us: float, cost_us: float, in_time: bool
    ) -> None:
        """Decide for the coming tokens.

        Args:
            missed: misses since the last call.
            right: offered experts that were used, since the last call.
            wrong: offered experts that were not.
            price: of an upload, in misses.
            miss_us: microseconds of a miss.
            cost_us: microseconds of foreseeing a token.
            in_time: whether a copy takes less time than passes between two layers.
        """
        self._saved += right - price * wrong
        if self._measured:
            gain = self._saved / self._measured * miss_us
            potential = missed / max(self.tokens - self._before, 1) * miss_us
            self._hopeful = in_time and potential > cost_us
            self.reason = self._refusal(cost_us, gain, potential, in_time)
            self.awake = self.reason is None
        self._before = self.tokens
        self._measured, self._saved = self._measured * _FADING, self._saved * _FADING

    def _refusal(self, cost: float, gain: float, potential: float, in_time: bool) -> str | None:
        if not in_time:
            return "a copy takes longer than a layer, so that no prefetch arrives in time"
        if potential <= cost:
            return f"all misses of a token cost {potential:.0f} us, foreseeing them {cost:.0f} us"
        if gain <= cost:
            return f"prefetching saves {gain:.0f} us a token, foreseeing costs {cost:.0f} us"
        return None
