"""One question about one passage: a prompt filled so that what all passages of a query share stands first and is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from models.prompts import Prompt
from models.protocols import GenerationRequest
from transforms.retrieval.labelling.queries import PoolDocument

if TYPE_CHECKING:
    from transforms.retrieval.labelling.judge import Judge

# Fewer tokens of a passage than this say too little: the pair is `too_long`, not judged on a scrap.
LEAST_PASSAGE = 16
# Tokens that two tokenisations of one text may differ by, at the seams of a template.
_SEAM = 8


@dataclass(frozen=True)
class Question:
    """A passage put to the judge.

    Attributes:
        document: What is judged.
        status: `ok`; or `empty` (no text), `too_long` (the template and the query leave no room), `error` (not in the
            corpus).
        request: What is asked; None unless `ok`.
        truncated: The passage was cut.
        error: Why nothing is asked.
    """

    document: PoolDocument
    status: str
    request: GenerationRequest | None = None
    truncated: bool = False
    error: str = ""

    def row(self, **label: Any) -> dict[str, Any]:
        """A row of labels about this document: as given, or with this question's own status where nothing was asked."""
        row: dict[str, Any] = {"doc_id": self.document.doc_id, "truncated": self.truncated}
        if self.status != "ok":
            return {
                **row,
                "parse_status": self.status,
                "error": self.error,
                "prompt_tokens": 0,
                "completion_tokens": 0,
            }
        return {**row, **label}


class Asker:
    """Puts the passages of one query to a judge.

    Args:
        judge: Whose context limit and tokens count.
        prompt: The prompt; `passage` is one of its variables.
        room: Tokens kept free for the answer.
        seed: Of the requests.
        schema: JSON schema of the answer.
        **variables: What the prompt asks for besides.
    """

    def __init__(
        self,
        judge: Judge,
        prompt: Prompt,
        *,
        room: int = 1,
        seed: int = 0,
        schema: str = "",
        **variables: Any,
    ) -> None:
        self._judge, self._prompt, self._seed, self._schema = judge, prompt, seed, schema
        self._variables = variables
        # What two fillings have in common stands before the passage, whatever the template looks like.
        first, second = (self._render(p).messages[-1].content for p in ("a", "1"))
        self._shared = _common(first, second)
        frame = judge.prompt_tokens(self._render("a"))
        self.left = judge.context_limit - frame - room - _SEAM
        if judge.passage_tokens is not None:
            self.left = min(self.left, judge.passage_tokens)

    def ask(self, document: PoolDocument) -> Question:
        """The question about a document, its passage cut to what the context leaves room for."""
        passage = document.passage
        if document.missing:
            return Question(document, "error", error="the corpus holds no document of this id")
        if not passage.strip():
            return Question(document, "empty", error="the document has no text")
        if self.left < LEAST_PASSAGE:
            return Question(
                document,
                "too_long",
                error="the query and the template leave no room for a passage in the context",
            )
        fitted, cut = self._judge.fit(passage, self.left)
        return Question(document, "ok", self._render(fitted, self._shared), cut)

    def null(self, passage: str = "N/A") -> GenerationRequest:
        """The question about a passage that says nothing."""
        return self._render(passage, self._shared)

    def _render(self, passage: str, shared: int = 0) -> GenerationRequest:
        messages, prefill, stop = self._prompt.render(passage=passage, **self._variables)
        if self._schema:
            prefill, stop = "", ()  # what is held to a schema is whole
        return GenerationRequest(messages, self._seed, prefill, stop, self._schema, shared=shared)


def asked(questions: Sequence[Question]) -> list[GenerationRequest]:
    """The requests of those questions that have one."""
    return [q.request for q in questions if q.request is not None]


def _common(left: str, right: str) -> int:
    """Characters two texts have in common at the start."""
    return next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )
