"""Formats of retrieval collections: found by name, or by looking at a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from schemas.errors import InputError

if TYPE_CHECKING:
    from transforms.retrieval.collection import RetrievalData
    from transforms.retrieval.formats.base import Format, ImportOptions, Source

# Name -> module and constant; imported when needed, looked at in this order.
_FORMATS = {
    "tamis": ("tables", "FOLDER"),
    "beir": ("beir", "FORMAT"),
    "trec-qrels": ("trec", "QRELS"),
    "trec-run": ("trec", "RUN"),
    "datasets": ("hub", "FORMAT"),
    "tevatron": ("tevatron", "V1"),
    "tevatron-v2": ("tevatron", "V2"),
    "dpr": ("dpr", "FORMAT"),
    "flagembedding": ("flagembedding", "FORMAT"),
    "pylate": ("pylate", "FORMAT"),
    "sentence-transformers": ("sentence_transformers", "FORMAT"),
    "table": ("tables", "TABLE"),
}


def names(*, writable: bool = False) -> list[str]:
    """Names of the formats, for `--format`."""
    return [n for n in _FORMATS if not writable or n not in ("tamis", "table")]


def find(name: str) -> Format:
    """A format by its name.

    Raises:
        InputError: There is none.
    """
    import importlib

    if name not in _FORMATS:
        raise InputError(f"no format '{name}'; there are {', '.join(_FORMATS)}")
    module, constant = _FORMATS[name]
    found: Format = getattr(importlib.import_module(f"transforms.retrieval.formats.{module}"), constant)
    return found


def read(
    url: str,
    options: ImportOptions | None = None,
    format_name: str | None = None,
    storage: dict[str, Any] | None = None,
) -> tuple[RetrievalData, str]:
    """Read a collection of any format.

    Args:
        url: File, folder or URL.
        options: What it cannot say of itself.
        format_name: Its format; None looks.
        storage: fsspec options of its filesystem.

    Returns:
        What it holds, and the name of its format.

    Raises:
        InputError: Nothing there, or of no known format; whatever its reader raises.
    """
    from transforms.retrieval.formats.base import ImportOptions, Source

    source = Source.open(url, storage)
    options = options or ImportOptions()
    candidates = [find(format_name)] if format_name else [find(n) for n in _FORMATS]
    for format_ in candidates:
        if format_.read is None:
            raise InputError(f"format '{format_.name}' is only written")
        if format_name or (format_.recognises is not None and format_.recognises(source)):
            return format_.read(source, options), format_.name
    raise InputError(_why_unknown(source))


def _why_unknown(source: Source) -> str:
    """What stands there that no format recognises: nothing, a file that cannot be read, or other columns."""
    from transforms.retrieval.formats.tables import columns_of

    if not source.files():
        return f"{source.url} holds no files"
    try:
        columns = columns_of(source)
    except InputError as error:
        return f"{source.url} is of no format known here ({error})"
    return (
        f"{source.url} is of no format known here (columns: {', '.join(sorted(columns)) or 'none'}); a table has query_id, doc_id and a "
        f"grade, rank or score; `tamis judgments import --format` reads {', '.join(_FORMATS)}"
    )
