"""`tamis diff`: the edits asked for, whole, with their marks."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipelines.diff import iter_edits, show_diff
from pipelines.report.output import Output
from schemas.errors import InputError, OutputError
from tests.pipelines.sample_output import Sample, build_output


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Sample:
    return build_output(tmp_path_factory.mktemp("diff") / "out")


def _plain() -> Console:
    return Console(file=io.StringIO(), width=200, color_system=None)


def _text(console: Console) -> str:
    return console.file.getvalue()


def test_each_edit_shows_its_action_scores_spans_and_words(sample):
    console = _plain()
    edit = next(
        e for e in sample.edits if e["action"] == "rewrite" and e["before"].startswith("Only an idiot")
    )
    assert show_diff(str(sample.path), row_id=edit["id"], console=console) == 1
    text = _text(console)
    assert f"{edit['id']}  rewrite" in text
    assert f"toxicity {edit['toxicity_before']:.2f} → {edit['toxicity_after']:.2f}" in text
    assert f"similarity {edit['similarity']:.2f}" in text
    assert f"toxic: “idiot” {edit['spans'][0]['score']:.2f}" in text
    assert "[-Only an idiot would-]{+I would not+} sit in row 9." in text


def test_with_colours_nothing_is_bracketed(sample):
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="standard")
    show_diff(str(sample.path), where="action = 'rewrite'", limit=1, console=console)
    text = _text(console)
    assert "[-" not in text and "{+" not in text
    assert "\x1b[9;31m" in text or "\x1b[31;9m" in text  # struck out, in red
    assert "\x1b[32m" in text


def test_markup_in_texts_is_not_obeyed(sample):
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="standard")
    edit = {**sample.edits[0], "before": "[bold]x[/bold] y", "after": "[bold]x[/bold] z", "action": "rewrite"}
    from pipelines.diff import render_edit

    console.print(render_edit(edit, plain=True))
    assert "[bold]x[/bold] [-y-]{+z+}" in _text(console)


def test_the_limit_is_kept_and_said(sample):
    console = _plain()
    assert show_diff(str(sample.path), limit=3, console=console) == 3
    assert f"3 edits shown of {len(sample.edits)}" in _text(console)
    everything = _plain()
    assert show_diff(str(sample.path), limit=10_000, console=everything) == len(sample.edits)
    assert "edits shown" not in _text(everything)


def test_a_condition_picks_edits(sample):
    output = Output(str(sample.path))
    found = list(iter_edits(output, where="toxicity_after < 0.05 AND action <> 'flag'"))
    wanted = [
        e["id"]
        for e in sample.edits
        if e["toxicity_after"] is not None and e["toxicity_after"] < 0.05 and e["action"] != "flag"
    ]
    assert [e["id"] for e in found] == wanted
    assert list(iter_edits(output)) and [e["id"] for e in iter_edits(output)] == [
        e["id"] for e in sample.edits
    ]


def test_what_is_not_there_is_said(sample, tmp_path):
    with pytest.raises(InputError, match="no edit of a row with id 'nobody'"):
        show_diff(str(sample.path), row_id="nobody", console=_plain())
    with pytest.raises(InputError, match=r'no column "colour"; columns: shard, row'):
        show_diff(str(sample.path), where="colour = 'red'", console=_plain())
    with pytest.raises(OutputError, match="no such folder"):
        show_diff(str(tmp_path / "nowhere"), console=_plain())
    console = _plain()
    assert show_diff(str(sample.path), where="similarity > 2", console=console) == 0
    assert "no edit fulfils the condition" in _text(console)
    scored = build_output(tmp_path / "scored", rows=6, edits=False)
    console = _plain()
    assert show_diff(str(scored.path), console=console) == 0
    assert "made no edits" in _text(console)


def test_an_edit_that_changed_nothing_shows_its_text(sample):
    console = _plain()
    show_diff(str(sample.path), where="action = 'flag'", limit=1, console=console)
    text = _text(console)
    assert "flag" in text and "→" not in text and "[-" not in text
