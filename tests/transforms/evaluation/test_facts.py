"""Facts counted in a source and its replacement."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transforms.evaluation.facts import FACTS, count_facts


@pytest.mark.parametrize(
    ("before", "after", "there", "kept", "invented"),
    [
        ("Ask Ana, she paid 40 euros.", "Ask Ana, she paid.", (1, 1, 0, 0), (0, 1, 0, 0), 0),
        ("He paid 4, 5 and 5.", "He paid 5, 5 and 6.", (3, 0, 0, 0), (2, 0, 0, 0), 1),
        ("I do not like it, never did.", "I do not like it.", (0, 0, 0, 2), (0, 0, 0, 1), 0),
        ("See www.example.org/a now.", "See www.example.org/b now.", (0, 0, 1, 0), (0, 0, 0, 0), 1),
        ("We met Marta and Ben last June.", "We met Ben.", (0, 3, 0, 0), (0, 1, 0, 0), 0),
    ],
)
def test_each_kind_is_counted(before, after, there, kept, invented):
    found = count_facts(before, after)
    assert (found.there, found.kept, found.invented) == (there, kept, invented)
    assert found.whole == (there == kept and not invented)


def test_what_a_toxic_span_holds_need_not_be_kept():
    text = "You number 1 idiot, you owe me 20."
    assert count_facts(text, "You owe me 20.").kept == (1, 0, 0, 0)
    assert count_facts(text, "You owe me 20.", [(4, 18)]).whole


TEXTS = st.lists(
    st.sampled_from(
        ["Ana", "Ben", "paid", "12", "40.5", "not", "never", "www.example.org", "a@b.org", ",", "."]
    ),
    max_size=12,
).map(" ".join)


@given(TEXTS, TEXTS)
def test_nothing_is_kept_that_was_not_there(before, after):
    found = count_facts(before, after)
    assert len(found.there) == len(found.kept) == len(FACTS)
    assert all(0 <= k <= n for k, n in zip(found.kept, found.there, strict=True))


@given(TEXTS)
def test_a_copy_keeps_all_and_nothing_keeps_nothing(text):
    assert count_facts(text, text).whole
    assert not any(count_facts(text, "").kept)
