"""The lexicon finds whole words and their disguises, at the right characters, and leaves other words alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from models.protocols import ModelInfo, ToxicityScorer
from models.scorers import lexicon
from models.scorers.lexicon import DEFAULT_LIST, DEFAULT_WEIGHT, LexiconScorer, describe, read_list
from schemas.errors import ModelError

INFO = ModelInfo(name="lexicon", kind="scorer", revision="0")


def scorer(**terms: float) -> LexiconScorer:
    return LexiconScorer({term.replace("_", " "): weight for term, weight in terms.items()}, INFO)


@pytest.fixture(scope="module")
def words() -> LexiconScorer:
    return scorer(
        idiot=0.7, stupid=0.6, moron=0.75, hell=0.2, ass=0.55, asshole=0.85, piece_of_junk=0.5, junk=0.3
    )


@pytest.fixture(scope="module")
def english() -> LexiconScorer:
    return LexiconScorer(read_list(DEFAULT_LIST), describe(None))


def found(part: LexiconScorer, text: str) -> list[tuple[str, str]]:
    return [(text[start:end], term) for start, end, term in part.find(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("You idiot.", [("idiot", "idiot")]),
        ("IDIOT, Moron!", [("IDIOT", "idiot"), ("Moron", "moron")]),
        ("idiot", [("idiot", "idiot")]),
        ("“idiot”—moron/stupid", [("idiot", "idiot"), ("moron", "moron"), ("stupid", "stupid")]),
        ("_idiot_ (moron)", [("idiot", "idiot"), ("moron", "moron")]),
        ("@idiot wrote", [("idiot", "idiot")]),
        ("Idiot\nmoron\ttoo", [("Idiot", "idiot"), ("moron", "moron")]),
        # the longest, and it alone
        ("a piece of junk", [("piece of junk", "piece of junk")]),
        ("junk", [("junk", "junk")]),
        ("asshole", [("asshole", "asshole")]),
        # digits, signs, look-alikes, full-width forms, invisible characters
        ("an 1d10t", [("1d10t", "idiot")]),
        ("m0r0n st!pid stup!d", [("m0r0n", "moron"), ("stup!d", "stupid")]),
        ("@sshole a$$", [("@sshole", "asshole"), ("a$$", "ass")]),
        ("idiоt", [("idiоt", "idiot")]),  # with a Cyrillic o
        ("ＩＤＩＯＴ", [("ＩＤＩＯＴ", "idiot")]),
        ("é idi\u200bot é", [("idi\u200bot", "idiot")]),
        # stretched, spaced out, starred
        ("stuuupid, idiooot!!!", [("stuuupid", "stupid"), ("idiooot", "idiot")]),
        ("asssshooole", [("asssshooole", "asshole")]),
        ("i d i o t", [("i d i o t", "idiot")]),
        ("you m-o-r-o-n you", [("m-o-r-o-n", "moron")]),
        ("what a s.t.u.p.i.d idea", [("s.t.u.p.i.d", "stupid")]),
        ("st*pid id*ot m***n", [("st*pid", "stupid"), ("id*ot", "idiot"), ("m***n", "moron")]),
        ("idi##", [("idi##", "idiot")]),
    ],
)
def test_words_and_their_disguises_are_found_where_they_stand(words, text, expected):
    assert found(words, text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "The class passed; assess the shell, hello, idiots' assassin",
        "Flight 455 leaves at 15:05, gate A55, $5 each",
        "me@ss.example",
        "hel lo",
        "a b c d e f",
        "f(a*b) **bold** footnote* 2*3 # heading",
        "aaaaargh yesss nooo",
        "piece of  junkyard",
        "ass2 2ass xass",
        "!!! ??? ... ***",
    ],
)
def test_other_words_numbers_and_signs_are_left_alone(words, text):
    assert found(words, text) == []
    assert words.score([text]).tolist() == [[0.0]]


def test_a_score_grows_with_each_different_term_and_lies_in_the_unit_interval(words):
    texts = ["fine", "idiot", "idiot moron", "1d10t idiot " * 500, "idiot moron stupid asshole hell"]
    one, two = 0.7, 1 - 0.3 * 0.25
    scores = words.score(texts)
    assert scores.shape == (5, 1) and scores.dtype == np.float32
    # A term that repeats counts once, in whatever disguise.
    np.testing.assert_allclose(scores[:4, 0], [0.0, one, two, one], rtol=1e-6)
    assert two < scores[4, 0] <= 1.0


def test_terms_do_not_reach_from_one_text_into_the_next(words):
    assert not words.score(["a piece of", "x"])[0, 0]
    assert words.score(["piece", "of", "junk"])[:, 0].tolist() == pytest.approx([0, 0, 0.3])


FRAGMENTS = [
    "idiot",
    "1d10t",
    "stuuupid",
    "m*ron",
    "the",
    "é",
    "“x”",
    "i d i o t",
    "\u200b",
    "\n",
    "A55",
    "🙂",
    "junk",
]


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from(FRAGMENTS), max_size=6).map(" ".join), max_size=12))
@example(["é", "idiot", "", "\u200b", "idiot é"])
def test_a_text_scores_the_same_in_any_company(words, texts):
    scores = words.score(texts)
    everywhere = words.find_all(texts)
    for text, score, matches in zip(texts, scores, everywhere, strict=True):
        np.testing.assert_array_equal(words.score([text])[0], score)
        assert words.find(text) == matches
        assert all(text[m.start] not in " \n" and text[m.end - 1] not in " \n" for m in matches)


@settings(deadline=None)
@given(st.text(alphabet=st.characters(), max_size=30), st.text(alphabet=st.characters(), max_size=30))
@example("\ud800 ", "\udfff")
@example("İ", "ß")
@example("\u200b" * 9, "\u00ad")
def test_a_word_between_blanks_is_found_in_any_text(words, before, after):
    text = f"{before} idiot {after}"
    place = len(before) + 1
    assert any(m.start <= place and m.end >= place + 5 for m in words.find(text))


def test_a_very_long_text_is_searched_whole(words, monkeypatch):
    monkeypatch.setattr(lexicon, "_PIECE_CHARACTERS", 1000)
    monkeypatch.setattr(lexicon, "_BATCH_CHARACTERS", 500)
    text = "".join(f"{'word ' * (i % 37)}idiot piece of junk, assess " for i in range(300))
    expected = [i for i in range(len(text)) if text.startswith(("idiot", "piece of junk"), i)]
    assert [m.start for m in words.find(text)] == expected
    unbroken = "x" * 2500 + " idiot"
    assert [m.start for m in words.find_all(["moron", unbroken])[1]] == [2501]


def test_order_is_kept_when_texts_beyond_ascii_stand_among_others(words):
    texts = ["idiot", "é moron", "none", "“stupid”", "ass"]
    np.testing.assert_allclose(words.score(texts)[:, 0], [0.7, 0.75, 0, 0.6, 0.55], rtol=1e-6)
    assert [[m.term for m in ms] for ms in words.find_all(texts)] == [
        ["idiot"],
        ["moron"],
        [],
        ["stupid"],
        ["ass"],
    ]


def test_scripts_without_blanks_match_inside_a_line():
    part = scorer(**{"笨蛋": 0.8, "дурак": 0.8})
    assert found(part, "你这个笨蛋！") == [("笨蛋", "笨蛋")]
    assert found(part, "Ты ДУРАК, дураки") == [("ДУРАК", "дурак")]


def test_a_term_may_hold_digits_and_signs_of_its_own():
    part = scorer(**{"4u2 fool": 0.8, "k-9": 0.5})
    assert found(part, "a 4U2 fool, K-9!") == [("4U2 fool", "4u2 fool"), ("K-9", "k-9")]


def test_a_starred_word_is_taken_for_the_heaviest_it_can_be():
    part = scorer(dolt=0.2, dope=0.9)
    assert [m.term for m in part.find("you d***")] == ["dope"]


def test_lists_are_read_with_and_without_weights(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\ufeff# mine\nidiot\n\n  moron \nfool\t0.25\n", "utf-8")
    assert read_list(path) == {"idiot": DEFAULT_WEIGHT, "moron": DEFAULT_WEIGHT, "fool": 0.25}
    info = describe(path)
    assert info.name == f"lexicon:{path}" and info.extra["terms"] == 3
    before = info.revision
    path.write_text("idiot\n")
    assert describe(path).revision != before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("fool\tstrong\n", "line 1: 'strong' is not a weight"),
        ("fool\t1.5\n", "'fool' is 1.5"),
        ("fool\t0\n", "'fool' is 0.0"),
        ("# nothing\n", "holds no usable term"),
        ("!!!\n...\n", "holds no usable term"),
    ],
)
def test_a_list_that_cannot_be_used_says_why(tmp_path, content, message):
    path = tmp_path / "words.txt"
    path.write_text(content)
    with pytest.raises(ModelError, match=message):
        LexiconScorer(read_list(path), describe(path))


def test_a_missing_or_binary_list_says_what_to_pass(tmp_path):
    with pytest.raises(ModelError, match=r"No such file.*pass lexicon:"):
        read_list(tmp_path / "none.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00idiot")
    with pytest.raises(ModelError, match="not UTF-8"):
        read_list(tmp_path / "binary.txt")


def test_the_shipped_list_flags_insults_and_not_their_neighbours(english):
    assert isinstance(english, ToxicityScorer) and len(english.terms) > 300
    rude = [
        "You are an idiot.",
        "what a moron",
        "shut up, stupid",
        "go to hell",
        "you scumbag",
        "what a damn fool",
    ]
    kind = [
        "The classic assessment of Scunthorpe's cockpit passed.",
        "Hello, Dickens wrote about a shell, a title and grass.",
        "The analyst's hourly glass document is therapeutic.",
        "She told me about a mass, a bass and a pass.",
    ]
    assert (english.score(rude)[:, 0] >= 0.5).all()
    assert not english.score(kind).any()
