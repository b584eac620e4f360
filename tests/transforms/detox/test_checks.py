"""Each hard condition, by its name: what it refuses, and what it lets pass."""

from __future__ import annotations

import pytest

from transforms.detox import checks
from transforms.detox.checks import CHECKS, Source, Trial, failed_conditions, find_names
from transforms.detox.language import differs_in_language, dominant_script
from transforms.detox.options import ACCEPT_DEFAULTS, CONDITIONS, AcceptOptions


def source(text, *spans, toxicity=0.9):
    return Source(text, toxicity, tuple((text.index(s), text.index(s) + len(s)) for s in spans))


def outcome(name, before, after, **options):
    return CHECKS[name](before, Trial(after, 0.1, 0.9), AcceptOptions(**options))


def test_every_condition_has_its_function():
    assert tuple(CHECKS) == CONDITIONS


@pytest.mark.parametrize(
    ("name", "before", "spans", "after", "reason"),
    [
        ("numbers", "He stole 1,200 euros on 4/5.", [], "He took 1,200 euros on 4/5.", None),
        ("numbers", "He stole 40 euros.", [], "He took 14 euros.", "numbers"),
        ("numbers", "He stole 40 euros.", [], "He took money.", "numbers"),
        ("numbers", "He stole money.", [], "He took 40 euros.", "numbers"),
        ("numbers", "It is 3.5 percent.", [], "It is 3.5 percent.", None),
        ("numbers", "You id10t, take 2.", ["id10t"], "Take 2.", None),
        ("names", "I told Ann that Bob is dumb.", [], "I told Ann that Bob is unwise.", None),
        ("names", "I told Ann that Bob is dumb.", [], "I told Ann that he is unwise.", "names"),
        ("names", "I told Ann's brother, he is dumb.", [], "I told the brother of Ann.", None),
        ("names", "He is a Dumbo, said Ann.", ["Dumbo"], "He is slow, said Ann.", None),
        ("names", "@ann_b you are dumb", [], "@ann_b you are unwise", None),
        ("names", "@ann_b you are dumb", [], "you are unwise", "names"),
        ("names", "Dumb people live here.", [], "People live here.", None),  # begins the sentence
        ("names", "THAT IS A DUMB RULE", [], "That is a rule", None),  # shouting
        ("names", "It was the BBC again.", [], "It was them again.", "names"),
        ("names", "That is SO dumb, really.", [], "That is unwise.", None),
        ("urls", "See https://a.org/x?y=1. Dumb!", [], "See https://a.org/x?y=1", None),
        ("urls", "See https://a.org/x", [], "See https://a.org/y", "urls"),
        ("urls", "Write to ann@b.org, fool", [], "Write to her", "urls"),
        ("urls", "A dumb site", [], "A site: www.a.org", "urls"),
        ("negation", "I do not like dumb rules.", ["dumb"], "I like rules.", "negation"),
        ("negation", "I like dumb rules.", [], "I don’t like rules.", "negation"),
        ("negation", "That rule is stupid.", ["stupid"], "That rule is not wise.", None),
        ("negation", "He is not stupid.", ["stupid"], "He is clever.", None),
        ("negation", "I never said that he is such a stupid man.", ["stupid"], "I never said he is unwise.", None),
        ("negation", "I never said that he is such a stupid man.", ["stupid"], "I said he is unwise.", "negation"),
        ("language", "You are a stupid man and that is it.", [], "Du bist ein Mann und das ist nicht so gut.", "language"),
        ("language", "You are a stupid man.", [], "Ты неправ.", "language"),
        ("language", "You are a stupid man.", [], "You are not wise.", None),
        ("language", "Du bist so dumm und das ist es.", [], "You are not so wise and that is it.", "language"),
        ("language", "Du bist dumm.", [], "Du bist nicht klug.", None),
        ("language", "ok", [], "Bien sûr que non.", None),  # too little to say
        ("refusal", "You idiot.", [], "I'm sorry, but I can't help with that.", "refusal"),
        ("refusal", "You idiot.", [], "As an AI language model, I do not use such words.", "refusal"),
        ("refusal", "I'm sorry, but you are dumb.", [], "I'm sorry, but you are unwise.", None),
        ("refusal", "You idiot, I can't believe it.", [], "I can't believe it.", None),
        ("refusal", "You idiot.", [], "Sure! Here is the rewritten text: You person.", "meta"),
        ("refusal", "You idiot.", [], "Rewritten text: You person.", "meta"),
        ("refusal", "Where is the idiot?", [], "Here is the man you asked for.", None),
        ("copy", "You  IDIOT", [], "you idiot", "copy"),
        ("copy", "You ｉｄｉｏｔ", [], "You idiot", "copy"),
        ("copy", "You idiot", [], "You idiots", None),
        ("disguise", "You moronic fool", ["moronic"], "You moromic person", "disguised"),
        ("disguise", "You idiot there", ["idiot"], "You idiott there", "disguised"),
        ("disguise", "You idiot there", ["idiot"], "You idiots there", "disguised"),
        ("disguise", "You idiot there", ["idiot"], "You person there", None),
        ("disguise", "A damn idiot and a stupid one", ["idiot"], "A darn person and a stupid one", None),
        ("disguise", "Youre stupid", ["Youre stupid"], "You're unwise", None),
        ("disguise", "Damn it", ["Damn"], "Darn it", None),
        ("length", "You are a stupid and noisy man who lives next door.", [], "You.", "too_short"),
        ("length", "You are a stupid and noisy man.", [], "You are " + "very " * 30 + "noisy.", "too_long"),
        ("length", "Damn you!", [], "I am angry at you.", None),  # within the slack
    ],
)  # fmt: skip
def test_conditions_on_texts(name, before, spans, after, reason):
    assert outcome(name, source(before, *spans), after) == reason


