"""Contrastive decoding in the report: where it steered, and what the other modes would have chosen."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipelines.report import build_report
from pipelines.report.steering import steering_chart, steering_context
from tests.pipelines.sample_output import build_output

TRACE = {
    "before": "You are an idiot.",
    "after": "You are <b>wrong</b>.",
    "temperature": 0.8,
    "tokens": ["You", " are", " ", "wrong", "\n", "."],
    "alpha": [0.01, 0.1, 0.0, 0.4, 0.05, 0.01],
    "k": [10, 4_915, 10, 19_660, 2_457, 491],
    "edited": [10, 4_000, 0, 15_000, 2_000, 400],
    "vocabulary": 49_152,
}


def choice(text: str, *, accepted: bool = True) -> dict[str, Any]:
    reasons = [] if accepted else ["similarity"]
    return {
        "text": text, "toxicity": 0.12, "similarity": 0.71, "temperature": 1.0, "accepted": accepted,
        "reasons": reasons, "passed": 3 * accepted, "distinct": 7,
    }  # fmt: skip


MODES = [
    {
        "text": "Such a <i>stupid</i> plan.",
        "toxicity": 0.93,
        "modes": {
            "prompt_only": choice("A plain plan."),
            "vanilla_cd": None,
            "official": choice("Another plan entirely.", accepted=False),
            "logratio": choice("An unwise plan."),
        },
    }
]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A finished output whose run has measured both views."""
    build_output(tmp_path / "out", rows=8)
    run = json.loads((tmp_path / "out/manifest.json").read_text())["run_id"]
    put_views(tmp_path / "out", run=run, traces=[TRACE], modes=MODES)
    return tmp_path / "out"


def put_views(out: Path, **views: Any) -> None:
    (out / "_tamis").mkdir(exist_ok=True)
    (out / "_tamis/views.json").write_text(json.dumps(views))


def section_of(html: str) -> str:
    found = re.search(r'<section id="steering">.*?</section>', html, re.S)
    return found[0] if found else ""


def test_the_report_shows_where_it_steered(out: Path) -> None:
    html = section_of(build_report(str(out)))
    assert "alpha (bars)" in html and "k (line, log scale)" in html
    assert "mean alpha <b>0.10</b>" in html and "largest <b>0.40</b>" in html
    assert "&lt;b&gt;wrong" in html and "<b>wrong</b>" not in html
    assert "temperature <b>0.8</b>" in html


def test_the_report_shows_what_each_mode_would_have_chosen(out: Path) -> None:
    html = section_of(build_report(str(out)))
    for name in ("prompt only", "classic contrastive", "SoCD, official", "SoCD, log-ratio"):
        assert f"<th>{name}</th>" in html
    assert "&lt;i&gt;stupid" in html and "<del>Another plan entirely.</del>" in html
    assert "3 of 7 passed" in html and '<span class="reasons">similarity</span>' in html
    assert [n.split("<")[0] for n in html.split("<td><b>")[2:]] == ["1 of 1", "0 of 1", "0 of 1", "1 of 1"]
    assert html.count("veil") >= 4  # texts may offend


def test_views_of_another_run_are_not_shown_and_none_are_missed(out: Path) -> None:
    put_views(out, run="an-earlier-one", traces=[TRACE], modes=MODES)
    assert 'id="steering"' not in build_report(str(out)) and "#steering" not in build_report(str(out))
    (out / "_tamis/views.json").unlink()
    assert 'id="steering"' not in build_report(str(out))


def test_nothing_measured_is_no_section() -> None:
    assert steering_context(None) is None
    assert steering_context({"run": "r", "traces": [], "modes": []}) is None


def test_equal_tokens_are_different_bars_and_a_long_candidate_is_cut_and_says_so() -> None:
    svg = steering_chart(["a", "a", "a"], [0.1, 0.2, 0.3], [10, 10, 10])
    assert len(re.findall(r">a</text>", svg)) == 3
    long = {name: value * 30 if isinstance(value, list) else value for name, value in TRACE.items()}
    context = steering_context({"traces": [long], "modes": []})
    assert context is not None and context["traces"][0]["more"] == 120
    assert context["traces"][0]["strongest"] == ["wrong"] * 3
