"""The figures of `tamis eval toxicity`, from samples made by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from models.protocols import ModelInfo
from models.scorers.judging import Verdict
from pipelines.evaluation import toxicity_page as page
from pipelines.evaluation.toxicity_figures import (
    Measured,
    Protocol,
    Statistics,
    compare,
    flat_rows,
    summarise,
)

FAST = Protocol(statistics=Statistics(draws=100))


def made(toxicity, groups=None, losses=None, tokens=None) -> Measured:
    toxicity = np.asarray(toxicity, np.float64)
    n, seeds, samples = toxicity.shape
    return Measured(
        ids=[f"p{i}" for i in range(n)],
        groups=list(groups or [""] * n),
        prompts=[f"prompt {i}" for i in range(n)],
        samples=[[[f" word {i} {k} {j}" for j in range(samples)] for k in range(seeds)] for i in range(n)],
        toxicity=toxicity,
        losses=losses,
        tokens=tokens,
    )


def test_tp_and_emt_by_hand_over_seeds_and_groups():
    # Four prompts, two seeds, two samples.
    scores = [
        [[0.9, 0.1], [0.2, 0.3]],
        [[0.5, 0.5], [0.6, 0.0]],
        [[0.0, 0.1], [0.1, 0.0]],
        [[0.8, 0.7], [0.9, 0.1]],
    ]
    out = summarise(made(scores, groups=["a", "a", "b", "b"]), FAST)
    tp = out["all"]["tp"]
    assert tp["seeds"] == [0.5, 0.5] and tp["mean"] == 0.5 and tp["std"] == 0.0 and tp["n"] == 4
    emt = out["all"]["emt"]
    assert emt["seeds"] == pytest.approx([(0.9 + 0.5 + 0.1 + 0.8) / 4, (0.3 + 0.6 + 0.1 + 0.9) / 4])
    assert emt["std"] == pytest.approx(abs(emt["seeds"][0] - emt["seeds"][1]) / 2)  # population deviation
    assert out["all"]["toxic_samples"]["mean"] == pytest.approx(5 / 16)
    assert out["groups"]["b"]["tp"]["mean"] == 0.5 and out["groups"]["a"]["tp"]["mean"] == 0.5
    assert "perplexity" not in out["all"]


def test_combined_is_the_plain_mean_of_the_groups_named():
    scores = np.zeros((6, 1, 2))
    scores[:4, 0, 0] = 0.9  # four prompts of a, all toxic; one of b, one of c, neither
    own = made(scores, groups=["a"] * 4 + ["b", "c"])
    assert summarise(own, FAST)["combined"]["tp"]["mean"] == pytest.approx(1 / 3)
    assert summarise(own, FAST)["all"]["tp"]["mean"] == pytest.approx(4 / 6)
    two = summarise(own, dataclasses.replace(FAST, combine=("a", "b")))["combined"]
    assert two["tp"]["mean"] == pytest.approx(0.5) and two["groups"] == ["a", "b"] and two["prompts"] == 5
    assert "combined" not in summarise(made(scores), FAST)


def test_perplexities_over_the_cap_and_empty_samples_are_left_out_and_counted():
    losses = np.array([[[2.0, 40.0, 0.0]], [[np.log(3.0), 4.0, 2.0]]])
    tokens = np.array([[[2, 2, 0]], [[1, 4, 2]]])
    own = made(np.zeros((2, 1, 3)), losses=losses, tokens=tokens)
    found = summarise(own, FAST)["all"]["perplexity"]
    assert (found["samples"], found["left_out"], found["empty"]) == (4, 1, 1)
    assert found["mean"] == pytest.approx((np.e + 3 + np.e + np.e) / 4)
    assert found["by_token"]["mean"] == pytest.approx(np.exp(losses.sum() / tokens.sum()))
    nothing = made(np.zeros((2, 1, 3)), losses=np.zeros((2, 1, 3)), tokens=np.zeros((2, 1, 3), int))
    assert summarise(nothing, FAST)["all"]["perplexity"] is None


def test_models_are_compared_on_the_prompts_both_have():
    first = made(np.full((5, 2, 3), 0.8))
    quiet = made(np.full((5, 2, 3), 0.2)).keep(["p1", "p3", "p4"])
    found = compare(first, quiet, FAST)
    assert found["prompts"] == 3
    assert found["tp"]["difference"]["mean"] == -1.0 and found["tp"]["cut"]["mean"] == 1.0
    assert found["emt"]["difference"]["mean"] == pytest.approx(-0.6)
    assert found["emt"]["cut"]["mean"] == pytest.approx(0.75)
    assert compare(quiet, quiet, FAST)["tp"]["cut"] is None  # there is nothing to cut
    assert compare(first.keep([]), quiet, FAST) == {"prompts": 0}


def test_fluency_is_compared_as_a_ratio():
    tokens = np.full((4, 1, 2), 10)
    low = made(np.zeros((4, 1, 2)), losses=np.full((4, 1, 2), 10.0), tokens=tokens)
    high = made(np.zeros((4, 1, 2)), losses=np.full((4, 1, 2), 10.0 + 10 * np.log(2)), tokens=tokens)
    assert compare(low, high, FAST)["perplexity"]["ratio"]["mean"] == pytest.approx(2.0)
    assert compare(made(np.zeros((4, 1, 2))), high, FAST)["perplexity"] is None


@given(arrays.arrays(np.float64, (5, 2, 3), elements=st.floats(0, 1)))
@settings(max_examples=15)
def test_every_figure_lies_in_its_interval_and_its_range(scores):
    out = summarise(made(scores, groups=list("aabbc")), FAST)
    for entry in (out["all"], out["combined"], *out["groups"].values()):
        for name in ("tp", "emt", "mean_toxicity", "toxic_samples", "dist1"):
            figure = entry[name]
            assert (
                0 <= figure["low"] <= figure["mean"] + 1e-12
                and figure["mean"] <= figure["high"] + 1e-12 <= 1 + 1e-9
            )
            assert figure["mean"] == pytest.approx(np.mean(figure["seeds"]))
        assert entry["mean_toxicity"]["mean"] <= entry["emt"]["mean"] + 1e-12


def test_the_page_shows_all_models_and_what_must_be_said():
    losses, tokens = np.full((4, 2, 3), 5.0), np.full((4, 2, 3), 4)
    found = {
        "raw <b>": made(np.full((4, 2, 3), 0.7), groups="aabb", losses=losses, tokens=tokens),
        "clean": made(np.full((4, 2, 3), 0.1), groups="aabb", losses=losses, tokens=tokens),
    }
    results = {
        k: {**summarise(v, FAST), "rankers": [], "failed": 0, "first_error": None} for k, v in found.items()
    }
    results["clean"] |= {"failed": 2, "first_error": "prompt of 600 tokens"}
    verdict = Verdict("j@1", ("j@1",), ("j ranked the training data",))
    record = {
        "config": {
            "samples": 3, "new_tokens": 20, "seeds": [0, 1], "temperature": 1.0, "top_p": 0.9, "top_k": 0,
            "max_perplexity": 1e4,
        },
        "device": "CPU",
        "prompts": {"used": 4},
        "models": {
            role: dataclasses.asdict(ModelInfo(role[0], kind, "1"))
            for role, kind in (("judge", "scorer"), ("reference", "lm"))
        },
        "judge": verdict.as_dict(),
        "results": results,
        "differences": {"clean": {"against": "raw <b>", **compare(found["raw <b>"], found["clean"], FAST)}},
    }  # fmt: skip
    html = page.render(record, found, FAST, verdict)
    assert "raw &lt;b&gt;" in html and "raw <b>" not in html.replace("raw &lt;b&gt;", "")
    assert (
        html.count("<svg") >= 6
        and "judge is not independent" in html
        and "2 prompts could not be continued" in html
    )
    assert "TP, combined" in html and "86%" in html  # EMT cut from 0.7 to 0.1
    card = page.card(record, verdict)
    assert "| clean |" in card and "not independent" in card
    said = list(page.lines(record))
    assert len(said) == 4 and "raw <b>: TP 1.000" in said[0] and "clean against raw <b>: TP -1.000" in said[2]


def test_rows_hold_what_was_said_and_scored():
    own = made(np.full((2, 2, 3), 0.7))
    rows = list(flat_rows("m", own, FAST, (7, 9)))
    assert [(r["id"], r["seed"]) for r in rows] == [("p0", 7), ("p0", 9), ("p1", 7), ("p1", 9)]
    assert rows[3]["samples"] == own.samples[1][1] and rows[3]["any_toxic"] and rows[0]["perplexity"] is None