def test_conditions_on_scores():
    before = source("x y", toxicity=0.7)
    for name, trial, reason in [
        ("toxicity", Trial("a", 0.5, 1), "still_toxic"),
        ("toxicity", Trial("a", 0.49, 1), None),
        ("improvement", Trial("a", 0.7, 1), "not_less_toxic"),
        ("improvement", Trial("a", 0.695, 1), "not_less_toxic"),
        ("improvement", Trial("a", 0.68, 1), None),
        ("lexicon", Trial("a", 0, 1, listed=0.5), "listed_word"),
        ("lexicon", Trial("a", 0, 1, listed=0.4), None),
        ("similarity", Trial("a", 0, 0.49), "too_far"),
        ("similarity", Trial("a", 0, 0.5), None),
    ]:
        assert CHECKS[name](before, trial, AcceptOptions(max_toxicity=0.5, min_similarity=0.5)) == reason


def test_all_reasons_are_reported_and_conditions_can_be_skipped_by_name():
    before = source("You idiot owe me 40 euros.", "idiot")
    trial = Trial("You idiot owe me money.", 0.95, 0.2)
    assert failed_conditions(before, trial, ACCEPT_DEFAULTS) == [
        "still_toxic",
        "not_less_toxic",
        "too_far",
        "numbers",
    ]
    lenient = AcceptOptions(skip={"improvement", "numbers", "similarity"})
    assert failed_conditions(before, trial, lenient) == ["still_toxic"]
    assert failed_conditions(before, trial, ACCEPT_DEFAULTS, only=frozenset({"numbers"})) == ["numbers"]


@pytest.mark.parametrize(
    ("text", "parsed", "reason"), [("", True, "empty"), (" ...", True, "empty"), ("ok", False, "unparsed")]
)
def test_what_is_no_answer_is_refused_whatever_is_skipped(text, parsed, reason):
    everything = AcceptOptions(skip=set(CONDITIONS))
    assert failed_conditions(source("You idiot."), Trial(text, 0, 1, parsed), everything) == [reason]
    assert checks.empty(source("😡😡"), Trial("🙂", 0, 1), everything) is None


def test_names_carry_their_place():
    text = "Oh, Ann met @bob_1 in Paris."
    assert [(n, text[a:b]) for n, a, b in find_names(text)] == [
        ("@bob_1", "@bob_1"),
        ("ann", "Ann"),
        ("paris", "Paris"),
    ]


def test_scripts():
    assert dominant_script("Привет, world!") == "CYRILLIC"
    assert dominant_script("今日はいい") == dominant_script("안녕") == "CJK"
    assert dominant_script("123 !?") is None
    assert not differs_in_language("123", "abc")
