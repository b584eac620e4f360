"""Requests are addressed by content, fit the model or are split, and failed ones kill their row only."""

from __future__ import annotations

from collections import Counter

import pytest
from detox_parts import RuleRewriter, TagPrompt, WordScorer, in_flight

from schemas import flight
from transforms.detox.gate import gate_toxicity
from transforms.detox.localize import OcclusionLocalizer, localize_toxic_spans
from transforms.detox.options import RewriteOptions, SamplingOptions, SegmentOptions
from transforms.detox.rewrite import core, rewrite_toxic_segments
from transforms.detox.segment import segment_text
from transforms.shards.cache import RequestCache

FEW = SamplingOptions(temperatures=(0.5, 1.0), per_temperature=2)
OPTIONS = RewriteOptions(sampling=FEW)


def flagged(texts, segmenting=SegmentOptions(), spans=False):  # noqa: B008
    batch = segment_text(in_flight(texts), text_column="text", options=segmenting)
    batch = gate_toxicity(batch, text_column="text", classifier=WordScorer())
    if spans:
        batch = localize_toxic_spans(batch, text_column="text", localizers=[OcclusionLocalizer(WordScorer())])
    return batch


def rewritten(batch, model, options=OPTIONS, **kwargs):
    counts: Counter[str] = Counter()
    batch = rewrite_toxic_segments(
        batch,
        text_column="text",
        model=model,
        prompt=TagPrompt(),
        options=options,
        count=lambda name, n: counts.update({name: n}),
        **kwargs,
    )
    return flight.scratch(batch, "candidates").to_pylist(), counts, batch


def test_only_flagged_segments_are_asked_for_without_their_whitespace():
    model = RuleRewriter(slips=False)
    rows, counts, _ = rewritten(flagged(["Fine. \n You idiot!\n\nGood.", None, "", "All good."]), model)
    assert model.asked == ["You idiot!"]
    assert [len(r) for r in rows] == [4, 0, 0, 0]
    assert {(c["segment"], c["start"], c["end"], c["text"], c["parsed"]) for c in rows[0]} == {
        (1, 8, 18, "You person!", True)
    }
    assert [(c["temperature"], c["index"]) for c in rows[0]] == [(0.5, 0), (0.5, 1), (1.0, 0), (1.0, 1)]
    assert counts["rewrite.requests"] == 1 and counts["rewrite.candidates"] == 4


def test_candidates_depend_on_content_alone(tmp_path):
    texts = [
        "One idiot here. Two idiots there.",
        "You stupid thing.",
        "One idiot here. ",
        "Damn, a stupid idiot.",
    ]
    together, _, _ = rewritten(flagged(texts), RuleRewriter(), seed=7)
    alone = [rewritten(flagged([t]), RuleRewriter(), seed=7)[0][0] for t in texts]
    assert together == alone
    first = [c for c in together[0] if c["segment"] == 0]
    assert [c["seed"] for c in first] == [c["seed"] for c in together[2]]
    other, _, _ = rewritten(flagged(texts), RuleRewriter(), seed=8)
    assert [c["seed"] for c in other[0]] != [c["seed"] for c in together[0]]
    # The cache finds them again under another sharding.
    cache, model = RequestCache(str(tmp_path)), RuleRewriter()
    rewritten(flagged(texts[:2]), model, seed=7, cache=cache)
    paid = len(model.asked)
    rows, counts, _ = rewritten(flagged(texts), model, seed=7, cache=cache)
    assert rows == together
    assert model.asked[paid:] == ["Damn, a stupid idiot."] and counts["rewrite.cache_hits"] == 3


def test_context_is_given_in_whole_words_and_changes_the_seed():
    seen = []

    class Spy(TagPrompt):
        def render(self, **variables):
            seen.append(variables["before"])
            return super().render(**variables)

    batch = flagged(["The weather was fine. You idiot!"])
    for room in (0, 9, 1000):
        rewrite_toxic_segments(
            batch,
            text_column="text",
            model=RuleRewriter(),
            prompt=Spy(),
            options=RewriteOptions(sampling=FEW, context_chars=room),
        )
    assert set(seen) == {"", "fine.", "The weather was fine."}


