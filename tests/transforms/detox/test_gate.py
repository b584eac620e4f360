"""The cascade asks the classifier only where a cheap stage says so, and keeps what it measured."""

from __future__ import annotations

import numpy as np
import pytest
from detox_parts import WordLexicon, WordScorer, in_flight

from schemas import flight
from schemas.errors import ModelError
from transforms.detox.gate import TOXICITY_TYPE, gate_toxicity, judge
from transforms.detox.options import GateOptions
from transforms.detox.segment import segment_text
from transforms.shards.cache import RequestCache

TEXTS = ["Hello there. What a stupid rule!", None, "", "All is well.", "You idiot. You stupid moron."]


def gated(texts=TEXTS, **kwargs):
    kwargs.setdefault("classifier", WordScorer())
    return gate_toxicity(segment_text(in_flight(texts), text_column="text"), text_column="text", **kwargs)


def toxicity(batch):
    return flight.attribute(batch, "toxicity").to_pylist()


def test_only_what_a_cheap_stage_lets_pass_reaches_the_classifier():
    classifier, lexicon = WordScorer(), WordLexicon(["idiot", "well"])
    rows = toxicity(gated(classifier=classifier, lexicon=lexicon))
    assert classifier.calls == [["All is well.", "You idiot. "]]
    assert lexicon.calls == [
        ["Hello there. ", "What a stupid rule!", "All is well.", "You idiot. ", "You stupid moron."]
    ]
    assert [s["score"] for s in rows[0]["segments"]] == [None, None]
    assert [s["lexicon"] for s in rows[3]["segments"]] == [1.0]
    assert rows[3]["segments"][0]["labels"] == [0.0, 0.0]
    assert [s["flagged"] for s in rows[4]["segments"]] == [True, False]
    assert rows[4]["flagged"] and rows[4]["score"] == pytest.approx(0.9)
    assert not rows[0]["flagged"] and rows[0]["score"] == 0


def test_either_cheap_stage_is_enough_and_their_scores_are_kept():
    linear = WordScorer({"stupid": 0.3}, "linear")
    rows = toxicity(
        gated(lexicon=WordLexicon(["idiot"]), linear=linear, options=GateOptions(linear_pass=0.25))
    )
    first, second = rows[4]["segments"]
    assert first["lexicon"] == 1 and first["linear"] == 0 and first["flagged"]
    assert second["lexicon"] == 0 and second["linear"] == pytest.approx(0.3) and second["flagged"]


def test_null_and_empty_texts():
    rows = toxicity(gated())
    assert rows[1] is None
    assert rows[2] == {"score": 0.0, "flagged": False, "segments": []}
    batch = gated([])
    assert flight.attribute(batch, "toxicity").type == TOXICITY_TYPE


def test_gate_all_asks_for_everything_and_none_flags_everything():
    classifier = WordScorer()
    rows = toxicity(
        gated(classifier=classifier, lexicon=WordLexicon(["idiot"]), options=GateOptions(gate="all"))
    )
    assert len(classifier.calls[0]) == 5
    assert [s["flagged"] for r in rows if r for s in r["segments"]] == [False, True, False, True, True]
    rows = toxicity(gated(options=GateOptions(gate="none")))
    assert all(s["flagged"] and s["score"] is not None for r in rows if r for s in r["segments"])


def test_the_threshold_is_inclusive_and_a_new_one_needs_no_new_inference(tmp_path):
    assert judge(["dumb"], classifier=WordScorer({"dumb": 0.5})).flagged.tolist() == [True]
    cache, classifier = RequestCache(str(tmp_path)), WordScorer()
    gated(classifier=classifier, cache=cache)
    calls = len(classifier.calls)
    rows = toxicity(gated(classifier=classifier, cache=cache, options=GateOptions(tau=0.95)))
    assert len(classifier.calls) == calls
    assert [s["flagged"] for s in rows[4]["segments"]] == [False, True]


def test_the_score_is_the_maximum_over_the_labels_asked_for():
    texts = ["a stupid rule"]
    assert judge(texts, classifier=WordScorer()).score[0] == pytest.approx(0.8)
    assert judge(texts, classifier=WordScorer(), options=GateOptions(labels=("insult",))).score[0] == 0
    both = judge(texts, classifier=WordScorer(), options=GateOptions(labels=("insult", "toxicity")))
    assert both.score[0] == pytest.approx(0.8) and both.labels.shape == (1, 2)
    with pytest.raises(ModelError, match="no label 'rudeness'; it has: toxicity, insult"):
        judge(texts, classifier=WordScorer(), options=GateOptions(labels=("rudeness",)))


def test_sliced_batches_are_gated_like_whole_ones():
    whole = segment_text(in_flight(TEXTS), text_column="text")
    part = gate_toxicity(whole.slice(2, 3), text_column="text", classifier=WordScorer())
    assert toxicity(part) == toxicity(gated())[2:]


def test_equal_segments_are_scored_once():
    classifier = WordScorer()
    verdicts = judge(["You idiot.", "Fine.", "You idiot."], classifier=classifier)
    assert classifier.calls == [["You idiot.", "Fine."]]
    assert np.array_equal(verdicts.flagged, [True, False, True])
