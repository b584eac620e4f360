"""Small honest models for the detox tests: they follow the protocols and decide by rules that can be read."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from models.protocols import Candidate, Generation, GenerationRequest, Message, ModelInfo, Sampling
from schemas import flight
from schemas.fingerprint import derive_seed

WEIGHTS = {"idiot": 0.9, "idiots": 0.9, "moron": 0.9, "stupid": 0.8, "dumb": 0.7, "damn": 0.6}
SOFTER = {
    "idiot": "person",
    "idiots": "people",
    "moron": "person",
    "stupid": "unwise",
    "dumb": "unwise",
    "damn": "very",
}


class WordScorer:
    """Toxicity by words: 1 - product of (1 - weight); the second label counts name-calling only."""

    def __init__(self, weights: dict[str, float] | None = None, name: str = "words") -> None:
        self.weights = WEIGHTS if weights is None else weights
        self.info = ModelInfo(name, "scorer", "r1")
        self.labels = ("toxicity", "insult")
        self.calls: list[list[str]] = []

    def score(self, texts: Sequence[str]) -> np.ndarray:
        self.calls.append(list(texts))
        return np.array([self._one(t) for t in texts], np.float32).reshape(len(texts), 2)

    def _one(self, text: str) -> tuple[float, float]:
        words = re.findall(r"\w+", text.lower())
        clean = insult = 1.0
        for word in words:
            clean *= 1 - self.weights.get(word, 0)
            insult *= 1 - self.weights.get(word, 0) * (word in {"idiot", "idiots", "moron"})
        return 1 - clean, 1 - insult


class WordLexicon(WordScorer):
    """A lexicon: 1 where one of its words occurs; tells where."""

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__(dict.fromkeys(words, 1.0), "lexicon")
        self.labels = ("toxicity",)

    def score(self, texts: Sequence[str]) -> np.ndarray:
        self.calls.append(list(texts))
        return np.array([float(bool(self.find(t))) for t in texts], np.float32).reshape(len(texts), 1)

    def find(self, text: str) -> list[tuple[int, int]]:
        return [m.span() for m in re.finditer(r"\w+", text) if m.group().lower() in self.weights]

    def find_all(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        return [self.find(t) for t in texts]


class BagEncoder:
    """Embeds a text as the normalised counts of its words, hashed to 256 dimensions."""

    def __init__(self) -> None:
        self.info = ModelInfo("bag", "encoder", "r1")
        self.dimension = 256
        self.calls: list[list[str]] = []

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        self.calls.append(list(texts))
        out = np.zeros((len(texts), self.dimension), np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()) or ["nothing"]:
                out[row, derive_seed(0, word) % self.dimension] += 1
        return out / np.linalg.norm(out, axis=1, keepdims=True)


class RuleRewriter:
    """Replaces harsh words by mild ones, but each sample goes wrong in its own way now and then, as samples do.

    Everything a candidate says depends on its own seed, and on nothing else.
    """

    def __init__(self, *, context_limit: int = 2048, slips: bool = True, fail: str | None = None) -> None:
        self.info = ModelInfo("rules", "lm", "r1", extra={"adapter": "none"})
        self.context_limit = context_limit
        self.slips = slips
        self.fail = fail  # requests whose text holds this fail
        self.asked: list[str] = []

    def count_tokens(self, text: str) -> int:
        return len(re.findall(r"\w+|[^\w\s]", text))

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        on_done: Callable[[int, Generation], None] | None = None,
    ) -> list[Generation]:
        out = []
        for i, request in enumerate(requests):
            text = request.messages[-1].content.rsplit("Text: ", 1)[1]
            self.asked.append(text)
            if self.fail is not None and self.fail in text:
                out.append(Generation((), 0, error="the server said no"))
            else:
                out.append(self._generation(text, request, sampling))
            if on_done is not None:
                on_done(i, out[-1])
        return out

    def _generation(self, text: str, request: GenerationRequest, sampling: Sampling) -> Generation:
        candidates = []
        for temperature in sampling.temperatures:
            for index in range(sampling.per_temperature):
                seed = derive_seed(request.seed, str(temperature), index)
                answer, finish = self._answer(text, random.Random(seed))
                tokens = self.count_tokens(answer)
                if tokens > sampling.max_new_tokens:
                    answer, finish, tokens = (
                        " ".join(answer.split()[: sampling.max_new_tokens]),
                        "length",
                        sampling.max_new_tokens,
                    )
                candidates.append(Candidate(answer, temperature, index, seed, tokens, finish))
        return Generation(
            tuple(candidates), prompt_tokens=sum(self.count_tokens(m.content) for m in request.messages)
        )

    def _answer(self, text: str, rng: random.Random) -> tuple[str, str]:
        soft = re.sub(r"\w+", lambda m: SOFTER.get(m.group().lower(), m.group()), text)
        if not self.slips:
            return soft, "stop"
        slip = rng.random()
        if slip < 0.1:
            return text, "stop"  # copies
        if slip < 0.2:
            return "I'm sorry, but I can't help with that.", "stop"
        if slip < 0.3:
            return soft[: len(soft) // 2], "length"  # never closes its tag
        if slip < 0.4:
            return soft + " damn", "stop"
        if slip < 0.6:
            return "Please. " + soft, "stop"
        return soft, "stop"


class TagPrompt:
    """The smallest prompt: the text after `Text: `."""

    tag = "test@1"

    def render(self, **variables: object) -> tuple[tuple[Message, ...], str, tuple[str, ...]]:
        before = f"Before: {variables['before']}\n" if variables.get("before") else ""
        return (Message("user", f"{before}Text: {variables['text']}"),), "<answer>", ("</answer>",)

    def parse(self, candidate: Candidate) -> str | None:
        return candidate.text.strip() or None if candidate.finish == "stop" else None


def in_flight(texts: Sequence[str | None], type_: pa.DataType | None = None) -> pa.RecordBatch:
    """Texts as a batch in flight."""
    batch = pa.record_batch({"text": pa.array(texts, type_ or pa.string())})
    ids = pa.array([f"row{i}" for i in range(len(texts))])
    return flight.launch(batch, first_row=0, ids=ids)
