"""The text to embed: a column as it stands, or several in a template."""

import pyarrow as pa
import pytest

from schemas.errors import TamisError
from transforms.embed.text import TextTemplate

BATCH = pa.record_batch(
    {
        "text": pa.array(["  body ", None, "three"]),
        "title": pa.array(["one", "two", None]).dictionary_encode(),
        "year": pa.array([1999, None, 2001]),
    }
)


def test_a_plain_column_is_left_as_it_is():
    template = TextTemplate("{text}")
    assert template.is_plain and template.columns == ("text",)
    assert template.render(BATCH).to_pylist() == ["  body ", None, "three"]


def test_columns_are_joined_and_missing_ones_leave_no_trace_at_the_ends():
    template = TextTemplate.joined(("title", "text"))
    assert template.template == "{title} {text}"
    assert template.render(BATCH).to_pylist() == ["one   body", "two", "three"]


def test_a_template_may_hold_words_numbers_and_braces():
    template = TextTemplate("{{{year}}} {title}: {text}")
    assert template.columns == ("year", "title", "text")
    assert template.render(BATCH).to_pylist() == ["{1999} one:   body", "{} two:", "{2001} : three"]


@pytest.mark.parametrize("wrong", ["no column", "{", "{title!r}", "{text:>10}", "{}"])
def test_what_is_no_template_is_said(wrong):
    with pytest.raises(TamisError, match="--text"):
        TextTemplate(wrong)
