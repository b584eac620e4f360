from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transforms.detox.ends import match_ends


@pytest.mark.parametrize(
    ("source", "answer", "expected"),
    [
        ("Only a fool would buy it.", "only some would buy it", "Only some would buy it."),
        ("What a moron!", "he is wrong", "He is wrong!"),
        ("Are you stupid?!", "are you sure", "Are you sure?!"),
        ('He said "shut up."', "he asked for quiet", 'He asked for quiet."'),
        ("stop it, you fool", "stop it", "stop it"),
        ("What a load of crap.", "That is bad,", "That is bad."),
        ("Fine.", "Already closed!", "Already closed!"),
        ("Noooo!!!!!!", "no", "No!!!"),
        ("Gone.", "", ""),
    ],
)
def test_keeps_the_closing_mark_and_the_capital(source: str, answer: str, expected: str) -> None:
    assert match_ends(source, answer) == expected


@given(st.text(max_size=30), st.text(max_size=30))
def test_doing_it_twice_changes_nothing_more(source: str, answer: str) -> None:
    once = match_ends(source, answer)
    assert match_ends(source, once) == once
