"""What a format is: how it is recognised, read and written, and what it cannot hold."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import pyarrow as pa

from schemas.errors import InputError
from schemas.judgments import JUDGMENT_SCHEMA
from schemas.pools import POOL_SCHEMA
from transforms.retrieval.collection import RetrievalData
from transforms.shards.files import Folder


@dataclass(frozen=True)
class Source:
    """A file or folder to read.

    Attributes:
        url: As the user named it.
        folder: The folder it is, or lies in.
        file: Its name in the folder; None where it is the folder.
    """

    url: str
    folder: Folder
    file: str | None = None

    @classmethod
    def open(cls, url: str, options: dict[str, Any] | None = None) -> Source:
        """Find it.

        Raises:
            InputError: There is nothing of that name.
        """
        here = Folder(url, **(options or {}))
        if not here.exists():
            raise InputError(f"no such input: {url}")
        if here.fs.isdir(here.root):
            return cls(url, here)
        if here.root.endswith(".zip"):
            return cls(url, _inside(url, options))
        parent, _, name = here.root.rpartition("/")
        above = Folder(here.fs.unstrip_protocol(parent or "/"), **(options or {}))
        return cls(url, above, name)

    def files(self) -> list[str]:
        """Visible files, relative to the folder."""
        if self.file is not None:
            return [self.file]
        return [n for n in self.folder.find() if not any(p.startswith((".", "_")) for p in n.split("/"))]


def _inside(url: str, options: dict[str, Any] | None) -> Folder:
    """The folder a .zip holds: its root, or the one folder in it."""
    given = dict(options or {})
    if "::" not in url and given:  # options are those of the filesystem the archive lies on
        given = {url.split("://")[0]: given} if "://" in url else {}
    try:
        root = Folder(f"zip://::{url}", **given)
        names = root.find()
    except (OSError, ValueError) as error:
        raise InputError(f"{url} cannot be read as a .zip ({error})") from error
    except zipfile.BadZipFile as error:
        raise InputError(f"{url} is not a .zip ({error})") from error
    tops = {n.split("/")[0] if "/" in n else "" for n in names if not n.startswith(("__MACOSX/", "."))}
    only = next(iter(tops)) if len(tops) == 1 else ""
    return Folder(f"zip://{only}::{url}", **given) if only else root


@dataclass(frozen=True)
class ImportOptions:
    """What a file cannot say of itself.

    Attributes:
        label_source: human or llm; None leaves it to the format (human, but for a teacher's scores).
        annotator: Who judged; None: nobody named, so the label source stands for it.
        signal: What the label is: qrels, teacher_score, ...; None leaves it to the format.
        target_model: Reader the labels hold for; None = any.
        splits: Splits to read; none = all.
        corpus_source: Which copy of the documents, where there are several (human, a model's name); `all` keeps every
            copy under `<id>-<source>`.
        negatives: Given negatives are candidates (`pool`, as nobody judged them) or labels of grade 0 (`judged`).
        run_tag: Source of candidates that carry no tag.
    """

    label_source: str | None = None
    annotator: str | None = None
    signal: str | None = None
    target_model: str | None = None
    splits: tuple[str, ...] = ()
    corpus_source: str | None = None
    negatives: str = "pool"
    run_tag: str = "given"

    def __post_init__(self) -> None:
        from schemas.judgments import LABEL_SOURCES

        if self.label_source is not None and self.label_source not in LABEL_SOURCES:
            raise InputError(f"label source '{self.label_source}' is not one of {', '.join(LABEL_SOURCES)}")
        if self.negatives not in ("pool", "judged"):
            raise InputError(f"--negatives '{self.negatives}' is neither pool nor judged")

    def wants(self, split: str) -> bool:
        """Whether a split is to be read."""
        return not self.splits or split in self.splits

    def judgments(
        self, columns: dict[str, list[Any]], signal: str = "qrels", label_source: str = "human"
    ) -> pa.Table:
        """Columns as a judgment table, the rest filled from these options.

        Args:
            columns: Equally long lists by column name, query_id and doc_id among them.
            signal: Unless the options name one.
            label_source: Unless the options name one.
        """
        n = len(columns["query_id"])
        source = self.label_source or label_source
        constant = {
            "label_source": source,
            "annotator": self.annotator or source,
            "target_model": self.target_model,
            "signal": self.signal or signal,
            "parse_status": "ok",
        }
        arrays = []
        for column in JUDGMENT_SCHEMA:
            if column.name in columns:
                arrays.append(pa.array(columns[column.name], column.type))
            elif column.name == "context_ids":
                arrays.append(pa.array([[]] * n, column.type))
            else:
                arrays.append(pa.repeat(pa.scalar(constant.get(column.name), column.type), n))
        return pa.table(arrays, schema=JUDGMENT_SCHEMA)


def pool_table(columns: dict[str, list[Any]]) -> pa.Table:
    """Columns as a pool."""
    return pa.table([pa.array(columns[f.name], f.type) for f in POOL_SCHEMA], schema=POOL_SCHEMA)


@dataclass(frozen=True)
class ExportOptions:
    """How a collection is written.

    Attributes:
        split: Name of the split of labels that have none.
        positive_from: Least grade of a positive, where the format has positives.
        negatives: Negatives a row, where the format has them; None = all.
        layout: sentence-transformers: pair, triplet, n-tuple, labeled-pair, labeled-list.
        tag: Name of a run.
    """

    split: str = "test"
    positive_from: int = 1
    negatives: int | None = None
    layout: str | None = None
    tag: str = "tamis"


@dataclass
class Exported:
    """What was written.

    Attributes:
        files: Name -> rows.
        lost: What the format could not hold, a line each.
    """

    files: dict[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ExportData:
    """What is to be written: one label a pair.

    Attributes:
        labels: query_id, doc_id, grade (not null), positive, value, rank, pool_rank, split, place (the row's in the
            source); by query, documents in order of quality.
        data: The collection they come from.
    """

    labels: pl.DataFrame
    data: RetrievalData

    def query_texts(self) -> dict[str, str]:
        """Text by query id.

        Raises:
            InputError: A labelled query has no text.
        """
        texts = {
            q: t
            for q, t in zip(
                self.data.queries["query_id"].to_pylist(), self.data.queries["text"].to_pylist(), strict=True
            )
            if t is not None
        }
        missing = [q for q in self.labels["query_id"].unique(maintain_order=True) if q not in texts]
        if missing:
            raise InputError(
                f"{len(missing):,} queries have no text, the first '{missing[0]}'; pass --queries FILE"
            )
        return texts


Reader = Callable[[Source, ImportOptions], RetrievalData]
Writer = Callable[[ExportData, Folder, ExportOptions], Exported]


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        name: As `--format` names it.
        title: For people.
        recognises: Whether a source is of it; None: never told by itself.
        read: Reads a source; None: only written.
        write: Writes into a folder; None: only read.
        holds: What it can hold beside query_id and doc_id: judgment columns, and `positives` (positive or not, in
            order), `pool`, `queries`, `documents`,
            `titles`, `ids`, `known_to`. What it holds comes back as it was.
        needs_texts: Whether it cannot be written without the texts.
    """

    name: str
    title: str
    recognises: Callable[[Source], bool] | None
    read: Reader | None
    write: Writer | None
    holds: frozenset[str] = frozenset()
    needs_texts: bool = False
