"""Ranking, the ladder, and the record: edits reproduce the output and give the original back, whatever happened."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from detox_parts import BagEncoder, RuleRewriter, TagPrompt, WordLexicon, WordScorer, in_flight
from hypothesis import given, settings
from hypothesis import strategies as st

from models.scorers.fluency import load_fluency_scorer
from schemas import flight
from schemas.errors import ModelError
from transforms.detox.accept import accept_rewrites
from transforms.detox.gate import gate_toxicity
from transforms.detox.localize import LexiconLocalizer, OcclusionLocalizer, localize_toxic_spans
from transforms.detox.options import AcceptOptions, GateOptions, RewriteOptions, SamplingOptions
from transforms.detox.rewrite import rewrite_toxic_segments
from transforms.detox.segment import segment_text
from transforms.edits import apply_edits, revert_edits

SAMPLING = SamplingOptions(temperatures=(0.5, 1.0, 1.5), per_temperature=2)
RUNGS = ["candidate", "span_edit", "redact", "drop_segment", "drop_document", "flag"]


def detoxed(
    texts,
    *,
    model=None,
    options=AcceptOptions(),  # noqa: B008
    unit="sentence",
    scorer=None,
    encoder=None,
    gate=GateOptions(),  # noqa: B008
    localizers=None,
    seed=0,
    fluency=None,
):
    """The whole chain over texts; `model=False` leaves the rewriting out."""
    counts: Counter[str] = Counter()
    scorer = scorer or WordScorer()
    batch = segment_text(in_flight(texts), text_column="text")
    batch = gate_toxicity(batch, text_column="text", classifier=scorer, options=gate)
    localizers = [OcclusionLocalizer(scorer, residual=gate.tau)] if localizers is None else localizers
    batch = localize_toxic_spans(batch, text_column="text", localizers=localizers)
    if model is not False:
        batch = rewrite_toxic_segments(
            batch,
            text_column="text",
            model=model or RuleRewriter(),
            prompt=TagPrompt(),
            options=RewriteOptions(unit=unit, sampling=SAMPLING),
            seed=seed,
        )
    return accept_rewrites(
        batch,
        text_column="text",
        scorer=scorer,
        encoder=encoder or BagEncoder(),
        fluency=fluency,
        options=options,
        gate=gate,
        count=lambda name, n: counts.update({name: n}),
    ), counts


def texts_of(batch):
    return batch.column("text").to_pylist()


def edits_of(batch, row=0):
    return batch.column(flight.EDITS)[row].as_py() or []


def only(*rungs, **kwargs):
    return AcceptOptions(ladder=rungs, **kwargs)


class Alike(BagEncoder):
    """An encoder to which all texts are the same."""

    def encode(self, texts):
        return super().encode(["x"] * len(texts))


class Says(RuleRewriter):
    """A rewriter with fixed answers, in order."""

    def __init__(self, *answers):
        super().__init__()
        self.answers = answers

    def generate(self, requests, sampling, on_done=None):
        self.queue = iter([])
        return super().generate(requests, sampling, on_done)

    def _answer(self, text, rng):
        answer = next(self.queue, None)
        if answer is None:
            self.queue = iter(self.answers)
            answer = next(self.queue)
        return answer, "stop"


def test_the_best_candidate_that_passes_wins_and_is_recorded():
    text = "The weather was fine. They say Ann said this is a stupid rule! Good bye."
    batch, counts = detoxed(
        [text],
        model=Says(
            "They say Ann said this is a stupid rule!",  # a copy
            "I'm sorry, but I can't help with that.",
            "They say somebody said this is an unwise rule!",  # loses a name
            "Ann thinks this rule is unwise!",
            "They say Ann said this is an unwise rule!",
            "They say  Ann said this is an unwise rule!",  # the same again
        ),
    )
    assert texts_of(batch) == [text.replace("a stupid", "an unwise")]
    (edit,) = edits_of(batch)
    assert (edit["segment"], edit["action"], edit["start"], edit["end"]) == (1, "rewrite", 22, 62)
    assert edit["before"] == "They say Ann said this is a stupid rule!"
    assert edit["toxicity_before"] == pytest.approx(0.8) and edit["toxicity_after"] == 0
    assert edit["labels"] == ["toxicity", "insult"] and edit["scores_after"] == [0, 0]
    assert [s["source"] for s in edit["spans"]] == ["occlusion"]
    assert (edit["temperature"], edit["scorer"], edit["model"], edit["prompt"]) == (
        1.5,
        "words@r1",
        "rules@r1",
        "test@1",
    )
    assert edit["seed"] is not None and 0.7 < edit["similarity"] < 1
    candidates = edit["candidates"]
    assert len(candidates) == 5
    fusions = [c["fusion"] for c in candidates]
    assert fusions == sorted(fusions, reverse=True)
    reasons = {c["text"]: c["reasons"] for c in candidates}
    assert reasons["They say Ann said this is a stupid rule!"] == ["still_toxic", "not_less_toxic", "copy"]
    assert "refusal" in reasons["I'm sorry, but I can't help with that."]
    assert reasons["They say somebody said this is an unwise rule!"] == ["names"]
    assert counts["accept.rewrite"] == 1 and counts["reject.copy"] == 1 and counts["reject.names"] == 2
    after = flight.attribute(batch, "toxicity_after").to_pylist()
    assert after == [{"score": 0, "labels": [0, 0]}]


def test_unusable_candidates_are_refused_each_for_its_reason_and_counted():
    class Unclosed(Says):
        def _answer(self, text, rng):
            answer, finish = super()._answer(text, rng)
            return answer, "length" if answer == "You never finish" else finish

    source = "You idiot there, all of it."
    batch, counts = detoxed(
        [source],
        model=Unclosed(
            "You never finish",  # its tag is never closed
            "...",  # closed, and nothing in it
            "You there, all of it. " + "And more of it, on and on. " * 2,  # overlong
            source,
            "you  IDIOT there, all of it.",  # the source once more, in other spaces and case
            "You there, all of it.",
        ),
        options=only("candidate", min_similarity=0, length_slack=0),
    )
    (edit,) = edits_of(batch)
    reasons = {c["text"]: c["reasons"] for c in edit["candidates"]}
    assert len(reasons) == len(edit["candidates"]) == 5  # both copies are one candidate
    assert reasons["You never finish"] == ["unparsed"] and "empty" in reasons["..."]
    assert [r for text, r in reasons.items() if text.startswith("You there, all of it. And")] == [
        ["too_long"]
    ]
    assert "copy" in reasons[source] and edit["after"] == "You there, all of it."
    measured = [c for c in edit["candidates"] if c["reasons"] in (["unparsed"], ["empty"])]
    assert len(measured) == 2 and all(c["toxicity"] is c["similarity"] is None for c in measured)
    assert measured == edit["candidates"][-2:]  # what was not measured stands behind all that was
    for reason in ("unparsed", "empty", "too_long", "copy"):
        assert counts[f"reject.{reason}"] == 1


def test_candidates_that_say_the_same_are_one_the_first_of_them():
    batch, _ = detoxed(
        ["You idiot there"],
        model=Says("You one there", "YOU ONE  there", "You two there"),
        options=only("candidate", min_similarity=0),
    )
    (edit,) = edits_of(batch)
    assert [c["text"] for c in edit["candidates"]] == ["You one there", "You two there"]
    first = edit["candidates"][0]
    assert (first["temperature"], edit["temperature"]) == (0.5, 0.5)


def test_a_whole_answer_is_not_hidden_by_the_same_one_cut_off_before_it():
    class CutOff(Says):
        first = True

        def _answer(self, text, rng):
            answer, finish = super()._answer(text, rng)
            finish, self.first = ("length" if self.first else finish), False
            return answer, finish

    batch, _ = detoxed(
        ["You idiot there"],
        model=CutOff("You one there", "You one there", "You one there"),
        options=only("candidate", min_similarity=0),
    )
    (edit,) = edits_of(batch)
    assert [(c["text"], c["reasons"]) for c in edit["candidates"]] == [
        ("You one there", []),
        ("You one there", ["unparsed"]),
    ]
    assert texts_of(batch) == ["You one there"]


def test_equal_fusion_scores_are_settled_by_the_order_of_sampling():
    batch, _ = detoxed(
        ["You idiot there"],
        model=Says("You one there", "You two there", "You guy there"),
        options=only("candidate", min_similarity=0),
    )
    assert texts_of(batch) == ["You one there"]


def test_lambda_weighs_similarity_against_toxicity():
    text = "What a stupid plan this is"
    answers = Says("What a dumb plan this is", "An unwise plan this is")
    for lam, expected in [(0.0, "What a dumb plan this is"), (1.0, "An unwise plan this is")]:
        options = only("candidate", fusion_lambda=lam, max_toxicity=0.75, min_similarity=0)
        assert texts_of(detoxed([text], model=answers, options=options)[0]) == [expected]


def test_of_two_equally_near_candidates_the_whole_sentence_wins_where_fluency_counts():
    text, broken, whole = (
        f"I think that {x} is in the old house." for x in ("idiot", "the man the", "the man")
    )
    answers = Says(broken, whole)
    for scorer, weight, expected in [
        (load_fluency_scorer(), 0.3, whole),
        (load_fluency_scorer(), 0.0, broken),
        (None, 0.3, broken),
    ]:
        options = only("candidate", fluency_weight=weight, min_similarity=0)
        batch, _ = detoxed([text], model=answers, options=options, encoder=Alike(), fluency=scorer)
        assert texts_of(batch) == [expected]
        for c in edits_of(batch)[0]["candidates"]:
            assert (c["fluency"] is None) == (scorer is None)
            bonus = weight * c["fluency"] if scorer else 0.0
            assert c["fusion"] == pytest.approx(0.5 * c["similarity"] - 0.5 * c["toxicity"] + bonus)
    assert AcceptOptions(fluency_weight=0.3).needs_fluency and not AcceptOptions().needs_fluency
    assert not only("redact", "flag", fluency_weight=0.3).needs_fluency


@pytest.mark.parametrize(
    ("rung", "expected", "action"),
    [
        ("span_edit", "All is fine. Only a person would say so. Bye.", "span_edit"),
        ("redact", "All is fine. Only an [redacted] would say so. Bye.", "redact"),
        ("drop_segment", "All is fine. Bye.", "drop_segment"),
        ("flag", "All is fine. Only an idiot would say so. Bye.", "flag"),
    ],
)
def test_each_rung(rung, expected, action):
    text = "All is fine. Only an idiot would say so. Bye."
    batch, counts = detoxed([text], model=False, options=only("candidate", rung))
    assert texts_of(batch) == [expected]
    (edit,) = edits_of(batch)
    assert edit["action"] == action and counts[f"accept.{action}"] == 1
    assert apply_edits(text, [edit]) == expected and revert_edits(expected, [edit]) == text
    if action == "flag":
        assert edit["toxicity_after"] == pytest.approx(0.9) and edit["after"] == edit["before"]
    if action == "redact":
        assert edit["toxicity_after"] == 0 and edit["similarity"] is None


def test_a_document_is_dropped_only_where_nothing_would_remain():
    texts = ["You idiot! Moron!", "You idiot! But the rest stays.", "  "]
    batch, counts = detoxed(texts, model=False, options=only("drop_segment", "drop_document"))
    assert batch.column(flight.FATE).to_pylist() == [flight.DROPPED, flight.KEPT, flight.KEPT]
    assert batch.column(flight.REASON).to_pylist() == ["no_acceptable_rewrite", None, None]
    assert texts_of(batch) == [texts[0], "But the rest stays.", "  "]
    assert [e["action"] for e in edits_of(batch, 0)] == ["drop_document", "drop_document"]
    assert all(e["before"] == e["after"] for e in edits_of(batch, 0))
    assert flight.attribute(batch, "toxicity_after").to_pylist()[0] is None
    assert counts["accept.drop_document"] == 2
    # Without the last rung such a document is kept, and flagged.
    batch, _ = detoxed(texts[:1], model=False, options=only("drop_segment"))
    assert texts_of(batch) == texts[:1] and [e["action"] for e in edits_of(batch)] == ["flag", "flag"]


def test_nothing_is_cut_from_a_text_that_scores_as_harmless():
    scorer = WordScorer({"damn": 0.3, "darn": 0.1})
    gate = GateOptions(gate="none")
    batch, counts = detoxed(["A damn good thing"], model=False, scorer=scorer, gate=gate)
    assert texts_of(batch) == ["A damn good thing"] and counts["accept.flag"] == 1
    batch, _ = detoxed(["A damn good thing"], model=Says("A darn good thing"), scorer=scorer, gate=gate)
    assert texts_of(batch) == ["A darn good thing"]


def test_dropping_a_document_undoes_what_else_was_changed_in_it():
    text = "What a stupid rule. You idiot! Bye."
    batch, _ = detoxed([text], model=Says("What an unwise rule."), options=only("candidate", "drop_document"))
    assert batch.column(flight.FATE).to_pylist() == [flight.DROPPED]
    assert texts_of(batch) == [text]


def test_the_default_ladder_goes_as_far_as_it_must():
    # Nothing but the toxic word: no edit and no redaction leaves anything, so the segment goes.
    batch, _ = detoxed(["Good day. Idiot! Bye."], model=False)
    assert texts_of(batch) == ["Good day. Bye."]
    batch, _ = detoxed(["Idiot!"], model=False)
    assert batch.column(flight.FATE).to_pylist() == [flight.DROPPED]


def test_span_edits_take_over_what_a_candidate_changed_at_the_span():
    text = "Ann owes me 40 euros for that stupid trip."
    batch, _ = detoxed([text], model=Says("She owes me money for that unwise trip."))
    assert texts_of(batch) == ["Ann owes me 40 euros for that unwise trip."]
    (edit,) = edits_of(batch)
    assert edit["action"] == "span_edit" and edit["candidates"][0]["reasons"] == ["numbers"]


def test_no_replacement_holds_a_strong_listed_word():
    batch = segment_text(in_flight(["What a stupid rule, you see."]), text_column="text")
    batch = gate_toxicity(batch, text_column="text", classifier=WordScorer())
    batch = localize_toxic_spans(batch, text_column="text", localizers=[OcclusionLocalizer(WordScorer())])
    batch = rewrite_toxic_segments(
        batch,
        text_column="text",
        model=Says("What a daft rule, you see.", "What a poor rule, you see."),
        prompt=TagPrompt(),
    )
    common = {"text_column": "text", "scorer": WordScorer(), "encoder": BagEncoder()}
    assert texts_of(accept_rewrites(batch, **common)) == ["What a daft rule, you see."]
    listed = accept_rewrites(batch, lexicon=WordLexicon(["daft"]), **common)
    assert texts_of(listed) == ["What a poor rule, you see."]
    assert edits_of(listed)[0]["candidates"][0]["reasons"] == ["listed_word"]


def test_paragraphs_survive_the_loss_of_a_segment():
    cases = {
        "One. You idiot!\n\nTwo.": "One.\n\nTwo.",
        "One.\n\nYou idiot! Two.": "One.\n\nTwo.",
        "One. Two. You idiot!": "One. Two.",
        "One. You idiot!\n": "One.\n",
        "You idiot! One.": "One.",
        "One. You idiot! Moron!\n\nTwo. Damn!": "One.\n\nTwo.",
    }
    batch, _ = detoxed(list(cases), model=False, options=only("drop_segment"))
    assert texts_of(batch) == list(cases.values())


def test_a_change_that_is_toxic_after_all_goes_down_the_ladder():
    # As a whole the answer passes a scorer that dilutes; cut into sentences, one of them does not.
    class Diluting(WordScorer):
        def _one(self, text):
            toxicity, insult = super()._one(text)
            return (toxicity, insult) if len(text.split()) < 8 else (0.1 * toxicity, insult)

    scorer = Diluting()
    answer = "You are wrong here, my friend, and I say so. You moron there."
    text = "You stupid idiot."
    options = AcceptOptions(min_similarity=-1, max_length=10, length_slack=100, ladder=("candidate", "flag"))
    batch, counts = detoxed([text], model=Says(answer), scorer=scorer, options=options)
    assert texts_of(batch) == [text] and counts["accept.recheck_failed"] == 1
    batch, counts = detoxed(
        [text], model=Says(answer), scorer=scorer, options=options.model_copy(update={"recheck": False})
    )
    assert texts_of(batch) == [answer]


def test_unit_document():
    text = "Hello. You idiot! Bye."
    batch, _ = detoxed([text], unit="document", model=RuleRewriter(slips=False))
    assert texts_of(batch) == ["Hello. You person! Bye."]
    assert edits_of(batch)[0]["segment"] is None
    batch, _ = detoxed(
        [text], unit="document", model=Says("perhaps"), options=only("candidate", "drop_segment")
    )
    assert texts_of(batch) == ["Hello. Bye."]


def test_a_clean_batch_is_returned_as_it_is_and_asks_nothing():
    scorer, encoder, model = WordScorer(), BagEncoder(), RuleRewriter()
    texts = ["All is well.", None, "", "\r\n\x00 "]
    batch, _ = detoxed(texts, scorer=scorer, encoder=encoder, model=model)
    assert texts_of(batch) == texts and model.asked == [] and encoder.calls == []
    assert batch.column(flight.EDITS).null_count == 4
    assert [bool(a) for a in flight.attribute(batch, "toxicity_after").to_pylist()] == [
        True,
        False,
        True,
        True,
    ]


def test_each_rung_costs_one_call_for_the_whole_batch():
    scorer, encoder = WordScorer(), BagEncoder()
    texts = [f"You idiot number {i}. Fine. What a stupid rule." for i in range(12)]
    _batch, _ = detoxed(texts, scorer=scorer, encoder=encoder, options=only("candidate"))
    assert len(encoder.calls) == 1
    assert len(scorer.calls) <= 1 + 3 + 1 + 1  # gate, occlusion, candidates, recheck


def test_without_an_encoder_only_rungs_that_compare_nothing_work():
    batch = segment_text(in_flight(["You idiot, go."]), text_column="text")
    batch = gate_toxicity(batch, text_column="text", classifier=WordScorer())
    batch = localize_toxic_spans(
        batch, text_column="text", localizers=[LexiconLocalizer(WordLexicon(["idiot"]))]
    )
    common = {"text_column": "text", "scorer": WordScorer(), "encoder": None}
    assert texts_of(accept_rewrites(batch, options=only("redact"), **common)) == ["You [redacted], go."]
    with pytest.raises(ModelError, match="needs an encoder"):
        accept_rewrites(batch, options=only("span_edit"), **common)


def test_the_gates_threshold_is_the_acceptances():
    text = "You said a dumb thing today"
    batch, _ = detoxed(
        [text],
        model=Says("You said a damn thing today"),
        options=only("candidate"),
        gate=GateOptions(tau=0.65),
    )
    assert texts_of(batch) == ["You said a damn thing today"]
    batch, _ = detoxed([text], model=Says("You said a damn thing today"), options=only("candidate"))
    assert texts_of(batch) == [text]


SENTENCES = st.sampled_from(
    [
        "You idiot! ",
        "Idiots. ",
        "What a stupid, dumb plan, Ann.\n",
        "Damn, that cost 40 euros (moron)!\r\n\r\n",
        "All is well. ",
        "Fine\n\n",
        "  ",
        "😀 damn 😀. ",
        "stupid",
        "See www.a.org, you idiot. ",
        "Ein guter Tag. ",
        "\x00",
        "idiot idiot idiot\n",
        "e\u0301tat, damn it. ",
    ]
)
DOCUMENTS = st.lists(st.none() | st.lists(SENTENCES, max_size=6).map("".join), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(
    DOCUMENTS,
    st.permutations(RUNGS).flatmap(lambda p: st.integers(1, 6).map(lambda n: tuple(p[:n]))),
    st.sampled_from(["sentence", "document"]),
    st.integers(0, 3),
    st.sampled_from([GateOptions(), GateOptions(gate="none"), GateOptions(tau=0.85)]),
    st.booleans(),
)
def test_edits_reproduce_the_output_and_give_the_original_back(texts, ladder, unit, seed, gate, recheck):
    options = AcceptOptions(ladder=ladder, min_similarity=0.2, recheck=recheck)
    batch, _ = detoxed(texts, unit=unit, options=options, seed=seed, gate=gate)
    fates = batch.column(flight.FATE).to_pylist()
    rows = zip(texts, texts_of(batch), fates, flight.attribute(batch, "toxicity").to_pylist(), strict=True)
    for i, (text, final, fate, toxicity) in enumerate(rows):
        edits = edits_of(batch, i)
        if text is None:
            assert final is None and not edits
            continue
        assert apply_edits(text, edits) == final
        assert revert_edits(final, edits) == text
        random.Random(seed).shuffle(edits)
        assert apply_edits(text, edits) == final
        # What no edit covers is there, in order: outside edits the characters are identical.
        ordered = sorted(edits, key=lambda e: (e["start"], e["end"]))
        assert all(a["end"] <= b["start"] for a, b in itertools.pairwise(ordered))
        flagged = [s for s in toxicity["segments"] if s["flagged"]]
        for edit in edits:
            assert text[edit["start"] : edit["end"]] == edit["before"]
            if edit["segment"] is not None:
                assert toxicity["segments"][edit["segment"]]["flagged"]
        assert bool(edits) <= bool(flagged)
        assert fate in (flight.KEPT, flight.DROPPED)
        if fate == flight.DROPPED:
            assert final == text and "drop_document" in ladder


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.integers(0, 3))
def test_a_second_run_over_the_output_finds_nothing_more_to_do(texts, seed):
    batch, _ = detoxed(texts, seed=seed)
    kept = [
        t
        for t, f in zip(texts_of(batch), batch.column(flight.FATE).to_pylist(), strict=True)
        if f == flight.KEPT
    ]
    if kept:
        again, counts = detoxed(kept, seed=seed)
        assert texts_of(again) == kept and counts["accept.units"] == 0


@settings(max_examples=40, deadline=None)
@given(DOCUMENTS, st.integers(0, 3))
def test_rows_do_not_depend_on_the_rows_beside_them(texts, seed):
    together, _ = detoxed(texts, seed=seed)
    for i, text in enumerate(texts):
        alone, _ = detoxed([text], seed=seed)
        assert texts_of(alone)[0] == texts_of(together)[i]
        assert edits_of(alone) == edits_of(together, i)
