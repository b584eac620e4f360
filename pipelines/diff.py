"""`tamis diff`: the edits of an output, word by word, in a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.report.output import TEXT_ROWS, Output
from pipelines.report.query import pick
from pipelines.report.words import word_diff
from schemas.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_COLOURS = {
    "rewrite": "green",
    "span_edit": "green",
    "redact": "yellow",
    "drop_segment": "yellow",
    "drop_document": "red",
    "flag": "red",
}
_MAX_CHARS = 4_000


def show_diff(
    out: str,
    *,
    limit: int = 20,
    where: str | None = None,
    row_id: str | None = None,
    console: Console | None = None,
    options: Mapping[str, Any] | None = None,
) -> int:
    """Print edits: what each did, its scores, its toxic spans, and the text with words struck out and put in.

    Without colours (a pipe, `NO_COLOR`) changes are marked `[-as here-]{+like this+}`.

    Args:
        out: Output folder of a job, local or any fsspec URL.
        limit: Edits to show at most.
        where: SQL condition over the columns of edits/ (`toxicity_after > 0.3`, `action = 'redact'`).
        row_id: Only edits of the row with this id.
        console: Where to print.
        options: fsspec options of the folder's filesystem.

    Returns:
        Number of edits printed.

    Raises:
        OutputError: There is no such folder.
        InputError: The condition cannot be applied, or no row has that id.
    """
    from rich.console import Console

    console = console or Console()
    output = Output(out, options)
    shown, more = 0, False
    for edit in iter_edits(output, where=where, row_id=row_id):
        if shown == limit:
            more = True
            break
        console.print(render_edit(edit, plain=console.color_system is None), highlight=False)
        shown += 1
    if not shown:
        _explain_none(output, where, row_id, console)
    elif more:
        total = output.rows("edits")
        rest = "" if where or row_id else f" of {total:,}"
        console.print(f"{shown} edits shown{rest}; --limit shows more", style="dim")
    return shown


def iter_edits(
    output: Output, *, where: str | None = None, row_id: str | None = None
) -> Iterator[dict[str, Any]]:
    """Edits of an output in the order of shards and rows, as mappings with the fields of `EDIT_SCHEMA`."""
    batches: Iterator[pa.RecordBatch] = (b for _, b in output.batches("edits", batch_rows=TEXT_ROWS))
    if row_id is not None:
        batches = (b.filter(pc.equal(b.column("id"), row_id)) for b in batches)
    for batch in pick(batches, where):
        yield from batch.to_pylist()


def render_edit(edit: Mapping[str, Any], *, plain: bool = False) -> Text:
    """One edit as Rich text: a line of facts, a line of spans, the difference.

    Args:
        edit: With the fields of `EDIT_SCHEMA`.
        plain: Mark changes with brackets instead of colours.
    """
    from rich.text import Text

    action = str(edit["action"])
    text = Text()
    text.append(str(edit["id"]), style="bold")
    text.append(f"  {action}", style=_COLOURS.get(action, "cyan"))
    text.append(f"  toxicity {_score(edit['toxicity_before'])}")
    if edit["before"] != edit["after"]:
        text.append(f" → {_score(edit['toxicity_after'])}")
        if edit.get("similarity") is not None:
            text.append(f"  similarity {_score(edit['similarity'])}")
    if edit.get("temperature") is not None:
        text.append(f"  temperature {edit['temperature']:g}")
    candidates = edit.get("candidates") or []
    if candidates:
        passed = sum(not c["reasons"] for c in candidates)
        text.append(f"  {passed}/{len(candidates)} candidates passed")
    place = "" if edit["id"] == f"{edit['shard']}#{edit['row']}" else f"{edit['shard']} row {edit['row']}, "
    text.append(f"  {place}characters {edit['start']}–{edit['end']}\n", style="dim")
    if spans := _spans(edit):
        text.append(f"toxic: {spans}\n", style="dim")
    text.append_text(_difference(edit, plain=plain))
    text.append("\n")
    return text


def _difference(edit: Mapping[str, Any], *, plain: bool) -> Text:
    from rich.text import Text

    before, after = _clip(edit["before"]), _clip(edit["after"])
    text = Text()
    pieces = word_diff(before, after)
    for kind, piece in pieces:
        if kind == "equal":
            text.append(piece)
        elif kind == "delete":
            text.append(f"[-{piece}-]") if plain else text.append(piece, style="red strike")
        else:
            text.append(f"{{+{piece}+}}") if plain else text.append(piece, style="green")
    return text


def _spans(edit: Mapping[str, Any]) -> str:
    found = []
    for span in edit.get("spans") or []:
        start, end = max(0, span["start"] - edit["start"]), span["end"] - edit["start"]
        score = "" if span.get("score") is None else f" {_score(span['score'])}"
        found.append(f"“{edit['before'][start:end]}”{score}")
    return ", ".join(found)


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _clip(text: str) -> str:
    return text if len(text) <= _MAX_CHARS else text[:_MAX_CHARS] + " […]"


def _explain_none(output: Output, where: str | None, row_id: str | None, console: Console) -> None:
    if not output.files("edits"):
        if not output.manifest and output.plan:
            console.print(f"no edits yet: the run has not finished; see `tamis status {output.folder.url}`")
        else:
            console.print("this job made no edits")
    elif row_id is not None:
        raise InputError(
            f"no edit of a row with id '{row_id}'; `tamis inspect {output.folder.url} --table edits`"
        )
    elif where is not None:
        console.print("no edit fulfils the condition")
