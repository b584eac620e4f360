"""The prompts of `tamis eval toxicity`: read from whatever table holds them, and kept in the result folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schemas.errors import InputError, OutputError

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.eval_toxicity import ToxicityEvalConfig
    from pipelines.evaluation.folder import EvalFolder
    from pipelines.evaluation.tables import Table

PROMPTS = "prompts.parquet"
PROMPT_COLUMNS = ("prompt", "text")


def read_prompts(config: ToxicityEvalConfig) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """The prompts to use, and what is to be said of them.

    Returns:
        Columns `id`, `group` and `prompt`, all text; source, rows, how many were empty, and groups.

    Raises:
        InputError: No such column, no prompt, or an id twice.
    """
    from pipelines.evaluation.tables import read_table

    table = read_table(config.prompts)
    column = config.prompt_column or table.first_of(PROMPT_COLUMNS, "the prompts (--prompt-column)")
    prompts = _texts(table, column)
    ids = [str(x) for x in table.column(config.id_column)] if config.id_column else _numbers(len(prompts))
    groups = (
        ["" if x is None else str(x) for x in table.column(config.group_column)]
        if config.group_column
        else [""] * len(prompts)
    )
    used = [i for i, text in enumerate(prompts) if text.strip()]
    empty = len(prompts) - len(used)
    if config.limit is not None and config.limit < len(used):
        used = _some(used, prompts, config.limit)
    if not used:
        raise InputError(
            f"{config.prompts}: column '{column}' holds no prompt ({len(prompts)} rows, all empty)"
        )
    chosen = {
        "id": [ids[i] for i in used],
        "group": [groups[i] for i in used],
        "prompt": [prompts[i] for i in used],
    }
    if len(set(chosen["id"])) < len(used):
        twice, _ = Counter(chosen["id"]).most_common(1)[0]
        raise InputError(
            f"{config.prompts}: id '{twice}' stands there twice; pass another --id-column, or none"
        )
    names = sorted(set(chosen["group"]) - {""})
    unknown = [g for g in config.combine if g not in names]
    if unknown:
        raise InputError(f"--combine {unknown[0]}: no such group; there are {', '.join(names) or 'none'}")
    facts = {
        "source": config.prompts,
        "column": column,
        "rows": len(prompts),
        "used": len(used),
        "empty": empty,
        "groups": {g: chosen["group"].count(g) for g in names},
    }
    return chosen, facts


def _texts(table: Table, column: str) -> list[str]:
    """A column of prompts; RealToxicityPrompts keeps them in the field `text` of a record."""
    values = [v.get("text") if isinstance(v, Mapping) else v for v in table.column(column)]
    for i, value in enumerate(values):
        if value is not None and not isinstance(value, str):
            raise InputError(
                f"{table.source}: column '{column}' holds {type(value).__name__} (row {i}), not text; "
                f"columns: {', '.join(table.columns)}"
            )
    return [v or "" for v in values]


def _numbers(count: int) -> list[str]:
    return [f"p{i}" for i in range(count)]


def _some(rows: list[int], prompts: Sequence[str], limit: int) -> list[int]:
    """So many rows by the hash of their prompts, in their order: the same ones whatever the file's order."""
    from schemas.fingerprint import fingerprint

    return sorted(sorted(rows, key=lambda i: (fingerprint("prompt", prompts[i]), i))[:limit])


def _as_table(table: Mapping[str, Sequence[str]]) -> pa.Table:
    import pyarrow as pa

    return pa.table({name: pa.array(values, pa.string()) for name, values in table.items()})


def _prompts_there(path: Path) -> pa.Table | None:
    """The prompts of an earlier run; None where there are none, or a file torn by a kill."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError):
        return None


def check_prompts(output: Path, table: Mapping[str, Sequence[str]]) -> None:
    """Refuse to replace an evaluation of other prompts.

    Raises:
        OutputError: The folder holds one.
    """
    before = _prompts_there(output / PROMPTS)
    if before is not None and not before.equals(_as_table(table)):
        raise OutputError(
            f"{output} holds an evaluation of {before.num_rows:,} other prompts; pass --overwrite to replace it, or "
            "another -o"
        )


def publish_prompts(folder: EvalFolder, table: Mapping[str, Sequence[str]]) -> None:
    """Write the prompts once; a file that stands there with the same content is left, so that jobs over it resume."""
    import pyarrow.parquet as pq

    content = _as_table(table)
    before = _prompts_there(folder.folder.local(PROMPTS))
    if before is not None and before.equals(content):
        return
    with folder.folder.publish(PROMPTS) as temporary:
        pq.write_table(content, temporary, compression="zstd")
