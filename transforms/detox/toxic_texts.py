"""The texts a toxic model is trained on: what the gate flags in a corpus, each once, in an order of its own.

HSPD trains its toxic model on the very corpus it rewrites. Which texts that are must depend on the corpus alone: so
they are ordered by a hash of their content, and where there are more than wanted, those with the smallest are taken,
however the corpus is cut into shards and whichever worker sees what.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import apache_beam as beam
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from schemas import flight
from schemas.fingerprint import digest
from transforms.detox.localize import flagged_segments
from transforms.shards.coders import KeyedBatch
from transforms.shards.engine import ApplyStep, Job, PlanTasks, ReadUnits
from transforms.shards.events import EventLog

TEXTS = "_tamis/toxic-texts.jsonl"
FACTS = "_tamis/toxic-texts.json"  # how many rows and flagged segments were seen, how many texts kept
# A longer text (a whole document) is cut for training alone: it would crowd out the others.
LONGEST = 16_000


@dataclass
class Sample:
    """Some of the texts seen so far.

    Attributes:
        rows: Rows seen.
        flagged: Flagged segments seen, equal ones counted each.
        texts: Content hash -> text.
    """

    rows: int = 0
    flagged: int = 0
    texts: dict[bytes, str] = field(default_factory=dict)


def sample_flagged(batch: pa.RecordBatch, text_column: str, size: int) -> Sample:
    """The flagged segments of a gated batch, without surrounding whitespace.

    Args:
        batch: Rows in flight with attribute `toxicity`.
        text_column: Name of the text column.
        size: Most texts kept.
    """
    column = batch.column(text_column)
    found = Sample(rows=batch.num_rows)
    text, current = "", -1
    for row, start, end in flagged_segments(flight.attribute(batch, "toxicity")):
        if row != current:  # a text may be huge: it is decoded once
            text, current = column[row].as_py(), row
        found.flagged += 1
        piece = text[start:end].strip()[:LONGEST].rstrip()
        if piece:
            found.texts[digest("toxic-text", piece)] = piece
    return _smallest(found, size)


def merge_samples(samples: Iterable[Sample], size: int) -> Sample:
    """The sample of all that several saw; the order they come in changes nothing."""
    whole = Sample()
    for sample in samples:
        whole.rows += sample.rows
        whole.flagged += sample.flagged
        whole.texts |= sample.texts
        if len(whole.texts) > 2 * size:
            _smallest(whole, size)
    return _smallest(whole, size)


def dump_texts(sample: Sample) -> bytes:
    """The texts as JSON lines, in the order of their content hashes."""
    return b"".join(orjson.dumps({"text": text}) + b"\n" for _, text in sorted(sample.texts.items()))


class AnalyseToxicity(beam.PTransform):
    """Pipeline root -> one element, what was found; the texts are then in `OUT/_tamis/toxic-texts.jsonl`.

    Args:
        job: Its steps end with the gate; its plan lies in the output folder.
        size: Most texts kept.
    """

    def __init__(self, job: Job, size: int) -> None:
        super().__init__()
        self._job, self._size = job, size

    def expand(self, root: beam.Pipeline) -> beam.PCollection:
        """Read, run the steps, sample, write."""
        units = root | "PlanTasks" >> PlanTasks(self._job) | "ReadUnits" >> ReadUnits(self._job)
        for step in self._job.steps:
            units |= step.label >> ApplyStep(step, self._job)
        return (
            units
            | "SampleFlagged" >> beam.ParDo(_SampleDoFn(self._job, self._size))
            | "MergeSamples" >> beam.CombineGlobally(_MergeFn(self._size))
            | "WriteTexts" >> beam.Map(_write_texts, self._job)
        )


class _SampleDoFn(beam.DoFn):
    def __init__(self, job: Job, size: int) -> None:
        self._job, self._size = job, size

    def setup(self) -> None:
        self._events = EventLog(self._job.output())

    def process(self, element: KeyedBatch) -> Iterable[Sample]:
        key, batch = element
        live = batch.filter(pc.equal(batch.column(flight.FATE), flight.KEPT))
        found = sample_flagged(live, self._job.text_column, self._size)
        self._events.emit(
            "analyse", shard=key.shard, unit=key.unit, rows=batch.num_rows, flagged=found.flagged
        )
        yield found


class _MergeFn(beam.CombineFn):
    def __init__(self, size: int) -> None:
        self._size = size

    def create_accumulator(self) -> Sample:
        return Sample()

    def add_input(self, accumulator: Sample, element: Sample) -> Sample:
        return merge_samples([accumulator, element], self._size)

    def merge_accumulators(self, accumulators: Iterable[Sample]) -> Sample:
        return merge_samples(accumulators, self._size)

    def extract_output(self, accumulator: Sample) -> Sample:
        return accumulator


def _write_texts(sample: Sample, job: Job) -> dict[str, int]:
    job.output().write(TEXTS, dump_texts(sample))
    facts = {"rows": sample.rows, "flagged": sample.flagged, "texts": len(sample.texts)}
    job.output().write(FACTS, orjson.dumps(facts))
    return facts


def _smallest(sample: Sample, size: int) -> Sample:
    if len(sample.texts) > size:
        sample.texts = {key: sample.texts[key] for key in sorted(sample.texts)[:size]}
    return sample