def test_a_failed_request_kills_its_row_only():
    rows, counts, batch = rewritten(
        flagged(["You idiot.", "You moron. You idiot."]), RuleRewriter(fail="moron")
    )
    assert batch.column(flight.FATE).to_pylist() == [flight.KEPT, flight.DEAD]
    assert batch.column(flight.ERROR).to_pylist() == [None, "rules: the server said no"]
    assert batch.column(flight.STAGE).to_pylist() == [None, "RewriteToxicSegments"]
    assert len(rows[0]) == 4 and counts["rewrite.errors"] == 1


def test_unclosed_and_missing_answers_are_kept_as_unparsed_and_counted():
    texts = [f"You idiot number {i}, what a stupid rule." for i in range(30)]
    rows, counts, _ = rewritten(flagged(texts), RuleRewriter())
    unparsed = [c for r in rows for c in r if not c["parsed"]]
    assert unparsed and all(c["finish"] == "length" for c in unparsed)
    assert counts["rewrite.unclosed"] == len(unparsed)


def test_the_room_for_an_answer_follows_the_source():
    budgets = []

    class Spy(RuleRewriter):
        def generate(self, requests, sampling, on_done=None):
            budgets.append((len(requests), sampling.max_new_tokens))
            return super().generate(requests, sampling, on_done)

    rewritten(flagged(["You idiot.", "You moron.", "you stupid " + "thing and " * 40]), Spy())
    assert budgets == [(2, 32), (1, 256)]


def test_what_does_not_fit_is_split_at_clauses_and_put_together_again():
    text = (
        "Well, " + "one two three four five six, " * 20 + "you idiot, " + "seven eight nine, " * 20 + "bye."
    )
    model = RuleRewriter(context_limit=400, slips=False)
    options = RewriteOptions(sampling=SamplingOptions(temperatures=(1.0,), per_temperature=1))
    batch = flagged([text], SegmentOptions(max_chars=5000), spans=True)
    rows, counts, _ = rewritten(batch, model, options)
    assert [c["text"] for c in rows[0]] == [text.replace("idiot", "person")]
    assert (rows[0][0]["start"], rows[0][0]["end"]) == (0, len(text))
    assert all(len(asked) < len(text) for asked in model.asked)
    assert len(model.asked) == 1 and "idiot" in model.asked[0]  # only the piece with the span
    assert counts["rewrite.overlong"] == 0


def test_what_never_fits_is_counted_and_never_cut():
    model = RuleRewriter(context_limit=10)
    rows, counts, batch = rewritten(flagged(["You idiot."]), model)
    assert model.asked == [] and rows == [[]] and counts["rewrite.overlong"] == 1
    assert batch.column(flight.FATE).to_pylist() == [flight.KEPT]


def test_unit_document_asks_for_the_whole_text_or_by_segment_where_it_does_not_fit():
    text = "Hello there. You idiot! Good bye."
    options = RewriteOptions(unit="document", sampling=FEW)
    model = RuleRewriter(slips=False)
    rows, _, _ = rewritten(flagged([" " + text + "\n"]), model, options)
    assert model.asked == [text]
    assert (rows[0][0]["segment"], rows[0][0]["start"], rows[0][0]["end"]) == (None, 1, 1 + len(text))
    long = "Hello there. " * 100 + "You idiot!"
    model = RuleRewriter(context_limit=300, slips=False)
    rows, _, _ = rewritten(flagged([long]), model, options)
    assert model.asked == ["You idiot!"] and rows[0][0]["segment"] == 100


def test_an_empty_batch_gets_its_columns():
    rows, _, batch = rewritten(flagged([]), RuleRewriter())
    assert rows == [] and "_tamis.tmp.rewriter" in batch.schema.names


@pytest.mark.parametrize(("text", "expected"), [("  ab \n", (2, 4)), (" \n ", (0, 0)), ("x", (0, 1))])
def test_core_leaves_whitespace_out(text, expected):
    assert core(text, 0, len(text)) == expected
