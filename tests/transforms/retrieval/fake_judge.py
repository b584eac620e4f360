"""A judge whose model is a function of the request: what it is asked is recorded, what it says is the test's business."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from models.prompts import load_prompt
from models.protocols import Candidate, Generation, ModelInfo
from transforms.retrieval.labelling.judge import Judge
from transforms.retrieval.labelling.queries import PoolDocument, PooledQuery
from transforms.retrieval.labelling.rows import complete_row, label_table


@dataclass
class FakeModel:
    """Answers with `say(request)`; None = an error."""

    say: object
    context_limit: int = 4096
    name: str = "fake"
    asked: list = field(default_factory=list)

    def __post_init__(self):
        self.info = ModelInfo(self.name, "lm", "1")

    def count_tokens(self, text):
        return len(text.split())

    def generate(self, requests, sampling, on_done=None):
        found = []
        for i, request in enumerate(requests):
            self.asked.append(request)
            text = self.say(request)
            tokens = sum(self.count_tokens(m.content) for m in request.messages)
            if text is None:
                generation = Generation((), tokens, "it broke")
            else:
                generation = Generation((Candidate(text, 0.0, 0, 1, self.count_tokens(text), "eos"),), tokens)
            found.append(generation)
            if on_done is not None:
                on_done(i, generation)
        return found


def judge_of(method, say, *, seed=0, reader=None, **options):
    """A judge with a method's shipped prompts; `.model.asked` holds what it was asked."""
    model = say if isinstance(say, FakeModel) else FakeModel(say)
    prompts = {
        role: load_prompt(name, variables=method.variables[role]) for role, name in method.prompts.items()
    }
    return Judge(lambda: model, model.info, prompts=prompts, seed=seed, reader=reader, **options)


def pooled(n=4, query_id="q", answers=(), texts=None, **changes):
    """A query with documents d0, d1, ..., each with a word of its own (`word0`)."""
    documents = tuple(
        PoolDocument(f"d{i}", "", texts[i] if texts else f"about word{i}", "bm25", i + 1) for i in range(n)
    )
    return PooledQuery(query_id, f"what of {query_id}", documents, tuple(answers), **changes)


def shown(request):
    """Numbers of the documents a list request shows, in order."""
    turns = [
        m.content for m in request.messages if m.role == "user" and re.fullmatch(r"\[\d+\] .*", m.content)
    ]
    return [int(re.search(r"word(\d+)", t).group(1)) for t in turns]


def whole_table(method, judge, query, labels):
    """A query's labels as the engine writes them."""
    documents = {d.doc_id: d for d in query.documents}
    return label_table([complete_row(r, query, documents, method, judge.info.tag) for r in labels.rows])


def by_doc(labels, column):
    """Column of the rows by document."""
    return {row["doc_id"]: row.get(column) for row in labels.rows}
