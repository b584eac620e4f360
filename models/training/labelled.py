"""Labelled texts for a classifier: which columns say what, and the examples made of them.

A label's target is a probability in [0, 1], or unknown (null, NaN, blank, or -1 as Jigsaw marks what was not judged); so is
a class that is null, NaN or blank. Unknown labels carry no loss. Several sets with different labels can be learned together: what a set does not say is unknown.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from models.training.shards import ShardListing, ShardReader
from schemas.columns import is_text, to_plain_text
from schemas.errors import InputError, TamisError
from schemas.fingerprint import digest, fingerprint

TRAIN, CALIBRATE, TEST = 0, 1, 2  # sides of the split
LABEL = "toxicity"  # what a single label is called
_KEYS = ("text", "labels", "label", "positive", "weight", "name")
_OPTION = re.compile(rf",(?={'|'.join(_KEYS)}=)")
_TRUE, _FALSE = {"true", "yes", "t", "y"}, {"false", "no", "f", "n"}
_NOTHING = {"", "nan", "null"}  # as text; "none" is a class in some sets
_SPACE = re.compile(r"\s+")
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LabelledSource:
    """One set of labelled texts, and what its columns mean.

    Attributes:
        data: File, folder, glob or URL.
        text_column: The texts.
        labels: Columns of 0/1 or probabilities, one a label.
        label_column: A column of class names, instead of `labels`; its label is called `toxicity`.
        positive: The class names that mean toxic.
        weight: How often the set counts in an epoch; a fraction takes a part of it, by a hash of the text.
        name: What the set is called in figures and in the training-data tag; default: the file's or folder's name.
    """

    data: str
    text_column: str = "text"
    labels: tuple[str, ...] = ()
    label_column: str = ""
    positive: tuple[str, ...] = ()
    weight: float = 1.0
    name: str = ""

    @classmethod
    def parse(cls, text: str, **defaults: Any) -> LabelledSource:
        """Read `PATH[,key=value]...`; keys: text, labels (a+b), label, positive (x+y), weight, name.

        Args:
            text: What the user typed.
            **defaults: Values of attributes the text does not give.

        Raises:
            TamisError: A value is no good, or columns are named both ways.

        Example:
            >>> LabelledSource.parse("tweets.csv,text=tweet,label=class,positive=0+1").positive
            ('0', '1')
        """
        data, *options = _OPTION.split(text)
        given = {}
        for option in options:
            key, _, value = option.partition("=")
            given[key] = value.strip()
        values: dict[str, Any] = {"text_column": "text", **defaults, "data": data}
        names = {"text": "text_column", "label": "label_column", "name": "name"}
        values.update({names[k]: v for k, v in given.items() if k in names})
        values.update({k: _split(v, "+") for k, v in given.items() if k in ("labels", "positive")})
        if "label" in given or "positive" in given:
            values["labels"] = _split(given.get("labels", ""), "+")
        elif "labels" in given:
            values["label_column"], values["positive"] = "", ()
        if "weight" in given:
            try:
                values["weight"] = float(given["weight"])
            except ValueError as error:
                raise TamisError(f"{text}: weight={given['weight']} is no number") from error
        source = cls(**values)
        source._check(text)
        return source

    def _check(self, text: str) -> None:
        if self.labels and self.label_column:
            raise TamisError(f"{text}: both --labels and --label-column are given; a set has one of them")
        if not self.labels and not self.label_column:
            raise TamisError(
                f"{text}: say what is learned: --labels A,B,C, or --label-column with --positive"
            )
        if self.label_column and not self.positive:
            raise TamisError(f"{text}: say which classes of '{self.label_column}' are toxic: --positive A,B")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise TamisError(f"{text}: weight must be above 0")

    @property
    def columns(self) -> list[str]:
        """The columns read."""
        return [self.text_column, *(self.labels or (self.label_column,))]

    @property
    def names(self) -> tuple[str, ...]:
        """The labels it knows."""
        return self.labels or (LABEL,)

    @property
    def title(self) -> str:
        """Its name."""
        return self.name or source_title(self.data)

    def describe(self) -> dict[str, Any]:
        """What tells it from other readings of the same files, for hashes and records."""
        return {
            "text_column": self.text_column,
            "labels": list(self.labels),
            "label_column": self.label_column,
            "positive": list(self.positive),
            "weight": self.weight,
            "name": self.title,
        }


@dataclass
class LabelledExamples:
    """Tokenised examples with their targets.

    Attributes:
        labels: Names of the label columns.
        ids: Token ids of each of n examples, special tokens included.
        targets: float32 (n, labels); NaN = unknown.
        source: Number of each example's set, (n,).
        side: `TRAIN`, `CALIBRATE` or `TEST`, (n,).
        repeats: How often each example stands in an epoch, (n,).
        counts: rows, examples, tokens, empty, unlabelled, cut.
    """

    labels: tuple[str, ...]
    ids: list[npt.NDArray[np.int32]]
    targets: FloatArray
    source: IntArray
    side: IntArray
    repeats: IntArray
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def lengths(self) -> IntArray:
        """Tokens of each example, (n,)."""
        return np.fromiter(map(len, self.ids), np.int64, len(self.ids))

    def numbers(self, *sides: int) -> IntArray:
        """Numbers of the examples of some sides; those to train on as often as they count."""
        chosen = np.flatnonzero(np.isin(self.side, sides))
        return np.repeat(chosen, self.repeats[chosen]) if sides == (TRAIN,) else chosen


def label_names(sources: Sequence[LabelledSource]) -> tuple[str, ...]:
    """All labels of the sets: `toxicity` (or `toxic`) first, the others as they are met.

    Raises:
        TamisError: A label is named twice in one set.
    """
    for source in sources:
        if len(set(source.names)) < len(source.names):
            raise TamisError(f"{source.data}: a label is named twice in {', '.join(source.names)}")
    names = list(dict.fromkeys(name for source in sources for name in source.names))
    headline = next((n for n in ("toxicity", "toxic") if n in names), names[0])
    return (headline, *(n for n in names if n != headline))


def read_examples(
    sources: Sequence[LabelledSource],
    listings: Sequence[ShardListing],
    tokenizer: Any,
    *,
    max_length: int,
    eval_fraction: float,
) -> LabelledExamples:
    """Read and tokenise labelled sets.

    Args:
        sources: The sets.
        listings: Their shards.
        tokenizer: A fast tokenizer.
        max_length: Most tokens of an example; the rest of a longer text is left out, and counted.
        eval_fraction: Share held out by a hash of the text: half to calibrate on, half to test.

    Raises:
        InputError: A shard, column or label cannot be read; nothing to train on.
    """
    labels = label_names(sources)
    out = LabelledExamples(
        labels, [], np.zeros((0, len(labels)), np.float32), *(np.zeros(0, np.int64) for _ in range(3))
    )
    targets, owner, side, repeats = [], [], [], []
    for number, (source, listing) in enumerate(zip(sources, listings, strict=True)):
        columns = [labels.index(name) for name in source.names]
        for batch in ShardReader(listing, source.columns):
            out.counts["rows"] += batch.num_rows
            texts = text_values(batch, source.text_column, source.data)
            known = np.full((len(texts), len(labels)), np.nan, np.float32)
            known[:, columns] = read_targets(batch, source)
            filled = np.array([bool(t and t.strip()) for t in texts], bool)
            labelled = ~np.isnan(known).all(axis=1)
            out.counts["empty"] += int((~filled).sum())
            out.counts["unlabelled"] += int((filled & ~labelled).sum())
            kept = np.flatnonzero(filled & labelled)
            if not len(kept):
                continue
            chosen = [str(texts[i]) for i in kept]
            out.ids += first_windows(tokenizer, chosen, max_length, out.counts)
            targets.append(known[kept])
            owner += [number] * len(kept)
            keys = [split_key(text) for text in chosen]
            side += [side_of(key, eval_fraction) for key in keys]
            repeats += [repeats_of(key, source.weight) for key in keys]
    out.targets = np.concatenate([out.targets, *targets])
    out.source, out.side, out.repeats = (np.asarray(v, np.int64) for v in (owner, side, repeats))
    out.counts["examples"] = len(out.ids)
    out.counts["tokens"] = int(out.lengths.sum())
    check_balance(out, sources)
    return out


def check_balance(examples: LabelledExamples, sources: Sequence[LabelledSource]) -> None:
    """Refuse labels there is nothing to learn about.

    Raises:
        InputError: No example to train on, or a label that is always on or always off.
    """
    names = " + ".join(source.data for source in sources)
    train = examples.targets[examples.numbers(TRAIN)]
    if not len(train):
        rows = examples.counts["rows"]
        raise InputError(f"{names}: no labelled text to train on in {rows:,} rows")
    for column, label in enumerate(examples.labels):
        known = train[:, column][~np.isnan(train[:, column])]
        if not len(known) or known.min() >= 0.5 or known.max() < 0.5:
            what = "never judged" if not len(known) else "always on" if known.min() >= 0.5 else "never on"
            hint = ""
            if len(known) and any(s.label_column for s in sources) and label == LABEL:
                hint = "; check --positive"
            raise InputError(f"{names}: label '{label}' is {what}, so nothing can be learned of it{hint}")


def text_values(batch: pa.RecordBatch, name: str, where: str) -> list[str | None]:
    """The texts of a column.

    Raises:
        InputError: It holds no text.
    """
    column = batch.column(name)
    if pa.types.is_null(column.type):
        return [None] * batch.num_rows
    if not is_text(column.type):
        raise InputError(f"{where}: column '{name}' is {column.type}, not text; pass --text-column")
    values: list[str | None] = to_plain_text(column).to_pylist()
    return values


def read_targets(batch: pa.RecordBatch, source: LabelledSource) -> FloatArray:
    """The targets of a batch's rows: float32 (rows, labels of the set), NaN where unknown.

    Raises:
        InputError: A value is no probability.
    """
    if source.label_column:
        wanted = {plain_class(v) for v in source.positive}
        values = batch.column(source.label_column).to_pylist()
        out = [math.nan if _is_unknown(v, wanted) else float(plain_class(v) in wanted) for v in values]
        return np.asarray(out, np.float32)[:, None]
    columns = [
        np.array([_probability(v, name, source.data) for v in batch.column(name).to_pylist()], np.float32)
        for name in source.labels
    ]
    return np.stack(columns, axis=1).reshape(batch.num_rows, len(source.labels))


def plain_class(value: Any) -> str:
    """A class name as it is compared: `1`, `1.0` and `"1"` are one; letters' case does not count."""
    text = str(value).strip().casefold()
    return text[:-2] if text.endswith(".0") and text[:-2].lstrip("-").isdigit() else text


def _is_unknown(value: Any, classes: AbstractSet[str] = frozenset()) -> bool:
    """Whether a cell says nothing: null, NaN, blank, or the name of such a thing where it is not one of the classes."""
    if value is None or value != value:
        return True
    return isinstance(value, str) and value.strip().casefold() in _NOTHING - classes


def _probability(value: Any, column: str, where: str) -> float:
    if _is_unknown(value):
        return math.nan
    if isinstance(value, str) and value.strip().casefold() in _TRUE | _FALSE:
        return float(value.strip().casefold() in _TRUE)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.inf
    if number == -1:
        return math.nan
    if not 0 <= number <= 1:
        raise InputError(
            f"{where}: '{value}' in column '{column}' is no label (0, 1, a probability, or empty for unknown); for class "
            "names pass --label-column and --positive"
        )
    return number


def first_windows(
    tokenizer: Any, texts: Sequence[str], max_length: int, counts: Counter[str]
) -> list[npt.NDArray[np.int32]]:
    """Token ids of each text's first `max_length` tokens; `counts['cut']` grows by the texts that are longer."""
    encoded = tokenizer(
        list(texts),
        truncation=True,
        max_length=max_length,
        return_overflowing_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    owner = np.asarray(encoded["overflow_to_sample_mapping"], np.int64)
    first = np.searchsorted(owner, np.arange(len(texts)))
    counts["cut"] += int((np.bincount(owner, minlength=len(texts)) > 1).sum())
    return [np.asarray(encoded["input_ids"][i], np.int32) for i in first]


def split_key(text: str) -> str:
    """What decides on a text's side: case and spacing left out, so that near copies stay together."""
    return _SPACE.sub(" ", text).strip().casefold()


def side_of(key: str, eval_fraction: float) -> int:
    """The side a text falls on, the same in every run."""
    place = _share("eval-split", key)
    return TRAIN if place >= eval_fraction else CALIBRATE if place < eval_fraction / 2 else TEST


def repeats_of(key: str, weight: float) -> int:
    """How often a text stands in an epoch: the weight, its fraction by a hash of the text."""
    whole = math.floor(weight)
    return whole + (_share("weight", key) < weight - whole)


def source_title(data: str) -> str:
    """What a file or folder is called where it has no other name."""
    stem = PurePath(data.rstrip("/")).name.split(".")[0]
    return re.sub(r"[^\w\-]+", "-", stem).strip("-") or "data"


def training_tag(title: str, fingerprints: Iterable[str]) -> str:
    """A set's tag: its name, and eight digits that change with its bytes."""
    return f"{title}-{fingerprint(*fingerprints)[:8]}"


def _share(*parts: str) -> float:
    return int.from_bytes(digest(*parts)[:8], "little") / 2**64


def _split(text: str, mark: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(mark) if part.strip())
