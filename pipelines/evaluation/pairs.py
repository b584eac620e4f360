"""What `tamis eval rewrites` compares: sources, their references, and one text a system for every source."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipelines.evaluation.joins import is_output, read_job
from pipelines.evaluation.tables import Table, distinct_ids, read_table, read_tables
from pipelines.report.output import Output
from schemas.errors import InputError
from transforms.shards.files import Folder

SOURCES = ("source", "toxic", "before", "text")
OUTPUTS = ("output", "rewritten", "rewrite", "prediction", "neutral", "after", "text")
_REFERENCE = re.compile(r"(?:reference|references|ref|neutral)_?\d*")


@dataclass(frozen=True)
class Pairs:
    """n sources and everything that belongs to them.

    Attributes:
        table: What was read.
        rows: Indices of its rows that have a source; the others are left out.
        sources: n texts.
        references: For each the texts people wrote (distinct, not empty).
        reference_columns: Where these came from.
        source_column: The sources' column.
    """

    table: Table
    rows: list[int]
    sources: list[str]
    references: list[list[str]]
    reference_columns: list[str]
    source_column: str


def read_pairs(
    inputs: Sequence[str],
    systems: Mapping[str, str],
    *,
    source: str | None,
    references: Sequence[str] | None,
    limit: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Pairs:
    """Read sources and references.

    Args:
        inputs: Files or folders; without any, the input of the first system that is an output of tamis.
        systems: Name -> column, file or output.
        source: Column of the sources; by default one of `SOURCES`.
        references: Columns of references (texts, or lists of texts); None looks for `reference...` and `neutral...`.
        limit: Only the first so many rows; 0 = all.
        options: fsspec options.

    Raises:
        InputError: Nothing to read, no such column.
    """
    if not inputs:
        inputs, found = _input_of(systems, options)
        source = source or found
    table = read_tables(inputs, options)
    column = source or table.first_of(SOURCES, "the source (--source)")
    used = set(systems.values()) | {column}
    names = (
        list(references)
        if references is not None
        else [c for c in table.columns if _REFERENCE.fullmatch(c.lower()) and c not in used]
    )
    texts = table.texts(column)
    columns = [table.column(name) for name in names]
    rows = [i for i, t in enumerate(texts) if t and t.strip()]
    rows = rows[:limit] if limit else rows
    if not rows:
        raise InputError(f"{table.source}: column '{column}' holds no text")
    return Pairs(
        table,
        rows,
        [str(texts[i]) for i in rows],
        [_references([c[i] for c in columns], table.source) for i in rows],
        names,
        column,
    )


@dataclass(frozen=True)
class SystemTexts:
    """One system's texts for n sources.

    Attributes:
        texts: None where it has none.
        known: Whether the system was given each source at all (what it then dropped is known, and has no text).
    """

    texts: list[str | None]
    known: list[bool]

    @property
    def missing(self) -> int:
        """How many sources it has no text for."""
        return sum(t is None for t in self.texts)

    def only(self, keep: Sequence[int]) -> SystemTexts:
        """The same for some of the sources."""
        return SystemTexts([self.texts[i] for i in keep], [self.known[i] for i in keep])


def common_rows(pairs: Pairs, systems: Mapping[str, SystemTexts]) -> tuple[Pairs, dict[str, SystemTexts]]:
    """Only the sources that every system was given.

    Raises:
        InputError: There are none.
    """
    keep = [i for i in range(len(pairs.sources)) if all(s.known[i] for s in systems.values())]
    if not keep:
        raise InputError(
            f"no source of {pairs.table.source} was given to every system ({', '.join(systems)})"
        )
    fewer = replace(
        pairs,
        rows=[pairs.rows[i] for i in keep],
        sources=[pairs.sources[i] for i in keep],
        references=[pairs.references[i] for i in keep],
    )
    return fewer, {name: s.only(keep) for name, s in systems.items()}


def system_texts(
    pairs: Pairs, spec: str, *, id_column: str | None, options: Mapping[str, Any] | None = None
) -> SystemTexts:
    """One system's texts for the sources.

    Args:
        pairs: The sources.
        spec: A column of the table; an output of tamis; or a file, `FILE#COLUMN` to name its column.
        id_column: Column of ids to join a file or an output by; by default rows are joined in order.
        options: fsspec options.

    Raises:
        InputError: It is none of these, or its rows are not the sources'.
    """
    if spec in pairs.table.columns:
        found: list[str | None] = pairs.table.texts(spec)
        known = [True] * len(found)
    elif is_output(spec, options):
        job = read_job(spec, options=options)
        rows = job.align(pairs.table, texts=pairs.table.texts(pairs.source_column), id_column=id_column)
        found = [None if r is None else r.text for r in rows]
        known = [r is not None for r in rows]
    else:
        found = _from_file(pairs, spec, id_column, options)
        known = [t is not None for t in found]
    return SystemTexts(found, known).only(pairs.rows)


def is_folder_of_tamis(spec: str, options: Mapping[str, Any] | None = None) -> bool:
    """Whether a system's texts come from an output of tamis, whose lineage says what ranked them."""
    return is_output(spec, options)


def _from_file(
    pairs: Pairs, spec: str, id_column: str | None, options: Mapping[str, Any] | None
) -> list[str | None]:
    path, _, column = spec.partition("#")
    parent, _, name = path.rpartition("/")
    if not Folder(parent or ("/" if path.startswith("/") else "."), **(options or {})).exists(name):
        known = ", ".join(pairs.table.columns)
        raise InputError(f"--system ...={spec}: neither a column ({known}) nor a file or folder")
    table = read_table(path, options)
    texts = table.texts(column or table.first_of(OUTPUTS, f"the output (--system NAME={path}#COLUMN)"))
    if id_column is not None:
        ids = distinct_ids(table.column(id_column), path)
        known_ids = dict(zip(ids, texts, strict=True))
        found = [known_ids.get(k) for k in distinct_ids(pairs.table.column(id_column), pairs.table.source)]
        if all(t is None for t in found):
            raise InputError(f"{path}: none of its ids in column '{id_column}' is in {pairs.table.source}")
        return found
    if len(table) != len(pairs.table):
        raise InputError(
            f"{path} has {len(table):,} rows, {pairs.table.source} {len(pairs.table):,}; pass --id-column to join them"
        )
    return texts


def _input_of(systems: Mapping[str, str], options: Mapping[str, Any] | None) -> tuple[list[str], str]:
    for spec in systems.values():
        if is_output(spec, options):
            manifest = Output(spec, options).require_manifest()
            root = Folder(manifest["input"]["root"], **(options or {}))
            paths = [root.path(s["path"]) for s in manifest["shards"]]
            missing = next((s["path"] for s in manifest["shards"] if not root.exists(s["path"])), None)
            if missing is None:
                return paths, str(manifest["input"]["text_column"])
            raise InputError(
                f"{spec} was made from {root.url}/{missing}, which is not there; name the pairs' file"
            )
    raise InputError(
        "nothing to compare: name a file with sources, or pass --system NAME=OUT with a detox output"
    )


def _references(values: Sequence[Any], where: str) -> list[str]:
    out: dict[str, None] = {}
    for value in values:
        for text in value if isinstance(value, list) else [value]:
            if text is not None and not isinstance(text, str):
                raise InputError(f"{where}: a reference is {type(text).__name__}, not text")
            if text and text.strip():
                out[text.strip()] = None
    return list(out)
