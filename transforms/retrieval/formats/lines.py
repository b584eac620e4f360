"""Reading and writing of lines: JSONL and separated values, compressed or not, bad lines set aside by number."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import orjson

from schemas.errors import InputError
from transforms.retrieval.collection import DeadLine
from transforms.shards.files import Folder


@contextmanager
def lines_of(folder: Folder, name: str) -> Iterator[IO[bytes]]:
    """Lines of a file, looking through .gz, .zst and .bz2."""
    with folder.open(name) as raw:
        if name.endswith(".gz"):
            with gzip.open(raw) as unpacked:
                yield unpacked  # type: ignore[misc]
        elif name.endswith(".bz2"):
            import bz2

            with bz2.open(raw) as unpacked:
                yield unpacked  # type: ignore[misc]
        elif name.endswith(".zst"):
            import zstandard

            yield io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw))
        else:
            yield raw


def json_lines(
    folder: Folder, name: str, dead: list[DeadLine] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSONL file; a line that is no object goes to `dead`, or nowhere on a second pass."""
    with lines_of(folder, name) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                bury(dead, name, number, f"not JSON ({error})", line)
                continue
            if not isinstance(row, dict):
                bury(dead, name, number, "not a JSON object", line)
                continue
            yield number, row


def separated_lines(folder: Folder, name: str) -> Iterator[tuple[int, str]]:
    """(line number, text) of a file of columns; bytes that are no UTF-8 are an error of the whole file.

    Raises:
        InputError: The file is not UTF-8.
    """
    with lines_of(folder, name) as stream:
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{name}, line {number}: not UTF-8 ({error.reason})") from error
            text = text.rstrip("\r\n")
            if text.strip():
                yield number, text


def bury(dead: list[DeadLine] | None, file: str, number: int, error: str, line: bytes | str) -> None:
    """Set a line aside."""
    if dead is not None:
        content = line.decode("utf-8", "replace") if isinstance(line, bytes) else line
        dead.append(DeadLine(file, number, error, content.rstrip("\r\n")))


def write_json_lines(folder: Folder, name: str, rows: Iterable[Any]) -> int:
    """Write a JSONL file (gzip by its name) at once; returns the number of lines."""
    count = 0
    with (
        folder.publish(name) as temporary,
        gzip.open(temporary, "wb") if name.endswith(".gz") else temporary.open("wb") as out,
    ):
        for row in rows:
            out.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
            count += 1
    return count


def write_lines(folder: Folder, name: str, lines: Iterable[str]) -> int:
    """Write a text file at once; returns the number of lines."""
    count = 0
    with folder.publish(name) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as out:
        for line in lines:
            out.write(line + "\n")
            count += 1
    return count


def extra_of(row: dict[str, Any], known: tuple[str, ...]) -> str | None:
    """The fields of a row nobody asked for, as a JSON object; None where there are none."""
    rest = {k: v for k, v in row.items() if k not in known}
    return orjson.dumps(rest, option=orjson.OPT_SORT_KEYS).decode() if rest else None


def extra_back(extra: str | None) -> dict[str, Any]:
    """What `extra_of` kept."""
    return dict(orjson.loads(extra)) if extra else {}


def text_id(text: str, title: str = "", *, kind: str) -> str:
    """An id made of a text, for formats that carry texts without ids: equal texts are one document."""
    from schemas.fingerprint import fingerprint

    return f"{kind}-{fingerprint(title, text)[:20]}"


def as_id(value: Any, what: str) -> str:
    """An id as text: strings as they are, whole numbers written out.

    Raises:
        ValueError: It is neither, or empty.
    """
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{what} is {value!r}, which is no id")
