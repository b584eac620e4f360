"""What a model part offers, whichever backend stands behind its name.

Implementations are found by name (`models.registry.load`), load their weights once a process, and are safe to call
from several threads. Heavy libraries are imported inside them, never at the top of this module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ModelInfo:
    """What the manifest records of a model.

    Attributes:
        name: The name it was asked for by, canonical (`jigsaw-bilstm`, `hf:/models/x`).
        kind: `lm`, `scorer`, `encoder` or `tagger`.
        revision: sha256 (first 16 hex digits) of its weights, or a hub commit, or the server's model id.
        source: Where it came from (package and version, folder, URL).
        licence: SPDX id where known.
        training_data: Tag of what it was trained on (`jigsaw-2018`); a judge must not share the ranker's.
        extra: Anything else worth recording (labels, adapter, dtype, device, threads).
    """

    name: str
    kind: str
    revision: str
    source: str = ""
    licence: str = ""
    training_data: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def tag(self) -> str:
        """`name@revision`, as edits record it."""
        return f"{self.name}@{self.revision}"


@runtime_checkable
class ToxicityScorer(Protocol):
    """Scores texts on one or more labels, each an independent probability in [0, 1]."""

    info: ModelInfo
    labels: tuple[str, ...]  # the first label is the headline one (`toxicity`)

    def score(self, texts: Sequence[str]) -> FloatArray:
        """Score texts.

        Args:
            texts: n texts of any length (chunked where the model has a limit, maximum taken; empty text scores 0).

        Returns:
            float32 array of shape (n, len(labels)), in the order of `texts`; never NaN.
        """
        ...


@runtime_checkable
class Encoder(Protocol):
    """Embeds texts as L2-normalised vectors."""

    info: ModelInfo
    dimension: int

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """Embed n texts: float32 array of shape (n, dimension), unit length, in the order of `texts`."""
        ...


@runtime_checkable
class SpanFinder(Protocol):
    """Says which characters of a text are toxic."""

    info: ModelInfo

    def find(self, texts: Sequence[str]) -> list[list[Any]]:
        """For each of n texts its toxic spans (start, end, probability), ascending and disjoint."""
        ...


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str  # system | user | assistant
    content: str


@dataclass(frozen=True)
class Sampling:
    """How candidates are sampled. The defaults are HSPD's (spec 1.6).

    Attributes:
        temperatures: One group of candidates for each; 0 means greedy.
        per_temperature: Candidates for each temperature.
        top_p: Nucleus mass, 1.0 = off.
        top_k: Keep the k likeliest tokens, 0 = off.
        repetition_penalty: As in `transformers` (over prompt and continuation), 1.0 = off.
        max_new_tokens: Longest continuation.
    """

    temperatures: tuple[float, ...] = (0.6, 0.8, 1.0, 1.2, 1.5)
    per_temperature: int = 2
    top_p: float = 1.0
    top_k: int = 20
    repetition_penalty: float = 1.05
    max_new_tokens: int = 512

    @property
    def n(self) -> int:
        """Candidates per request."""
        return len(self.temperatures) * self.per_temperature


@dataclass(frozen=True)
class OneOf:
    """A reply that is exactly one of a few texts."""

    options: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.options or not all(self.options):
            raise ValueError("a reply needs options to choose from, none of them empty")


@dataclass(frozen=True)
class NumberList:
    """A reply that lists distinct numbers in brackets: `[3], [1]`, or `[3] > [1]`.

    Attributes:
        count: The numbers are 1 to this.
        separator: What stands between two of them.
        at_least: Fewest numbers of a list.
        at_most: Most numbers; None = all.
        none: What is said in place of an empty list; empty = a list there must be.
    """

    count: int
    separator: str = ", "
    at_least: int = 1
    at_most: int | None = None
    none: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.at_least <= self.limit <= self.count or not self.separator:
            raise ValueError(
                f"no list of {self.at_least} to {self.limit} of {self.count} numbers can be written"
            )

    @property
    def limit(self) -> int:
        """Most numbers of a list."""
        return self.count if self.at_most is None else self.at_most


ReplyForm = OneOf | NumberList


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt, to be continued `sampling.n` times.

    Attributes:
        messages: The chat, rendered by the model's own template; empty = continue the prefill as plain text.
        prefill: Text the assistant's turn already begins with (never repeated in the candidates).
        seed: Request seed; candidate i of temperature t uses `derive_seed(seed, t, i)`.
        stop: Strings that end a candidate; the stop string itself is cut off.
        schema: JSON schema (as JSON text) the answer should follow. A server is asked to enforce it (structured output);
            a model in this process is not held to it. Empty = free text.
        form: What an answer may be, to which a model in this process is held (it can still be cut off by length); a server
            is not. None = any text.
    """

    messages: tuple[Message, ...]
    seed: int
    prefill: str = ""
    stop: tuple[str, ...] = ()
    schema: str = ""
    shared: int = 0
    form: ReplyForm | None = None


@dataclass(frozen=True)
class Candidate:
    """One sampled continuation."""

    text: str
    temperature: float
    index: int  # within its temperature
    seed: int
    tokens: int
    finish: str  # stop (a stop string was met, and cut off) | eos (the model ended its turn) | length
    logprob: float | None = None  # mean log-probability per token under the sampled distribution's base model


@dataclass(frozen=True)
class Generation:
    """What came of one request: its candidates, in (temperature, index) order, or an error."""

    candidates: tuple[Candidate, ...]
    prompt_tokens: int
    error: str | None = None  # set only where this request failed for good; candidates are then empty


@dataclass(frozen=True)
class TokenScores:
    """Log-probabilities of given tokens after one prompt, or an error.

    Attributes:
        values: Natural logarithms; what of, the function that gives them says.
        prompt_tokens: Tokens of the prompt.
        completion_tokens: Tokens scored.
        error: Set only where this prompt failed for good; `values` is then empty.
    """

    values: tuple[float, ...]
    prompt_tokens: int
    completion_tokens: int
    error: str | None = None


@runtime_checkable
class LanguageModel(Protocol):
    """A causal language model, in this process or behind a server."""

    info: ModelInfo
    context_limit: int  # tokens of prompt and continuation together

    def count_tokens(self, text: str) -> int:
        """Number of tokens of `text`, without special tokens (a server backend may estimate, from above)."""
        ...

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        on_done: Callable[[int, Generation], None] | None = None,
    ) -> list[Generation]:
        """Sample candidates for every request.

        The result of a request does not depend on the requests beside it, nor on padding.

        Args:
            requests: Any number of prompts.
            sampling: Shared by all of them.
            on_done: Called with (index, generation) as soon as each is finished, so that a caller can store what
                was paid for before the rest is; may be called from another thread.

        Returns:
            One generation per request, in order.
        """
        ...

    def score_tokens(self, texts: Sequence[str]) -> list[tuple[list[tuple[int, int]], FloatArray]]:
        """Teacher forcing: for each text its tokens' character offsets and their log-probabilities (nats).

        Raises:
            ModelError: The backend cannot (a server without log-probabilities).
        """
        ...
