"""Several scorers as one."""

import numpy as np
import pytest

from models import registry
from models.scorers.judging import check_judge
from schemas.errors import ModelError, TamisError

TEXTS = ["You are an idiot.", "The tram was late.", "What a silly goose you are", ""]


@pytest.fixture
def lists(tmp_path):
    """Two word lists that share no word."""
    names = []
    for name, word in (("a", "goose"), ("b", "tram")):
        path = tmp_path / f"{name}.txt"
        path.write_text(word + "\n")
        names.append(f"lexicon:{path}")
    return names


@pytest.mark.parametrize(("combine", "reduce"), [("max", np.max), ("mean", np.mean)])
def test_scores_are_the_members_combined(lists, combine, reduce):
    members = [registry.load("scorer", name) for name in lists]
    ensemble = registry.load("scorer", f"{combine}:{','.join(lists)}", threads=1)
    assert ensemble.labels == ("toxicity",)
    scores = ensemble.score(TEXTS)
    assert scores.shape == (len(TEXTS), 1) and scores.dtype == np.float32
    expected = reduce([m.score(TEXTS)[:, 0] for m in members], axis=0)
    np.testing.assert_allclose(scores[:, 0], expected, rtol=1e-6)
    assert scores[1] > 0 and scores[2] > 0 and scores[3] == 0
    assert ensemble.score([]).shape == (0, 1)


def test_what_makes_no_ensemble_is_refused(lists):
    for name, why in (
        (f"max:{lists[0]}", "two or more"),
        (f"max:{lists[0]},{lists[0]}", "two or more"),
        (f"mean:lexicon,max:{lists[0]}", "ensemble itself"),
        ("max:lexicon,nonsense", "no scorer 'nonsense'"),
    ):
        with pytest.raises(ModelError, match=why):
            registry.describe("scorer", name)
    with pytest.raises(ModelError, match="no option 'label'"):
        registry.describe("scorer", f"max:{','.join(lists)}", label="hate")


def test_its_revision_is_that_of_all_its_members(lists, tmp_path):
    before = registry.describe("scorer", f"max:{','.join(lists)}")
    (tmp_path / "b.txt").write_text("train\n")
    assert registry.describe("scorer", f"max:{','.join(lists)}").revision != before.revision


def test_a_member_is_no_independent_judge(lists):
    ranker = registry.describe("scorer", f"max:{','.join(lists)}")
    with pytest.raises(TamisError, match="is part of"):
        check_judge(registry.describe("scorer", lists[1]), [ranker])
    assert check_judge(registry.describe("scorer", "lexicon"), [ranker]).shared == ()
