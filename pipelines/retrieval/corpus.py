"""A corpus as retrievers see it: ids and their order in memory, texts passed over once for whatever is still to be built.

    WORK/corpus-<key>/ids.parquet   every document's id, and whether it has text
                     /survey.json   counts; there means that the ids are whole
                     /text/*.parquet  doc_id, text: what encoders by name embed
                     /text.json     there means that they are whole
    WORK/bm25-<key>/                an index of bm25s, memory-mapped

In memory stay the ids (some 20 bytes a document), two numbers a document, and while a BM25 index is made four bytes a word.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from schemas.errors import InputError
from schemas.fingerprint import config_hash, fingerprint
from transforms.embed.text import TextTemplate
from transforms.retrieval.collection import Documents
from transforms.retrieval.lexical import BM25Settings, IndexBuilder
from transforms.shards.files import Folder

IntArray = npt.NDArray[np.int64]
DEFAULT_TEXT = "{title} {text}"
_PART_ROWS = 100_000
_EVERY = 10.0  # seconds between lines
_SCHEMA = pa.schema([pa.field("doc_id", pa.string()), pa.field("text", pa.string())])


@dataclass(frozen=True)
class CorpusSource:
    """Where documents come from, and which text of theirs is looked at.

    Attributes:
        documents: Streams them.
        template: Their text, of the columns title and text.
        fingerprint: Names their content.
    """

    documents: Documents
    template: TextTemplate
    fingerprint: str

    def __post_init__(self) -> None:
        strange = set(self.template.columns) - {"doc_id", "title", "text", "source"}
        if strange:
            raise InputError(f"--text names '{min(strange)}'; documents have doc_id, title, text and source")

    @property
    def key(self) -> str:
        """Names the documents and their texts."""
        return fingerprint(self.fingerprint, self.template.template)

    def texts(self) -> Iterator[tuple[list[str], list[str]]]:
        """Ids and texts by the batch; a text that is not there is empty."""
        for batch in self.documents():
            texts = self.template.render(batch).to_pylist()
            yield batch.column("doc_id").to_pylist(), [t or "" for t in texts]


@dataclass
class Corpus:
    """The documents of a corpus by number: 0, 1, ... in the order they come.

    Attributes:
        key: Names documents and texts.
        ids: Their ids.
        empty: bool by number: no text.
        counts: documents, empty, repeated_ids, repeated_texts.
    """

    key: str
    ids: pa.Array
    empty: npt.NDArray[np.bool_]
    counts: dict[str, int]
    order: IntArray = field(init=False)

    def __post_init__(self) -> None:
        by_id = pc.sort_indices(self.ids).to_numpy()
        self.order = np.empty(len(by_id), np.int64)
        self.order[by_id] = np.arange(len(by_id))

    def __len__(self) -> int:
        return len(self.ids)

    def numbers(self, ids: Sequence[str] | pa.Array) -> IntArray:
        """Numbers of documents by id, -1 where there is none of that id."""
        wanted = ids if isinstance(ids, pa.Array) else pa.array(ids, pa.string())
        found = pc.index_in(wanted.cast(pa.string()), value_set=self.ids)
        return pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)

    def names(self, numbers: IntArray) -> list[str]:
        """Ids of documents by number."""
        found: list[str] = self.ids.take(pa.array(numbers)).to_pylist()
        return found

    def sorted_ids(self) -> list[str]:
        """All ids in alphabetical order, so that what is drawn from them does not depend on shards."""
        found: list[str] = self.ids.take(pc.sort_indices(self.ids)).to_pylist()
        return found


class Workshop:
    """Where what retrievers need is built, and found again.

    Args:
        folder: `OUT/_tamis`, or any other folder.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def place(self, name: str) -> Path:
        """A local folder of this name; on an object store one that lives as long as the process."""
        if self.folder.is_local:
            return self.folder.local(name)
        self._temporary = self._temporary or tempfile.TemporaryDirectory(prefix="tamis-")
        return Path(self._temporary.name) / name

    def index_place(self, source: CorpusSource, settings: BM25Settings) -> Path:
        """Where the BM25 index of a corpus is."""
        return self.place(f"bm25-{fingerprint(source.key, config_hash(settings.deciding))[:16]}")

    def text_place(self, source: CorpusSource) -> str:
        """Where the texts of a corpus are, as a URL."""
        return f"{self.folder.url.rstrip('/')}/{_home(source)}/text"

    def prepare(
        self,
        source: CorpusSource,
        *,
        bm25: Sequence[BM25Settings] = (),
        texts: bool = False,
        tell: Callable[[int], None] = lambda n: None,
    ) -> Corpus:
        """Build what is not there yet, by one pass over the documents.

        Args:
            source: The documents.
            bm25: Indexes that are needed.
            texts: Whether the texts are needed as shards.
            tell: Called with how many more documents were passed.

        Raises:
            InputError: There are no documents, or none has text.
        """
        home = _home(source)
        missing = [s for s in bm25 if not (self.index_place(source, s) / "settings.json").exists()]
        need_texts = texts and not self.folder.exists(f"{home}/text.json")
        if missing or need_texts or not self.folder.exists(f"{home}/survey.json"):
            repeated = self._repeated(home)
            while True:
                again = self._pass(source, missing, need_texts, repeated, tell)
                if again is None:
                    break
                repeated = again
        survey = orjson.loads(self.folder.read(f"{home}/survey.json"))
        with self.folder.open(f"{home}/ids.parquet") as file:
            table = pq.read_table(file)
        empty = table["empty"].to_numpy(zero_copy_only=False)
        return Corpus(source.key, table["id"].combine_chunks(), empty, survey["counts"])

    def _repeated(self, home: str) -> IntArray:
        """Rows an earlier pass found to repeat an id."""
        if self.folder.exists(f"{home}/survey.json"):
            return np.asarray(orjson.loads(self.folder.read(f"{home}/survey.json"))["repeated"], np.int64)
        return np.zeros(0, np.int64)

    def _pass(
        self,
        source: CorpusSource,
        bm25: Sequence[BM25Settings],
        texts: bool,
        repeated: IntArray,
        tell: Callable[[int], None],
    ) -> IntArray | None:
        """One pass; None when all is built, else the rows it should have left out."""
        home = _home(source)
        builders = [IndexBuilder(s) for s in bm25]
        stage = _Stage(self.folder.child(f"{home}/text")) if texts else None
        left_out = set(repeated.tolist())
        ids: list[pa.Array] = []
        hashes: list[npt.NDArray[np.uint64]] = []
        number = row = 0
        for batch_ids, batch_texts in source.texts():
            keep = [i for i in range(len(batch_ids)) if row + i not in left_out] if left_out else None
            row += len(batch_ids)
            if keep is not None and len(keep) < len(batch_ids):
                batch_ids, batch_texts = [batch_ids[i] for i in keep], [batch_texts[i] for i in keep]
            for builder in builders:
                for i, text in enumerate(batch_texts):
                    builder.add(number + i, text)
            if stage is not None:
                stage.add(batch_ids, batch_texts)
            ids.append(pa.array(batch_ids, pa.string()))
            hashes.append(np.array([_hash(t) for t in batch_texts], np.uint64))
            number += len(batch_ids)
            tell(len(batch_ids))
        if not number:
            raise InputError("there are no documents")
        every = pa.concat_arrays(ids)
        if (again := _repeats(every, repeated)) is not None:
            return again
        digests = np.concatenate(hashes)
        empty = digests == 0
        if empty.all():
            raise InputError(f"none of {number:,} documents has text (--text {source.template.template})")
        for builder, settings in zip(builders, bm25, strict=True):
            builder.save(self.index_place(source, settings))
        if stage is not None:
            stage.close()
            self.folder.write(f"{home}/text.json", orjson.dumps({"documents": number}))
        with self.folder.publish(f"{home}/ids.parquet") as temporary:
            pq.write_table(pa.table({"id": every, "empty": pa.array(empty)}), temporary, compression="zstd")
        counts = {
            "documents": number,
            "empty": int(empty.sum()),
            "repeated_ids": len(repeated),
            "repeated_texts": int((~empty).sum()) - len(np.unique(digests[~empty])),
        }
        survey = {"counts": counts, "repeated": repeated.tolist()}
        self.folder.write(f"{home}/survey.json", orjson.dumps(survey))
        return None


