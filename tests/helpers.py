"""Plain helpers shared by tests: sample steps (picklable, so workers can load them), corpora, and what an output holds."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.run import RunResult, RunSettings, run_job
from schemas import flight
from schemas.errors import FatalStepError
from schemas.fingerprint import digest
from transforms.shards.assemble import assemble_shard
from transforms.shards.engine import Job, read_units
from transforms.shards.files import Folder
from transforms.shards.finish import finish_output
from transforms.shards.formats import AssembleOptions, UnitLimits
from transforms.shards.inputs import list_input
from transforms.shards.plan import Plan, ReadTask, make_plan, plan_key, save_plan
from transforms.shards.receipts import Receipt, commit_unit, counters_of, with_counters
from transforms.shards.steps import StepContext, apply_step

# --------------------------------------------------------------------------------------------------- sample steps


@dataclass(frozen=True)
class Keep:
    """Changes nothing."""

    label: str = "Keep"

    def setup(self, context: StepContext) -> None: ...

    def __call__(self, batch: pa.RecordBatch, context: StepContext) -> pa.RecordBatch:
        return batch


@dataclass(frozen=True)
class Replace:
    """Replaces a word wherever it stands, with an edit for every row it changes and an attribute for every row."""

    before: str = "idiot"
    after: str = "person"
    label: str = "ReplaceWord"

    def setup(self, context: StepContext) -> None: ...

    def __call__(self, batch: pa.RecordBatch, context: StepContext) -> pa.RecordBatch:
        texts = batch.column(context.text_column)
        found = texts.to_pylist()
        edits: list[list[dict[str, Any]]] = []
        for text in found:
            at = (text or "").find(self.before)
            row = {"start": at, "end": at + len(self.before), "before": self.before, "after": self.after}
            edits.append([{**row, "action": "span_edit"}] if at >= 0 else [])
        new = [t if t is None else t.replace(self.before, self.after) for t in found]
        context.count("replace.tokens_out", sum(map(len, edits)))
        batch = flight.set_column(batch, context.text_column, pa.array(new, texts.type))
        batch = flight.add_edits(batch, edits)
        counts = [None if t is None else t.count(self.before) for t in found]
        return flight.set_attribute(batch, "hits", pa.array(counts, pa.int32()))


@dataclass(frozen=True)
class Drop:
    """Drops the rows that hold a word."""

    word: str = "spam"
    label: str = "DropRows"

    def setup(self, context: StepContext) -> None: ...

    def __call__(self, batch: pa.RecordBatch, context: StepContext) -> pa.RecordBatch:
        texts = batch.column(context.text_column).to_pylist()
        reasons = ["is_spam" if t and self.word in t else None for t in texts]
        return flight.drop_rows(batch, reasons, stage=self.label)


@dataclass(frozen=True)
class Fail:
    """Raises when any row of the batch holds a word, as a model does on a text it cannot take."""

    word: str = "poison"
    label: str = "FailOnWord"
    error: type[BaseException] = ValueError

    def setup(self, context: StepContext) -> None: ...

    def __call__(self, batch: pa.RecordBatch, context: StepContext) -> pa.RecordBatch:
        for text in batch.column(context.text_column).to_pylist():
            if text and self.word in text:
                raise self.error(f"cannot take {text[:40]!r}")
        return flight.set_scratch(batch, "seen", pa.repeat(pa.scalar(True), batch.num_rows))


@dataclass(frozen=True)
class NeedScratch:
    """Reads what `Fail` leaves in scratch, as later steps of a job do."""

    label: str = "NeedScratch"

    def setup(self, context: StepContext) -> None: ...

    def __call__(self, batch: pa.RecordBatch, context: StepContext) -> pa.RecordBatch:
        return flight.set_attribute(batch, "seen", flight.scratch(batch, "seen"))


@dataclass(frozen=True)
class Log:
    """Appends one line `<shard> <unit> <rows>` to a file for every unit it sees; the file is shared by all processes."""

    path: str
    label: str = "LogUnits"

    def setup(self, context: StepContext) -> None: ...

    def __call__(self, batch: pa.RecordBatch, context: StepContext) -> pa.RecordBatch:
        assert context.key is not None
        append_line(self.path, f"{context.key.shard} {context.key.unit} {batch.num_rows}")
        return batch


@dataclass(frozen=True)
class StopAt:
    """Stops the run at one unit, unless the file `allowed` exists."""

    allowed: str
    shard: str
    unit: int
    how: str = "fatal"  # fatal | interrupt | kill | term | int
    label: str = "StopAt"

    def setup(self, context: StepContext) -> None: ...

    def __call__(self, batch: pa.RecordBatch, context: StepContext) -> pa.RecordBatch:
        key = context.key
        assert key is not None
        if (key.shard, key.unit) == (self.shard, self.unit) and not Path(self.allowed).exists():
            if self.how == "fatal":
                raise FatalStepError("stopped by the test")
            if self.how == "interrupt":
                raise KeyboardInterrupt
            os.kill(
                os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}[self.how]
            )
        return batch


@dataclass(frozen=True)
class Ask:
    """Asks a pretended model about every text, through the request cache; each question is written down, as a bill is."""

    bill: str
    seconds: float = 0.0
    label: str = "AskModel"

    def setup(self, context: StepContext) -> None: ...

    def __call__(self, batch: pa.RecordBatch, context: StepContext) -> pa.RecordBatch:
        assert context.cache is not None
        texts = batch.column(context.text_column).to_pylist()
        answers = []
        for text in texts:
            key = digest("ask", text or "")
            (answer,) = context.cache.get_many([key])
            if answer is None:
                append_line(self.bill, key.hex())
                time.sleep(self.seconds)
                answer = (text or "").upper().encode()
                context.cache.put_many({key: answer})
            answers.append(answer.decode())
        return flight.set_attribute(batch, "answer", pa.array(answers, pa.string()))


def append_line(path: str, line: str) -> None:
    """Append a line to a file that other processes append to as well."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, line.encode() + b"\n")  # one write below PIPE_BUF: atomic between processes
    finally:
        os.close(descriptor)


