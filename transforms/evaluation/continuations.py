"""What a model says when it goes on from a prompt: sample continuations, score them, measure how fluent they are.

Three steps of one job, so that workers, resuming and the request cache are the shard engine's. A row is a prompt; each
step leaves an attribute with one entry a seed and, in it, one a sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from models.protocols import GenerationRequest, LanguageModel, Sampling, ToxicityScorer
from schemas import flight
from schemas.errors import ModelError
from schemas.fingerprint import derive_seed, digest
from transforms.requests import generate_cached, identity, score_cached
from transforms.shards.cache import RequestCache
from transforms.shards.steps import StepContext

SAMPLES, TOXICITY, FLUENCY = "samples", "toxicity", "fluency"

SAMPLES_TYPE = pa.list_(pa.list_(pa.string()))
TOXICITY_TYPE = pa.list_(pa.list_(pa.float32()))
FLUENCY_TYPE = pa.list_(pa.list_(pa.struct({"loss": pa.float32(), "tokens": pa.int32()})))

Options = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class SampleContinuations:
    """Step: continue every prompt as plain text, with no chat template.

    Attributes:
        model: Language model, by name.
        options: Its options, as pairs.
        sampling: One temperature, and how many continuations of what length.
        seeds: The whole is sampled once for each.
    """

    model: str
    options: Options
    sampling: Sampling
    seeds: tuple[int, ...]
    label: str = "SampleContinuations"

    def setup(self, context: StepContext) -> None:
        """Load the model."""
        self._model()

    def __call__(self, batch: pa.RecordBatch, context: StepContext) -> pa.RecordBatch:
        """Set the attribute `samples`; a prompt that leaves no room in the context is dead."""
        prompts = batch.column(context.text_column).to_pylist()
        requests = [
            GenerationRequest((), seed=derive_seed(seed, "continue", prompt or ""), prefill=prompt or "")
            for prompt in prompts
            for seed in self.seeds
        ]
        generations, usage = (
            generate_cached(self._model(), requests, self.sampling, context.cache, context.heartbeat)
            if requests
            else ([], None)
        )
        if usage is not None:
            for name in ("requests", "asked", "cache_hits", "errors", "tokens_in", "tokens_out"):
                context.count(f"sample.{name}", getattr(usage, name))
        width = len(self.seeds)
        rows = [generations[i * width : (i + 1) * width] for i in range(len(prompts))]
        errors = [next((g.error for g in row if g.error), None) for row in rows]
        samples = [
            None if error else [[c.text for c in g.candidates] for g in row]
            for row, error in zip(rows, errors, strict=True)
        ]
        batch = flight.set_attribute(batch, SAMPLES, pa.array(samples, SAMPLES_TYPE))
        return flight.kill_rows(batch, errors, stage=self.label) if any(errors) else batch

    def _model(self) -> LanguageModel:
        from models.registry import load

        return load("lm", self.model, **dict(self.options))


@dataclass(frozen=True)
class ScoreContinuations:
    """Step: the judge's score of every continuation, without its prompt.

    Attributes:
        judge: Scorer, by name; its first label counts.
        options: Its options, as pairs.
    """

    judge: str
    options: Options = ()
    label: str = "ScoreContinuations"

    def setup(self, context: StepContext) -> None:
        """Load the judge."""
        self._judge()

    def __call__(self, batch: pa.RecordBatch, context: StepContext) -> pa.RecordBatch:
        """Set the attribute `toxicity`.

        Raises:
            ModelError: The judge gave a score that is no number.
        """
        samples = flight.attribute(batch, SAMPLES).to_pylist()
        texts = [text for row in samples for group in row for text in group]
        judge = self._judge()
        scores = score_cached(judge, texts, context.cache)[:, 0]
        if not np.isfinite(scores).all():
            first = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise ModelError(
                f"the judge {judge.info.name} gave a score that is not a number (for {texts[first][:60]!r}); "
                "nothing can be concluded from it: pass another --judge, or dtype=float32"
            )
        context.count("judge.texts", len(texts))
        found = iter(scores.tolist())
        values = [[[next(found) for _ in group] for group in row] for row in samples]
        return flight.set_attribute(batch, TOXICITY, pa.array(values, TOXICITY_TYPE))

    def _judge(self) -> ToxicityScorer:
        from models.registry import load

        return load("scorer", self.judge, **dict(self.options))


@dataclass(frozen=True)
class MeasureFluency:
    """Step: what a reference model thinks of every continuation, its prompt before it.

    Attributes:
        model: The reference model, by name.
        options: Its options, as pairs.
    """

    model: str
    options: Options = ()
    label: str = "MeasureFluency"

    def setup(self, context: StepContext) -> None:
        """Load the model."""
        self._model()

    def __call__(self, batch: pa.RecordBatch, context: StepContext) -> pa.RecordBatch:
        """Set the attribute `fluency`: summed loss (nats) and tokens of each continuation."""
        prompts = batch.column(context.text_column).to_pylist()
        samples = flight.attribute(batch, SAMPLES).to_pylist()
        values = []
        for prompt, row in zip(prompts, samples, strict=True):
            entry = []
            for group in row:
                pairs = _fluency(self._model(), prompt or "", group, context)
                entry.append([{"loss": loss, "tokens": tokens} for loss, tokens in pairs])
                context.heartbeat()
            values.append(entry)
        return flight.set_attribute(batch, FLUENCY, pa.array(values, FLUENCY_TYPE))

    def _model(self) -> Any:
        from models.registry import load

        return load("lm", self.model, **dict(self.options))


def _fluency(model: Any, prompt: str, texts: list[str], context: StepContext) -> list[tuple[float, int]]:
    """Summed loss and number of tokens of each continuation of one prompt.

    Remembered by the whole group: texts scored together share their padding, so asking for a part of them again
    could change last bits.
    """
    cache: RequestCache | None = context.cache
    key = digest("fluency", identity(model.info), prompt, *texts)
    stored = cache.get_many([key])[0] if cache is not None else None
    if stored is not None and len(stored) == 8 * len(texts):
        table = np.frombuffer(stored, [("loss", "<f4"), ("tokens", "<i4")])
        context.count("fluency.cache_hits")
    else:
        table = np.zeros(len(texts), [("loss", "<f4"), ("tokens", "<i4")])
        for i, logprobs in enumerate(model.score_continuations(prompt, texts)):
            table[i] = (-float(logprobs.astype(np.float64).sum()), len(logprobs))
        if cache is not None:
            cache.put_many({key: table.tobytes()})
        context.count("fluency.asked")
    return [(float(row["loss"]), int(row["tokens"])) for row in table]
