"""Localise by a trained tagger: the words a token classifier finds toxic where they stand (`tamis train spans`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from models.protocols import SpanFinder
from transforms.detox.localize import Span


@dataclass(frozen=True)
class TaggerLocalizer:
    """Spans are the tagger's; each carries the probability of its most toxic word.

    Attributes:
        tagger: The tagger.
        source: Its name, as spans carry it.
    """

    tagger: SpanFinder
    source: str = "tagger"

    def find(self, texts: Sequence[str]) -> list[list[Span]]:
        """For each text the tagger's spans."""
        return [
            [Span(start, end, min(1.0, float(score)), self.source) for start, end, score in spans]
            for spans in self.tagger.find(texts)
        ]
