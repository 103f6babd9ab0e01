"""When each request is sent: gaps between arrivals, at one rate or at one that grows. Seconds; pure but for `paced`."""

from __future__ import annotations

import asyncio
import random
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from minivllm.exceptions import ConfigError

STRATEGIES = ("linear", "exponential")


@dataclass(frozen=True)
class RampUp:
    """A rate that goes from `start` to `end` requests a second over the run, as requests are counted."""

    strategy: str
    start: float
    end: float

    def rate(self, progress: float) -> float:
        """progress: 0 at the first request, 1 at the last."""
        if self.strategy == "linear":
            return self.start + (self.end - self.start) * progress
        return self.start * (self.end / self.start) ** progress


def ramp_up_of(args: Namespace) -> RampUp | None:
    """What --ramp-up-strategy and its two rates ask for.

    Raises:
        ConfigError: they are not together, or --request-rate is there too.
    """
    rates = (args.ramp_up_start_rps, args.ramp_up_end_rps)
    if args.ramp_up_strategy is None:
        if rates != (None, None):
            raise ConfigError("--ramp-up-start-rps and --ramp-up-end-rps need --ramp-up-strategy")
        return None
    if None in rates:
        raise ConfigError("--ramp-up-strategy needs --ramp-up-start-rps and --ramp-up-end-rps")
    if not 0 < rates[0] <= rates[1] < float("inf"):
        raise ConfigError(
            f"--ramp-up-start-rps {rates[0]:g} must be above 0 and at most --ramp-up-end-rps {rates[1]:g}"
        )
    if args.request_rate != float("inf"):
        raise ConfigError("--request-rate does not go together with --ramp-up-strategy, which sets the rate")
    return RampUp(args.ramp_up_strategy, *rates)


def gaps(num: int, rate: float | RampUp, burstiness: float, seed: int) -> list[float]:
    """Seconds before each arrival: the first comes at once, the mean of the rest is 1 / rate."""
    if rate == float("inf"):
        return [0.0] * num
    draw = random.Random(seed)
    rates = [rate.rate(i / max(1, num - 1)) if isinstance(rate, RampUp) else rate for i in range(1, num)]
    return [0.0, *(draw.gammavariate(burstiness, 1 / (now * burstiness)) for now in rates)]


async def paced(requests: list[Any], gaps: Sequence[float], start: float) -> AsyncIterator[Any]:
    """Each request at its time. Times are added up from the start, so that lateness does not pile up."""
    due = start
    for request, gap in zip(requests, gaps):
        due += gap
        wait = due - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        yield request
