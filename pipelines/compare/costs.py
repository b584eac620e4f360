"""What stages cost: the plan in lines, rates as they were measured, and how much time is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipelines.compare.plan import RATES, Stage, seconds
from pipelines.compare.receipts import Receipt


def describe(
    stages: Sequence[Stage], done: set[str], receipts: Mapping[str, Receipt], workers: int
) -> list[str]:
    """The plan, a line a stage, with what each costs."""
    rates = measured_rates(receipts)
    width = max(len(s.name) for s in stages)
    lines = []
    for stage in stages:
        if stage.name in done:
            cost = f"done in {clock(receipts[stage.name].seconds)}"
        elif stage.tokens:
            most = "at most " if stage.pace in {"plain", "steered"} else "about "
            cost = f"{most}{stage.tokens:,} tokens, {clock(seconds(stage, rates))}"
        else:
            cost = "seconds"
        lines.append(f"{stage.name:<{width}}  {cost}")
    left = [s for s in stages if s.name not in done]
    lines.append(f"{len(stages)} stages, {len(left)} to do; {time_left(left, receipts, workers)}")
    return lines


def measured_rates(receipts: Mapping[str, Receipt]) -> dict[str, float]:
    """Tokens a second by pace: what was measured here, else what is usual."""
    rates = dict(RATES)
    for pace in RATES:
        own = [r for r in receipts.values() if r.pace == pace and r.tokens and r.seconds]
        if own:
            rates[pace] = sum(r.tokens for r in own) / sum(r.seconds for r in own)
    return rates


def clock(value: float) -> str:
    """A time span for people."""
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    )


def time_left(stages: Sequence[Stage], receipts: Mapping[str, Receipt], workers: int) -> str:
    """How long these stages will take, side by side, at the rates measured so far."""
    rates = measured_rates(receipts)
    spans = [seconds(s, rates) for s in stages]
    least, workers = max(spans, default=0.0), max(1, workers)
    return f"about {clock(max(sum(spans) / workers, least))} on {workers} core{'s' if workers > 1 else ''}"