def logged(path: Path) -> list[tuple[str, int, int]]:
    """What `Log` wrote: (shard, unit, rows)."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [(shard, int(unit), int(rows)) for shard, unit, rows in (line.rsplit(" ", 2) for line in lines)]


# -------------------------------------------------------------------------------------------------------- corpora

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "rain",
    "falls",
    "on",
    "Zürich",
    "and",
    "東京",
]


def sample_texts(n: int, *, seed: int = 0) -> list[str]:
    """n short texts; every 7th calls someone an idiot, every 11th is spam, every 13th is poison (and never both)."""
    texts = []
    for i in range(seed, seed + n):
        words = [WORDS[(i * 7 + j * 3) % len(WORDS)] for j in range(3 + i % 5)]
        mark = "poison" if i % 13 == 0 else "spam" if i % 11 == 0 else "idiot" if i % 7 == 0 else ""
        texts.append(" ".join([*words, mark, str(i)]).replace("  ", " "))
    return texts


def write_parquet(path: Path, texts: Sequence[str | None], **options: Any) -> None:
    """A Parquet shard with an id column and a number beside the text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "doc": [f"d{i}" for i in range(len(texts))],
            "text": pa.array(texts, pa.string()),
            "n": range(len(texts)),
        }
    )
    pq.write_table(table, path, **options)


