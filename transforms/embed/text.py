"""The text to embed, made of one column or several: `{title} {text}`."""

from __future__ import annotations

import string
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc

from schemas.columns import to_text
from schemas.errors import TamisError


@dataclass(frozen=True)
class TextTemplate:
    r"""A text with column names in braces; `{{` and `}}` stand for braces.

    Attributes:
        template: `{text}`, `{title} {text}`, `Title: {title}\n{text}`.

    Raises:
        TamisError: It names no column, or is not a template.
    """

    template: str = "{text}"

    def __post_init__(self) -> None:
        if not self.columns:
            raise TamisError(f"--text '{self.template}' names no column; write one in braces: '{{text}}'")

    @classmethod
    def joined(cls, columns: tuple[str, ...]) -> TextTemplate:
        """Columns joined with one space, as `title,text` usually are."""
        return cls(" ".join("{" + name + "}" for name in columns))

    @cached_property
    def _parts(self) -> tuple[tuple[str, str | None], ...]:
        try:
            parsed = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise TamisError(f"--text '{self.template}' is no template: {error}") from error
        for _, name, spec, conversion in parsed:
            if name == "" or spec or conversion:
                raise TamisError(
                    f"--text '{self.template}': write only column names in braces, nothing before or behind"
                )
        return tuple((literal, name) for literal, name, _, _ in parsed)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, in order, each once."""
        return tuple(dict.fromkeys(name for _, name in self._parts if name is not None))

    @property
    def is_plain(self) -> bool:
        """Whether the text is a column as it stands."""
        return len(self.columns) == 1 and self.template == "{" + self.columns[0] + "}"

    def render(self, batch: pa.RecordBatch) -> pa.Array:
        """The text of every row.

        Args:
            batch: n rows with all columns of the template.

        Returns:
            n strings: a plain column as it is (null stays null); else the filled template, nulls as nothing, without
            white space at its ends.
        """
        if self.is_plain:
            return to_text(batch.column(self.columns[0]))
        values = {name: to_text(batch.column(name)) for name in self.columns}
        large = any(pa.types.is_large_string(v.type) for v in values.values())
        type_ = pa.large_string() if large or sum(v.nbytes for v in values.values()) > 2**30 else pa.string()
        pieces: list[pa.Array | pa.Scalar] = []
        for literal, name in self._parts:
            if literal:
                pieces.append(pa.scalar(literal, type_))
            if name is not None:
                pieces.append(values[name].cast(type_))
        filled = pc.binary_join_element_wise(
            *pieces, pa.scalar("", type_), null_handling="replace", null_replacement=""
        )
        return pc.utf8_trim_whitespace(filled)
