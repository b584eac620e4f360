"""Texts with toxic spans, for a tagger: how spans are written, and the tokens' targets made of them.

Spans are read as SemEval-2021 task 5 writes them (a list of character offsets, in CSV as its text), as lists of
[start, end), or as objects with `start` and `end`. Offsets count characters, not bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from models.scorers.tagger import encode_windows
from models.training.labelled import TRAIN, side_of, split_key, text_values
from models.training.shards import ShardListing, ShardReader
from schemas.errors import InputError

IGNORE = -100
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SpanSource:
    """A set of texts with spans.

    Attributes:
        data: File, folder, glob or URL.
        text_column: The texts.
        spans_column: Their toxic spans.
        name: What the set is called.
    """

    data: str
    text_column: str = "text"
    spans_column: str = "spans"
    name: str = ""

    @property
    def columns(self) -> list[str]:
        """The columns read."""
        return [self.text_column, self.spans_column]

    @property
    def title(self) -> str:
        """Its name."""
        from models.training.labelled import source_title

        return self.name or source_title(self.data)

    def describe(self) -> dict[str, Any]:
        """What tells it from other readings of the same files."""
        return {"text_column": self.text_column, "spans_column": self.spans_column, "name": self.title}


@dataclass
class SpanExamples:
    """Windows of texts with their tokens' targets, and the texts.

    Attributes:
        ids: Token ids of each of n windows.
        targets: 1 toxic, 0 not, `IGNORE` for special tokens; as long as `ids`.
        owner: Number of each window's text, (n,).
        texts: The texts.
        gold: Each text's toxic characters.
        side: Side of each text, (texts,).
        counts: rows, texts, windows, tokens, toxic_tokens, empty, without_spans.
    """

    ids: list[npt.NDArray[np.int32]] = field(default_factory=list)
    targets: list[npt.NDArray[np.int64]] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    gold: list[frozenset[int]] = field(default_factory=list)
    side: list[int] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def lengths(self) -> IntArray:
        """Tokens of each window, (n,)."""
        return np.fromiter(map(len, self.ids), np.int64, len(self.ids))

    def windows(self, *sides: int) -> IntArray:
        """Numbers of the windows whose text is on one of the sides."""
        chosen = np.isin(np.asarray(self.side, np.int64)[self.owner] if self.owner else [], sides)
        return np.flatnonzero(chosen)

    def text_numbers(self, *sides: int) -> IntArray:
        """Numbers of the texts on one of the sides."""
        return np.flatnonzero(np.isin(self.side, sides))


def read_span_examples(
    source: SpanSource, listing: ShardListing, tokenizer: Any, *, max_length: int, eval_fraction: float
) -> SpanExamples:
    """Read and tokenise texts with spans.

    Args:
        source: The set.
        listing: Its shards.
        tokenizer: A fast tokenizer.
        max_length: Most tokens of a window; longer texts become several windows.
        eval_fraction: Share held out by a hash of the text: half to tune the threshold on, half to test.

    Raises:
        InputError: A shard, column or span cannot be read; nothing to train on.
    """
    out = SpanExamples()
    for batch in ShardReader(listing, source.columns):
        out.counts["rows"] += batch.num_rows
        texts = text_values(batch, source.text_column, source.data)
        kept: list[str] = []
        for text, value in zip(texts, batch.column(source.spans_column).to_pylist(), strict=True):
            if not text or not text.strip():
                out.counts["empty"] += 1
                continue
            row = out.counts["rows"] - batch.num_rows + len(kept)
            gold = parse_spans(value, text, f"{source.data}, about row {row}, column '{source.spans_column}'")
            out.counts["without_spans"] += not gold
            kept.append(text)
            out.gold.append(gold)
            out.side.append(side_of(split_key(text), eval_fraction))
        first = len(out.texts)
        out.texts += kept
        for window in encode_windows(tokenizer, kept, max_length, overlap=0) if kept else ():
            number = first + window.owner
            out.owner.append(number)
            out.ids.append(np.asarray(window.ids, np.int32))
            out.targets.append(token_targets(window.offsets, out.gold[number]))
    out.counts["texts"], out.counts["windows"] = len(out.texts), len(out.ids)
    out.counts["tokens"] = int(out.lengths.sum())
    out.counts["toxic_tokens"] = sum(int((t == 1).sum()) for t in out.targets)
    if not len(out.text_numbers(TRAIN)) or not out.counts["toxic_tokens"]:
        raise InputError(
            f"{source.data}: no toxic span to train on in {out.counts['rows']:,} rows; check --spans-column"
        )
    return out


def parse_spans(value: Any, text: str, where: str) -> frozenset[int]:
    """The toxic characters a cell names.

    Args:
        value: A list, its JSON text, or nothing.
        text: The text it belongs to.
        where: For the message.

    Raises:
        InputError: It is neither form, or lies outside the text.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except ValueError as error:
            raise InputError(f"{where}: '{value[:40]}' is no list of offsets") from error
    if value is None:
        return frozenset()
    if not isinstance(value, list):
        raise InputError(f"{where}: a {type(value).__name__} is no list of offsets")
    found: set[int] = set()
    for item in value:
        if isinstance(item, dict):
            item = [item.get("start"), item.get("end")]
        pair = item if isinstance(item, list | tuple) else [item, item + 1] if isinstance(item, int) else []
        if len(pair) != 2 or not all(isinstance(x, int) for x in pair):
            raise InputError(f"{where}: '{item}' is no offset, [start, end] or object with start and end")
        start, end = pair
        if not 0 <= start <= end <= len(text):
            raise InputError(
                f"{where}: {start} to {end} lies outside the text ({len(text)} characters); offsets count characters"
            )
        found.update(range(start, end))
    return frozenset(found)


def token_targets(offsets: Sequence[tuple[int, int]], gold: frozenset[int]) -> npt.NDArray[np.int64]:
    """1 for tokens at least half of whose characters are toxic, 0 for others, `IGNORE` for special tokens."""
    return np.array(
        [
            IGNORE if end <= start else int(2 * sum(i in gold for i in range(start, end)) >= end - start)
            for start, end in offsets
        ],
        np.int64,
    )
