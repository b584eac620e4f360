"""Rewrite: several sampled candidates for every flagged segment, asked of a language model through the cache.

A request holds the segment without its surrounding whitespace, perhaps some text before it, and a seed derived from
those two and the run's seed alone; so equal sentences get equal candidates wherever they stand, and answers are found
again after a crash or a resharding. Nothing is ever cut to fit: what is too long for the model is split, or counted.

Scratch columns: `candidates` (list of CANDIDATE_TYPE) and `rewriter` (struct<model, prompt>: tags for the record).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import pyarrow as pa

from models.protocols import Candidate, Generation, GenerationRequest, LanguageModel, Message, Sampling
from schemas import flight
from schemas.fingerprint import derive_seed
from transforms.detox.ends import match_ends
from transforms.detox.localize import flagged_rows
from transforms.detox.options import REWRITE_DEFAULTS, RewriteOptions
from transforms.detox.segment import split_long
from transforms.requests import generate_cached
from transforms.shards.cache import RequestCache

CANDIDATE_TYPE = pa.struct(
    [
        pa.field("segment", pa.int32()),  # index in attribute `toxicity`'s segments; null = the whole text
        pa.field("start", pa.int32(), nullable=False),  # of the source, in the document, whitespace left out
        pa.field("end", pa.int32(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("temperature", pa.float32()),
        pa.field("index", pa.int32()),
        pa.field("seed", pa.uint64()),
        pa.field("tokens", pa.int32()),
        pa.field("finish", pa.string()),
        pa.field("parsed", pa.bool_(), nullable=False),
    ]
)
REWRITER_TYPE = pa.struct([pa.field("model", pa.string()), pa.field("prompt", pa.string())])

_CHAT_TOKENS = 64  # what a chat template adds around the turns, generously
_OUTPUT_SLACK = 24
_SMALLEST_OUTPUT = 32
_SMALLEST_PIECE = 80


class RewritePrompt(Protocol):
    """What is needed of a prompt (`models.prompts.Prompt`)."""

    @property
    def tag(self) -> str:
        """`name@hash`."""
        ...

    def render(self, **variables: object) -> tuple[tuple[Message, ...], str, tuple[str, ...]]:
        """Turns, prefill and stop strings for `text` (and `before`)."""
        ...

    def parse(self, candidate: Candidate) -> str | None:
        """The answer in a candidate, None where there is no whole one."""
        ...


@dataclass(frozen=True)
class Unit:
    """A stretch of a document that is rewritten as one: [start, end), without surrounding whitespace.

    Attributes:
        row: Row in the batch.
        segment: Index of its segment; None = the whole text.
        start: Where it starts, in characters.
        end: Where it ends.
        pieces: The parts of it that are asked for one by one: itself, or what it was split into to fit the model.
            What lies between and outside them stays as it is.
    """

    row: int
    segment: int | None
    start: int
    end: int
    pieces: tuple[tuple[int, int], ...]


def rewrite_toxic_segments(
    batch: pa.RecordBatch,
    *,
    text_column: str,
    model: LanguageModel,
    prompt: RewritePrompt,
    options: RewriteOptions = REWRITE_DEFAULTS,
    seed: int = 0,
    cache: RequestCache | None = None,
    count: Callable[[str, int], None] | None = None,
    on_progress: Callable[[], None] | None = None,
    stage: str = "RewriteToxicSegments",
) -> pa.RecordBatch:
    """Set scratch column `candidates`; rows with a failed request become dead, with its error.

    Args:
        batch: n rows in flight, with attribute `toxicity` (and `spans`, if they were localised).
        text_column: Name of the text column.
        model: The rewriter.
        prompt: Its instructions.
        options: Unit, context, sampling.
        seed: The run's seed.
        cache: Answers already paid for.
        count: Counter to add to (`rewrite.requests`, `.asked`, `.cache_hits`, `.tokens_in`, `.tokens_out`,
            `.candidates`, `.unparsed`, `.unclosed`, `.overlong`, `.errors`).
        on_progress: Called after every finished request.
        stage: Stands with a dead row.
    """
    count = count or (lambda name, amount: None)
    column = batch.column(text_column)
    planner = Planner(model, prompt, options)
    toxicity = flight.attribute(batch, "toxicity")
    units: list[Unit] = []
    texts: dict[int, str] = {}
    for row in flagged_rows(toxicity):
        texts[row] = column[row].as_py()
        planned, overlong = planner.plan(row, texts[row], toxicity[row], _spans(batch, row))
        units.extend(planned)
        count("rewrite.overlong", overlong)
    asked = [(unit, piece) for unit in units for piece in unit.pieces]
    requests = [planner.request(unit, piece, texts[unit.row], seed) for unit, piece in asked]
    budgets = [planner.output_budget(texts[unit.row][start:end]) for unit, (start, end) in asked]
    finish = match_ends if options.keep_ends else lambda source, answer: answer
    sampling = options.sampling.sampling()
    answers = iter(_ask(model, requests, budgets, sampling, cache, count, on_progress))

    errors: list[str | None] = [None] * batch.num_rows
    candidates: list[list[dict[str, object]]] = [[] for _ in range(batch.num_rows)]
    for unit in units:
        generations = [next(answers) for _ in unit.pieces]
        error = next((g.error for g in generations if g.error is not None), None)
        if error is not None:
            errors[unit.row] = errors[unit.row] or f"{model.info.name}: {error}"
        else:
            candidates[unit.row].extend(
                _candidates(unit, texts[unit.row], generations, prompt, count, finish)
            )
    count("rewrite.units", len(units))
    count("rewrite.candidates", sum(map(len, candidates)))
    batch = flight.set_scratch(batch, "candidates", pa.array(candidates, pa.list_(CANDIDATE_TYPE)))
    rewriter = {"model": model.info.tag, "prompt": prompt.tag}
    batch = flight.set_scratch(batch, "rewriter", pa.array([rewriter] * batch.num_rows, REWRITER_TYPE))
    return flight.kill_rows(batch, errors, stage=stage) if any(errors) else batch


class Planner:
    """Decides what is asked: which stretches of a text, with which context and room for the answer."""

    def __init__(self, model: LanguageModel, prompt: RewritePrompt, options: RewriteOptions) -> None:
        self.model, self.prompt, self.options = model, prompt, options

    def plan(
        self, row: int, text: str, toxicity: pa.StructScalar, spans: Sequence[tuple[int, int]]
    ) -> tuple[list[Unit], int]:
        """The units of one document, and how many stretches are too long for the model however they are split."""
        if self.options.unit == "document":
            start, end = core(text, 0, len(text))
            if end > start and self._fits(text, start, end):
                return [Unit(row, None, start, end, ((start, end),))], 0
        units: list[Unit] = []
        overlong = 0
        segments = toxicity["segments"].values
        starts, ends = segments.field("start"), segments.field("end")
        for index in np.flatnonzero(segments.field("flagged").to_numpy(zero_copy_only=False)).tolist():
            start, end = core(text, starts[index].as_py(), ends[index].as_py())
            if end > start:
                pieces, lost = self._pieces(text, start, end)
                overlong += lost
                if pieces != [(start, end)] and spans:
                    pieces = [(a, b) for a, b in pieces if any(a < e and s < b for s, e in spans)] or pieces
                if pieces:
                    units.append(Unit(row, index, start, end, tuple(pieces)))
        return units, overlong

    def request(self, unit: Unit, piece: tuple[int, int], text: str, seed: int) -> GenerationRequest:
        """The request for a piece; its seed depends on the run's seed, the source and its context alone."""
        source, before = text[piece[0] : piece[1]], self._before(text, piece[0])
        messages, prefill, stop = self.prompt.render(text=source, before=before)
        return GenerationRequest(
            messages=tuple(messages),
            seed=derive_seed(seed, source, before, "rewrite"),
            prefill=prefill,
            stop=tuple(stop),
        )

    def output_budget(self, source: str) -> int:
        """Most new tokens of a candidate for `source`: a power of two, so that few distinct values occur."""
        wanted = math.ceil(self.options.growth * self.model.count_tokens(source)) + _OUTPUT_SLACK
        budget = max(_SMALLEST_OUTPUT, 1 << (wanted - 1).bit_length())
        return min(budget, self.options.sampling.max_new_tokens)

    def _fits(self, text: str, start: int, end: int) -> bool:
        source = text[start:end]
        output = self.output_budget(source)
        if self.model.count_tokens(source) + _OUTPUT_SLACK // 2 > output:
            return False  # not even a copy would
        messages, prefill, _ = self.prompt.render(text=source, before=self._before(text, start))
        prompt = self.model.count_tokens("\n".join([*(m.content for m in messages), prefill]))
        return prompt + _CHAT_TOKENS + output <= self.model.context_limit

    def _pieces(self, text: str, start: int, end: int) -> tuple[list[tuple[int, int]], int]:
        """[start, end) where it fits, else its halves at a clause mark or space, and so on."""
        if self._fits(text, start, end):
            return [(start, end)], 0
        cuts = split_long(text, start, end, (end - start + 1) // 2) if end - start > _SMALLEST_PIECE else []
        if not cuts:
            return [], 1
        pieces: list[tuple[int, int]] = []
        overlong = 0
        for a, b in zip([start, *cuts], [*cuts, end], strict=True):
            inner, lost = self._pieces(text, *core(text, a, b))
            pieces += inner
            overlong += lost
        return pieces, overlong

    def _before(self, text: str, start: int) -> str:
        """Whole words before `start`, at most as many characters as the options allow."""
        room = self.options.context_chars
        before = text[max(0, start - room) : start] if room else ""
        if start > room and before and not text[start - room - 1].isspace():
            before = "".join(before.split(maxsplit=1)[1:])
        return before.strip()


def core(text: str, start: int, end: int) -> tuple[int, int]:
    """[start, end) less the whitespace at both ends."""
    while end > start and text[end - 1].isspace():
        end -= 1
    while start < end and text[start].isspace():
        start += 1
    return start, end


def _ask(
    model: LanguageModel,
    requests: Sequence[GenerationRequest],
    budgets: Sequence[int],
    sampling: Sampling,
    cache: RequestCache | None,
    count: Callable[[str, int], None],
    on_progress: Callable[[], None] | None,
) -> list[Generation]:
    """Ask for all requests, those with equal room for the answer in one call."""
    out: dict[int, Generation] = {}
    for budget in sorted(set(budgets)):
        mine = [i for i, b in enumerate(budgets) if b == budget]
        generations, usage = generate_cached(
            model, [requests[i] for i in mine], replace(sampling, max_new_tokens=budget), cache, on_progress
        )
        out.update(zip(mine, generations, strict=True))
        for name in ("requests", "asked", "cache_hits", "errors", "tokens_in", "tokens_out"):
            count(f"rewrite.{name}", getattr(usage, name))
    return [out[i] for i in range(len(requests))]


def _candidates(
    unit: Unit,
    text: str,
    generations: Sequence[Generation],
    prompt: RewritePrompt,
    count: Callable[[str, int], None],
    finish: Callable[[str, str], str],
) -> list[dict[str, object]]:
    """The candidates of a unit: the i-th answers of its pieces, put together with what lies between them."""
    out: list[dict[str, object]] = []
    for parts in zip(*(g.candidates for g in generations), strict=True):
        answers = [prompt.parse(part) for part in parts]
        for part, answer in zip(parts, answers, strict=True):
            if answer is None:
                count("rewrite.unclosed" if part.finish == "length" else "rewrite.unparsed", 1)
        built, position = "", unit.start
        for (start, end), part, answer in zip(unit.pieces, parts, answers, strict=True):
            built += text[position:start] + (part.text if answer is None else finish(text[start:end], answer))
            position = end
        first = parts[0]
        out.append(
            {
                "segment": unit.segment,
                "start": unit.start,
                "end": unit.end,
                "text": built + text[position : unit.end],
                "temperature": first.temperature,
                "index": first.index,
                "seed": first.seed,
                "tokens": sum(part.tokens for part in parts),
                "finish": first.finish if len({p.finish for p in parts}) == 1 else "length",
                "parsed": None not in answers,
            }
        )
    return out


def _spans(batch: pa.RecordBatch, row: int) -> list[tuple[int, int]]:
    name = flight.ATTRIBUTE_PREFIX + "spans"
    if name not in batch.schema.names or not batch.column(name)[row].is_valid:
        return []
    return [(s["start"], s["end"]) for s in batch.column(name)[row].as_py()]
