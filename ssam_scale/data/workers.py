"""How many threads decode images, where that is to be measured (`data.workers: auto`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ssam_scale.data.images import Indices

_WITHIN = 0.05
"""What fewer threads may be slower than the fastest: less than that is noise, and cores are needed elsewhere too."""
_HOPELESS = 0.75
"""Of the fastest: where so many threads are slower than this, still fewer of them are not tried."""
_FEW, _TIMES = 8, 3
_SECONDS = 0.25
"""What a thread takes for the images that are measured by, unless those are fewer than `_EACH` for every thread."""
_EACH = 4


@dataclass(frozen=True)
class Workers:
    """Threads of a loader.

    Attributes:
        count: how many decode.
        rates: images a second that were measured, by number of threads; empty: nothing was measured.
    """

    count: int
    rates: Mapping[int, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """For people: what was found."""
        others = ", ".join(f"{rate:,.0f} with {count}" for count, rate in self.rates.items() if count != self.count)
        found = f", {self.rates[self.count]:,.0f} images/s" if self.rates else ""
        threads = "thread" if self.count == 1 else "threads"
        return f"{self.count} loader {threads}{found}{f' ({others})' if others else ''}"


def candidates(most: int) -> list[int]:
    """Numbers of threads that are tried: all that there may be, and the powers of two below, the largest first."""
    return [most, *(2**power for power in range(most.bit_length() - 1, -1, -1) if 2**power < most)]


def fewest(rates: Mapping[int, float]) -> int:
    """The fewest threads that are as fast as the fastest, or nearly so.

    Args:
        rates: images a second by number of threads.
    """
    fast = (1.0 - _WITHIN) * max(rates.values())
    return min(count for count, rate in rates.items() if rate >= fast)


def measured(seconds: Callable[[Indices, int], float], images: Indices, most: int) -> Workers:
    """The fewest threads that decode a batch about as fast as any number of them.

    Takes a second or two: of a batch no more is taken than a thread decodes in a quarter of a second, or four images
    for each thread, and those once untimed, so that the file's being in memory or not makes no difference.

    Args:
        seconds: decodes images by so many threads, and says how long it took.
        images: of a batch.
        most: threads there may be.
    """
    if most == 1:
        return Workers(1)
    few = images[:_FEW]
    seconds(few, 1)  # compiles, and reads the file
    each = seconds(few, 1) / len(few)
    sample = images[: max(_EACH * most, int(_SECONDS / each))]
    seconds(sample, most)
    rates: dict[int, float] = {}
    for count in candidates(most):
        rates[count] = len(sample) / min(seconds(sample, count) for _ in range(_TIMES))
        if rates[count] < _HOPELESS * max(rates.values()):
            break
    return Workers(fewest(rates), rates)