def write_jsonl(path: Path, texts: Sequence[str | None]) -> None:
    """A JSONL shard with an id field and a number beside the text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (json.dumps({"doc": f"d{i}", "text": t, "n": i}) for i, t in enumerate(texts))
    path.write_text("".join(row + "\n" for row in rows))


def sample_corpus(root: Path, *, shards: int = 2, rows: int = 60) -> Path:
    """A folder of Parquet and JSONL shards, one of them in a sub-folder."""
    for i in range(shards):
        texts = sample_texts(rows, seed=i * rows)
        write_parquet(root / f"part-{i}.parquet", texts, row_group_size=max(1, rows // 3))
        write_jsonl(root / "more" / f"part-{i}.jsonl", texts)
    return root


# ------------------------------------------------------------------------------------------------------- running


def job(out: str | Path, steps: Iterable[Any] = (Keep(),), **fields: Any) -> Job:
    """A job over column `text`."""
    fields.setdefault("text_column", "text")
    return Job(fields.pop("name", "test"), "", str(out), steps=tuple(steps), **fields)


def run(
    source: str | Path,
    out: str | Path,
    steps: Iterable[Any] = (Keep(),),
    *,
    unit_rows: int | None = None,
    unit_bytes: int = 16 << 20,
    overwrite: bool = False,
    workers: int = 1,
    beam_args: tuple[str, ...] = (),
    dry_run: bool = False,
    **fields: Any,
) -> RunResult:
    """Run a job as a user would, on the runner."""
    limits = UnitLimits(unit_rows or 65_536, unit_bytes)
    settings = RunSettings(workers, limits, overwrite, dry_run, "quiet", beam_args)
    return run_job(job(out, steps, **fields), str(source), settings)


def run_plainly(
    source: str | Path,
    out: str | Path,
    steps: Iterable[Any] = (Keep(),),
    *,
    limits: UnitLimits = UnitLimits(),  # noqa: B008 - frozen
    options: AssembleOptions = AssembleOptions(),  # noqa: B008 - frozen
    id_column: str | None = None,
    text_column: str = "text",
) -> tuple[dict[str, Any], Plan]:
    """The engine's pure functions in a loop, with no runner: some thirty times faster, for properties over files."""
    listing = list_input(str(source))
    output = Folder(str(out))
    plan = make_plan(listing, text_column, id_column, limits)
    save_plan(plan, output)
    entries, receipts = [], []
    for shard in plan.shards:
        mine: list[Receipt] = []
        task = ReadTask(shard.name, 0, len(shard.units))
        for key, batch in read_units(listing.root, shard, task, text_column, id_column):
            context = StepContext(text_column, key=key)
            for step in steps:
                batch = apply_step(step, batch, context)
            batch = with_counters(batch, counters_of(batch) + context.counters)
            mine.append(commit_unit(output, key, batch, text_column, plan_key(shard, "test")))
        entries.append(assemble_shard(listing.root, output, shard, mine, text_column, options))
        receipts += mine
    facts = {"job": "test", "config": {}, "config_hash": "test", "models": [], "seed": 0, "lineage": None}
    return finish_output(listing.root, output, plan, entries, receipts, facts), plan


# ------------------------------------------------------------------------------------------------ what came of it

SIDECARS = ("edits", "attributes", "dropped", "dead")


def files_below(root: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def read_output(out: Path) -> dict[str, Any]:
    """All a reader can see of an output: `data/` byte for byte, the sidecars as rows."""
    found: dict[str, Any] = {f"data/{n}": c for n, c in files_below(out / "data").items()}
    for folder in SIDECARS:
        for name in files_below(out / folder):
            table = pq.read_table(out / folder / name)
            found[f"{folder}/{name}"] = (table.schema.to_string(), table.to_pylist())
    return found


def read_texts(path: Path, column: str = "text") -> list[str | None]:
    """The text column of a shard of any format."""
    if path.suffix == ".parquet":
        return pq.read_table(path).column(column).to_pylist()
    if path.suffix == ".arrow":
        return read_ipc(path)[0].column(column).to_pylist()
    return [json.loads(line).get(column) for line in path.read_text("utf-8-sig").splitlines() if line.strip()]


def read_ipc(path: Path) -> tuple[pa.Table, list[int]]:
    """An Arrow IPC file or stream, and the sizes of its batches."""
    with pa.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)] if is_file else list(reader)
        return pa.Table.from_batches(batches, reader.schema), [b.num_rows for b in batches]


def in_flight(texts: Sequence[str | None]) -> pa.RecordBatch:
    """A batch in flight over a `text` column."""
    batch = pa.record_batch({"text": pa.array(texts, pa.string())})
    return flight.launch(batch, first_row=0, ids=pa.array([f"r{i}" for i in range(len(texts))], pa.string()))


def fates(batch: pa.RecordBatch | pa.Table) -> list[int]:
    """The fate of every row."""
    return batch.column(flight.FATE).to_pylist()


def count_rows(table: pa.Table, column: str, value: Any) -> int:
    """Rows of a table where a column holds a value."""
    return int(pc.sum(pc.equal(table.column(column), value)).as_py() or 0)


@contextlib.contextmanager
def environment(**values: str | None) -> Any:
    """Set (or, with None, unset) environment variables for a while."""
    old = {name: os.environ.get(name) for name in values}
    try:
        for name, value in values.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
        yield
    finally:
        for name, value in old.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