@contextmanager
def passing(what: str, mode: str) -> Iterator[Callable[[int], None]]:
    """Give a function to be called with how many more were passed; it says so now and then, for nobody knows the end."""
    done, said = 0, time.monotonic()

    def tell(n: int) -> None:
        nonlocal done, said
        done += n
        if mode != "quiet" and time.monotonic() - said > _EVERY:
            said = time.monotonic()
            print(f"{what}: {done:,}", file=sys.stderr, flush=True)

    yield tell


class _Stage:
    """Texts as shards."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        folder.remove("")
        self._ids: list[str] = []
        self._texts: list[str] = []
        self._parts = 0

    def add(self, ids: list[str], texts: list[str]) -> None:
        self._ids += ids
        self._texts += texts
        if len(self._ids) >= _PART_ROWS:
            self.close()

    def close(self) -> None:
        if not self._ids:
            return
        table = pa.table([pa.array(self._ids), pa.array(self._texts)], schema=_SCHEMA)
        with self.folder.publish(f"part-{self._parts:05d}.parquet") as temporary:
            pq.write_table(table, temporary, compression="zstd", row_group_size=8192)
        self._parts += 1
        self._ids, self._texts = [], []


def _home(source: CorpusSource) -> str:
    return f"corpus-{source.key[:16]}"


def _hash(text: str) -> int:
    """Of a text's words; 0 for a blank one."""
    words = " ".join(text.split())
    return xxhash.xxh3_64_intdigest(words.encode("utf-8", "surrogatepass")) or 1 if words else 0


def _repeats(ids: pa.Array, known: IntArray) -> IntArray | None:
    """Rows of the source whose id stood there before; None where there are none beside those known."""
    if pc.count_distinct(ids).as_py() == len(ids):
        return None
    if len(known):
        raise InputError("the documents are not the same in every pass; does something write to them?")
    seen: set[str] = set()
    rows = [i for i, name in enumerate(ids.to_pylist()) if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
    return np.asarray(rows, np.int64)


def documents_in(ids: Sequence[str], documents: Documents) -> Iterator[pa.RecordBatch]:
    """The documents of some ids, as they come, the first of several of one id; one pass, a batch at a time."""
    wanted = pa.array(sorted(set(ids)), pa.string())
    given: set[str] = set()
    for batch in documents():
        chosen = batch.filter(pc.is_in(batch.column("doc_id"), wanted))
        names: list[Any] = chosen.column("doc_id").to_pylist()
        fresh = [i for i, n in enumerate(names) if n not in given and not given.add(n)]  # type: ignore[func-returns-value]
        if fresh:
            yield chosen if len(fresh) == len(names) else chosen.take(pa.array(fresh))
