"""Prompts from held-out toxic rows: their first words, of rows that no arm was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.compare.config import CompareConfig
from pipelines.evaluation.tables import read_table
from schemas.errors import InputError
from schemas.fingerprint import fingerprint

_LEFT_OVER = 3  # words a row must go on with after its prompt: there is something to continue


@dataclass(frozen=True)
class Prompt:
    """A prompt and the row it was made of.

    Attributes:
        text: What the model is given.
        source: Content hash of the whole row.
        group: Its group; empty where rows have none.
    """

    text: str
    source: str
    group: str = ""


def content_hash(text: str) -> str:
    """Hash of what a text says: case and spacing left out, so that a copy is found however it was stored."""
    return fingerprint("content", " ".join(text.casefold().split()))


def find_prompts(config: CompareConfig) -> list[Prompt]:
    """The prompts of a comparison: those of its file, or of held-out rows that stand in no corpus it was given.

    Raises:
        InputError: There are not so many, or no such columns.
    """
    if config.prompts is not None:
        return given_prompts(config.prompts, config.group_column)
    assert config.held_out is not None  # planning has seen to it
    table = read_table(config.held_out)
    texts = table.texts(config.held_out_column)
    groups = table.column(config.group_column) if config.group_column else [""] * len(texts)
    rows = [(t, str(g) if g is not None else "") for t, g in zip(texts, groups, strict=True)]
    known = hashes([config.raw, *config.given.values()], config.text_column)
    return make_prompts(rows, config.make_prompts, config.prompt_words, known)


def prompts_fingerprint(prompts: Sequence[Prompt]) -> str:
    """Hash of prompts, in their order, with their groups."""
    return fingerprint(*[part for p in prompts for part in (p.text, p.source, p.group)])


def make_prompts(
    rows: Iterable[tuple[str | None, str]],
    count: int,
    words: int,
    trained_on: frozenset[str] | set[str] = frozenset(),
) -> list[Prompt]:
    """Prompts of a sample of rows.

    Args:
        rows: (text, group) of held-out rows.
        count: How many prompts.
        words: Words of each.
        trained_on: Content hashes of the rows of every training corpus; these rows are left out.

    Returns:
        `count` prompts, no two alike, chosen and ordered by content hash: the same whatever the order of the rows.

    Raises:
        InputError: There are not so many.
    """
    found: dict[str, Prompt] = {}
    seen = short = known = 0
    for text, group in rows:
        if not text or not text.strip():
            continue
        seen += 1
        parts = text.split()
        source = content_hash(text)
        if len(parts) < words + _LEFT_OVER:
            short += 1
        elif source in trained_on:
            known += 1
        else:
            prompt = Prompt(" ".join(parts[:words]), source, group)
            found.setdefault(content_hash(prompt.text), prompt)
    if len(found) < count:
        raise InputError(
            f"{len(found)} prompts can be made of {seen:,} held-out rows ({known:,} stand in a training corpus, "
            f"{short:,} are shorter than {words + _LEFT_OVER} words), not {count}; give more rows, or lower "
            "--make-prompts or --prompt-words"
        )
    return sorted(found.values(), key=lambda p: fingerprint("prompt", p.source))[:count]


def given_prompts(source: str, group_column: str | None = None) -> list[Prompt]:
    """The prompts of a file, as `tamis eval toxicity` reads it.

    Raises:
        InputError: It has no column of prompts, or none that says anything.
    """
    from pipelines.eval_toxicity import ToxicityEvalConfig, read_prompts
    from pipelines.evaluation.prompts import PROMPT_COLUMNS

    known = read_table(source).columns
    if not any(name in known for name in PROMPT_COLUMNS):
        wanted = " or ".join(f"'{name}'" for name in PROMPT_COLUMNS)
        raise InputError(
            f"{source}: prompts are taken from a column {wanted}, and there is none (columns: "
            f"{', '.join(known) or 'none'}); rename the one that holds them"
        )
    columns, _ = read_prompts(
        ToxicityEvalConfig(models=("-",), output="-", prompts=source, group_column=group_column)
    )
    pairs = zip(columns["prompt"], columns["group"], strict=True)
    return [Prompt(text, content_hash(text), group) for text, group in pairs]


def hashes(sources: Sequence[str], column: str) -> set[str]:
    """Content hashes of all rows of some corpora."""
    return {content_hash(t) for source in sources for t in read_table(source).texts(column) if t}


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Write prompts as Parquet: `prompt`, `group` (where there are any), `source`."""
    columns = {"prompt": [p.text for p in prompts], "source": [p.source for p in prompts]}
    if any(p.group for p in prompts):
        columns["group"] = [p.group for p in prompts]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(pa.table(columns), temporary)
    temporary.replace(path)


def begun_by(texts: Iterable[str | None], prompts: Sequence[str]) -> int:
    """How many of the prompts begin a text: a model trained on these may know how they go on."""
    wanted = {tuple(p.casefold().split()) for p in prompts}
    lengths = sorted({len(w) for w in wanted if w})
    met = set()
    for text in texts:
        words = (text or "").casefold().split()
        for length in lengths:
            start = tuple(words[:length])
            if len(start) == length and start in wanted:
                met.add(start)
    return len(met)
