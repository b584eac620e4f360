"""Spans as people write them, mixes of sources, and their character F1 (SemEval-2021 task 5)."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from models.metrics.bootstrap import DRAWS, Interval, mean_interval, ratio_interval
from schemas.errors import InputError
from transforms.detox.span_f1 import character_f1

Array = npt.NDArray[np.float64]

_MOST_SOURCES = 4  # 15 mixes; beyond, only each source and all of them
UNNAMED = "spans"


class ScoredSpan(NamedTuple):
    """A span in characters, end exclusive, with what is known of it."""

    start: int
    end: int
    score: float = 1.0
    source: str = UNNAMED


@dataclass(frozen=True)
class MixFigures:
    """How well a mix of sources finds the gold spans of n posts.

    Attributes:
        f1: Mean of the posts' character F1, as the shared task scores.
        f1_toxic: The same over the posts that have a gold span.
        precision: Of all predicted characters, the share that is gold (drawn by post); None without a prediction.
        recall: Of all gold characters, the share that was found.
        each: The n posts' F1.
        empty: Posts without a predicted span.
    """

    f1: Interval
    f1_toxic: Interval | None
    precision: Interval | None
    recall: Interval | None
    each: Array
    empty: int


def parse_spans(value: Any, where: str = "") -> list[ScoredSpan]:
    """Read spans in any of the forms they come in.

    Args:
        value: None; a list of character offsets; a list of (start, end) pairs; a list of mappings with start and end,
            perhaps score and source; or any of these as text (`"[3, 4, 5]"`, as the shared task's CSV files have it).
        where: Named in errors.

    Returns:
        Spans in ascending order; runs of offsets become spans.

    Raises:
        InputError: It is none of these.

    Example:
        >>> parse_spans("[3, 4, 5, 9]")
        [ScoredSpan(start=3, end=6, score=1.0, source='spans'), ScoredSpan(start=9, end=10, score=1.0, source='spans')]
    """
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value.strip() or "[]")
        except (ValueError, SyntaxError) as error:
            raise InputError(f"{where}: spans must be a list of offsets, not {value[:40]!r}") from error
    if value is None:
        return []
    items = list(value) if isinstance(value, Iterable) else [value]
    if all(_is_offset(x) for x in items):
        return _runs(sorted({int(x) for x in items}))
    return sorted(_span(item, where) for item in items)


def sources_of(posts: Iterable[Sequence[ScoredSpan]]) -> list[str]:
    """The names of all sources, sorted; a span several sources found (`lexicon+occlusion`) names each of them."""
    return sorted({name for spans in posts for s in spans for name in s.source.split("+")})


def mixes_of(sources: Sequence[str]) -> list[tuple[str, ...]]:
    """Every non-empty set of sources, small sets first; of more than four sources only each one and all of them."""
    sizes = range(1, len(sources) + 1) if len(sources) <= _MOST_SOURCES else sorted({1, len(sources)})
    return [mix for n in sizes for mix in itertools.combinations(sources, n)]


def mix_offsets(spans: Sequence[ScoredSpan], mix: Sequence[str], threshold: float = 0.0) -> set[int]:
    """Characters that a source of the mix (or several) covers with a span scored at least the threshold."""
    wanted = set(mix)
    return {
        i
        for s in spans
        if s.score >= threshold and not wanted.isdisjoint(s.source.split("+"))
        for i in range(s.start, s.end)
    }


def score_mix(
    predicted: Sequence[set[int]], gold: Sequence[set[int]], *, seed: int = 0, draws: int = DRAWS
) -> MixFigures:
    """Figures over n posts, intervals by post.

    Args:
        predicted: Characters predicted in each post.
        gold: Characters that are toxic.
        seed: Of the bootstrap.
        draws: How many resamples.
    """
    each = np.array([character_f1(p, g) for p, g in zip(predicted, gold, strict=True)])
    shared = np.array([len(p & g) for p, g in zip(predicted, gold, strict=True)], np.float64)
    found = np.array([len(p) for p in predicted], np.float64)
    there = np.array([len(g) for g in gold], np.float64)
    return MixFigures(
        mean_interval(each, seed, draws),
        mean_interval(each[there > 0], seed, draws) if there.any() else None,
        ratio_interval(shared, found, seed, draws) if found.any() else None,
        ratio_interval(shared, there, seed, draws) if there.any() else None,
        each,
        int((found == 0).sum()),
    )


def sweep(
    posts: Sequence[Sequence[ScoredSpan]],
    gold: Sequence[set[int]],
    mix: Sequence[str],
    thresholds: Sequence[float],
) -> list[tuple[float, float]]:
    """(threshold, mean F1) for each threshold on the spans' scores."""
    return [
        (
            t,
            float(
                np.mean([character_f1(mix_offsets(p, mix, t), g) for p, g in zip(posts, gold, strict=True)])
            ),
        )
        for t in thresholds
    ]


def _is_offset(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _runs(offsets: Sequence[int]) -> list[ScoredSpan]:
    out: list[ScoredSpan] = []
    for i in offsets:
        if out and out[-1].end == i:
            out[-1] = out[-1]._replace(end=i + 1)
        else:
            out.append(ScoredSpan(i, i + 1))
    return out


def _span(item: Any, where: str) -> ScoredSpan:
    if isinstance(item, Mapping) and _is_offset(item.get("start")) and _is_offset(item.get("end")):
        score, source = item.get("score"), item.get("source")
        # A source that gives no scores is sure of what it gives.
        return ScoredSpan(
            item["start"], item["end"], 1.0 if score is None else float(score), source or UNNAMED
        )
    pair = list(item) if isinstance(item, Sequence) and not isinstance(item, str) else []
    if len(pair) >= 2 and _is_offset(pair[0]) and _is_offset(pair[1]):
        return ScoredSpan(int(pair[0]), int(pair[1]))
    raise InputError(f"{where}: {str(item)[:60]!r} is no span; give offsets, [start, end] or {{start, end}}")
