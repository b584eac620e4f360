import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import registry
from models.scorers import ngram
from models.scorers.ngram import NgramSettings, count_ngrams, fit_ngram, load_ngram
from schemas.errors import ModelError, TamisError

RUDE = [
    "you idiot",
    "what an idiot you are",
    "stupid damn idiot",
    "damn you, stupid",
    "so stupid of you",
    "idiots!",
]
MILD = [
    "a lovely day",
    "we walk to the sea",
    "the sea is calm today",
    "lovely bread",
    "to the day",
    "calm and lovely",
]


@pytest.fixture(scope="module")
def scorer():
    texts = [f"{text} {i}" for i in range(4) for text in RUDE + MILD]
    return fit_ngram(texts, ([1.0] * 6 + [0.0] * 6) * 4, training_data="made-up")


def plain_ngrams(text: str) -> dict[str, int]:
    """What scikit-learn's `char_wb` analyzer cuts, by its definition."""
    found: dict[str, int] = {}
    for word in text.lower().split():
        padded = f" {word} "
        for order in ngram.ORDERS:
            for i in range(len(padded) - order + 1):
                piece = padded[i : i + order]
                found[piece] = found.get(piece, 0) + 1
    return found


@given(st.lists(st.text(max_size=40), max_size=6))
@settings(max_examples=60)
def test_ngrams_stay_inside_words_and_are_counted(texts):
    rows, buckets, counts = count_ngrams(texts)
    assert list(zip(rows, buckets, strict=True)) == sorted(
        set(zip(rows.tolist(), buckets.tolist(), strict=True))
    )
    for i, text in enumerate(texts):
        expected = plain_ngrams(text)
        assert counts[rows == i].sum() == sum(expected.values())
        assert (rows == i).sum() <= len(expected)  # equal but for a collision


def test_an_ngram_has_its_bucket_wherever_it_stands():
    alone = count_ngrams(["idiot"])[1].tolist()
    (rows, buckets, _) = count_ngrams(["nothing", "the IDIOT left", "", "idiot"])
    assert set(alone) <= set(buckets[rows == 1].tolist())
    assert buckets[rows == 3].tolist() == alone and not (rows == 2).any()


def test_it_tells_what_it_was_taught_apart(scorer):
    scores = scorer.score(["an idiot indeed", "lovely calm sea", "", "  \n", "zzqx"])
    assert scores.shape == (5, 1) and scores.dtype == np.float32
    assert scores[0] > 0.6 > 0.4 > scores[1]
    assert scores[2] == scores[3] == 0 and 0 < scores[4] < 1


def test_a_score_depends_on_no_neighbour_and_a_saved_model_gives_the_same(scorer, tmp_path, monkeypatch):
    texts = [f"{text} and {other}" for text in RUDE for other in MILD] + ["\ud800 half an emoji", "é ü 東京"]
    together = scorer.score(texts)
    assert np.array_equal(together[::-1], scorer.score(texts[::-1]))
    assert np.array_equal(together[:1], scorer.score(texts[:1]))
    monkeypatch.setattr(ngram, "_BATCH_CHARACTERS", 50)
    assert np.array_equal(together, scorer.score(texts))
    scorer.save(tmp_path / "judge")
    loaded = registry.load("scorer", f"ngram:{tmp_path / 'judge'}")
    assert np.array_equal(loaded.score(texts), together)
    assert loaded.info.training_data == "made-up" and loaded.info.revision == scorer.info.revision
    assert registry.describe("scorer", f"ngram:{tmp_path / 'judge'}", threads=2).kind == "scorer"


def test_fitting_is_what_scikit_learn_finds():
    sklearn = pytest.importorskip("sklearn")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    assert sklearn
    generator = np.random.default_rng(3)
    words = np.array(
        [
            "you",
            "idiot",
            "stupid",
            "damn",
            "lovely",
            "sea",
            "calm",
            "bread",
            "walk",
            "day",
            "people",
            "talk",
            "never",
            "always",
        ]
    )
    texts = [" ".join(generator.choice(words, 6)) for _ in range(120)]
    labels = [float("idiot" in t or ("stupid" in t and "lovely" not in t)) for t in texts]
    mine = fit_ngram(texts, labels, settings=NgramSettings(iterations=2000)).score(texts)[:, 0]
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=3, sublinear_tf=True)
    features = vectors.fit_transform(texts)
    model = LogisticRegression(C=8.0, max_iter=5000, tol=1e-8, class_weight="balanced").fit(features, labels)
    np.testing.assert_allclose(mine, model.predict_proba(features)[:, 1], atol=5e-3)


def test_weights_count_like_copies():
    texts, labels = RUDE + MILD, [1.0] * 6 + [0.0] * 6
    plain = NgramSettings(least_texts=1, balance=False)
    weighted = fit_ngram(texts, labels, [2.0] * 6 + [1.0] * 6, settings=plain)
    assert (
        weighted.score(["lovely idiot"])[0, 0]
        > fit_ngram(texts, labels, settings=plain).score(["lovely idiot"])[0, 0]
    )


@pytest.mark.parametrize(
    ("texts", "labels", "weights", "match"),
    [
        ([], [], None, "must be texts"),
        (["a b"], [1.0, 0.0], None, "give one for each"),
        (["a", "b"], [1.0, 2.0], None, r"\[0, 1\]"),
        (["a", "b"], [1.0, float("nan")], None, r"\[0, 1\]"),
        (["aa bb", "cc dd"], [1.0, 1.0], None, "missing"),
        (["aa", "bb"], [1.0, 0.0], None, "too few texts"),
    ],
)
def test_what_cannot_be_fitted_is_said(texts, labels, weights, match):
    with pytest.raises(TamisError, match=match):
        fit_ngram(texts, labels, weights)


def test_a_folder_that_is_none_or_broken_is_said_to_be(scorer, tmp_path):
    with pytest.raises(ModelError, match="tamis train ngram"):
        registry.describe("scorer", f"ngram:{tmp_path}")
    folder = tmp_path / "m"
    scorer.save(folder)
    record = json.loads((folder / ngram.RECORD).read_text())
    (folder / ngram.RECORD).write_text(json.dumps({**record, "format": 99}))
    with pytest.raises(ModelError, match="another version"):
        load_ngram(folder)
    (folder / ngram.WEIGHTS).write_bytes(b"\x10")
    with pytest.raises(ModelError, match="train it again"):
        load_ngram(folder)
    with pytest.raises(ModelError, match="no option 'label'"):
        registry.describe("scorer", f"ngram:{folder}", label="x")
