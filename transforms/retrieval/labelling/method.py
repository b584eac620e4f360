"""The contract of a labelling method, and the methods by name.

A method is a frozen dataclass: its fields, all with defaults, are its options (`--permutations 4` sets `permutations`,
any field can be set by `--set NAME=VALUE`), and they stand in the job's configuration hash. It is given a few queries
at a time, and returns for each what it found. It never touches files, caches or workers: that is the engine's part.

Three rules. What a method asks goes through the judge it is given, so that it is cached, counted and within the budget.
A reply it cannot read is a row with that status and no label. A pair the judge was not asked about, because the budget
was spent, is listed in `unasked` and has no row.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from schemas.errors import TamisError
from transforms.retrieval.labelling.queries import PooledQuery

if TYPE_CHECKING:
    from transforms.retrieval.labelling.judge import Judge

# name -> `module:Class`; imported when it is asked for. The name is what stands in the column `signal`.
METHODS: Mapping[str, str] = {
    "yes_no": "transforms.retrieval.labelling.pointwise:YesNo",
    "graded": "transforms.retrieval.labelling.pointwise:Graded",
    "graded_verbal": "transforms.retrieval.labelling.verbal:GradedVerbal",
    "likelihood": "transforms.retrieval.labelling.likelihood:Likelihood",
    "relsel": "transforms.retrieval.labelling.listwise:RelSel",
    "utilsel": "transforms.retrieval.labelling.listwise:UtilSel",
    "utilsel_specific": "transforms.retrieval.labelling.listwise:UtilSelSpecific",
    "utilrank": "transforms.retrieval.labelling.listwise:UtilRank",
    "item": "transforms.retrieval.labelling.item:Item",
    "answer_gain": "transforms.retrieval.labelling.gains:AnswerGain",
    "likelihood_gain": "transforms.retrieval.labelling.likelihood_gain:LikelihoodGain",
    "leave_one_out": "transforms.retrieval.labelling.gains:LeaveOneOut",
    "marginal": "transforms.retrieval.labelling.gains:Marginal",
    "erag": "transforms.retrieval.labelling.gains:Erag",
}


@dataclass(frozen=True)
class QueryLabels:
    """What a method found for one query.

    Attributes:
        rows: One mapping a label: `doc_id`, and columns of `schemas.judgments.JUDGMENT_SCHEMA` or of
            `transforms.retrieval.labelling.rows.EXTRA_SCHEMA`. The engine fills in what a row leaves out: query_id,
            label_source, annotator, signal, signal_class, split, pool_source, pool_rank. A method names `target_model`
            itself, where its labels hold for one reader.
        known_to: Readers (`name@revision`) that answer the query with no document; goes to the queries' table.
        facts: Further facts of the query, of plain JSON values (`pseudo_answer`, `pseudo_answer_id`); they go to its
            `extra` there.
        unasked: Documents the judge was not asked about, for the budget was spent.
    """

    rows: tuple[Mapping[str, Any], ...]
    known_to: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    unasked: tuple[str, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """What labelling a query will take, before anything is asked; from above where it cannot be known."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )


@runtime_checkable
class Method(Protocol):
    """Labels the documents of queries.

    Attributes:
        name: What stands in the column `signal`.
        signal_class: A (verbalised), B (attention), C (likelihood), D (downstream metric).
        version: Raised when what it computes changes; part of the job's hash.
        prompts: Prompt files it uses, by role (`{"judge": "relevance-yes-no-v1"}`); the user's `--prompt FILE` takes the
            place of the first, `--prompt ROLE=FILE` that of the named one.
        variables: Role -> what its template may use.
        in_process: It needs scores that a chat server does not give (next-token logits, likelihoods).
        needs_answers: It needs gold answers.
        needs_target: It labels for one reader: `Judge.reader` (`--target-model`; by default the judge).
    """

    name: str
    signal_class: str
    version: int
    prompts: Mapping[str, str]
    variables: Mapping[str, Sequence[str]]
    in_process: bool
    needs_answers: bool
    needs_target: bool

    def label(self, queries: Sequence[PooledQuery], judge: Judge) -> list[QueryLabels]:
        """Label the documents of every query, in order.

        The result for a query must not depend on the queries beside it. An exception is the fault of a row: the
        engine halves the queries until the culprit stands alone, and what was answered comes from the cache.
        """
        ...

    def estimate(self, query: PooledQuery, judge: Judge) -> Estimate:
        """What labelling a query will take; asks the judge nothing (`judge.count_tokens` is free)."""
        ...


def method_names() -> list[str]:
    """The methods' names, in the order they are listed to users."""
    return list(METHODS)


def load_method(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """A method by name.

    Args:
        name: See `METHODS`; `-` and `_` are the same.
        options: Values of its fields.

    Raises:
        TamisError: No such method, it has no such option, or a value is refused (`__post_init__` raises).
    """
    key = name.replace("-", "_")
    if key not in METHODS:
        raise TamisError(f"no method '{name}'; choose one of: {', '.join(METHODS)}")
    module, _, attribute = METHODS[key].partition(":")
    make: Callable[..., Method] = getattr(importlib.import_module(module), attribute)
    known = option_names(make)
    for option in options or {}:
        if option not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise TamisError(f"method {key} has no option '{option}'; {takes}")
    return make(**dict(options or {}))


def option_names(make: Any) -> list[str]:
    """Names of a method's options: the fields of its dataclass that its constructor takes."""
    return [f.name for f in dataclasses.fields(make) if f.init]


def method_options(method: Method) -> dict[str, Any]:
    """A method's options with their values, as the configuration hash takes them."""
    return {n: getattr(method, n) for n in option_names(method)}
