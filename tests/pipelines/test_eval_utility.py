"""`tamis eval utility`: a page that says what rewriting cost, and errors in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.eval_utility import UtilityEvalConfig, run
from schemas.errors import InputError, ModelError, OutputError
from tests.pipelines.sample_output import build_output

ROOT = Path(__file__).resolve().parents[2]
TEXT = str(ROOT / "examples" / "corpus.jsonl")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    sys.path.insert(0, str(ROOT / "tests" / "models"))
    from tiny_lm import save_tiny_lm

    folder = tmp_path_factory.mktemp("lms")
    return {name: str(save_tiny_lm(folder / name, seed=i)) for i, name in enumerate(("raw", "clean"))}


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return build_output(tmp_path_factory.mktemp("detoxed") / "out")


def config(tmp_path, **changes) -> UtilityEvalConfig:
    return UtilityEvalConfig(output=str(tmp_path / "eval"), progress="quiet", draws=200, **changes)


def test_perplexity_and_facts_in_one_folder(tmp_path, models, sample):
    settings = config(tmp_path, text=TEXT, models=models, documents=12, rewritten={"clean": str(sample.path)})
    result = run(settings)
    out = Path(settings.output)
    record = json.loads((out / "results.json").read_text())
    assert (out / "_SUCCESS").exists() and record["kind"] == "utility" and record["documents"] == 12
    assert set(record["perplexity"]) == {"raw", "clean"} and set(record["changes"]) == {"clean"}
    assert result.changes["clean"].by_token
    documents = pq.read_table(out / "documents.parquet")
    assert (
        documents.num_rows == 12
        and documents.column("raw.tokens").to_pylist() == documents.column("bytes").to_pylist()
    )  # the tiny tokenizer's tokens are bytes
    changed = [e for e in sample.edits if e["action"] != "flag"]
    table = result.facts["clean"]
    assert table.edits == len(changed) == pq.read_metadata(out / "edits.parquet").num_rows
    assert {r.action for r in table.rows} == {"all edits", *(e["action"] for e in changed)}
    page = (out / "report.html").read_text()
    assert (
        "Neutral text" in page
        and "Facts: clean" in page
        and "http" not in page.split("</style>")[1].split("xmlns")[0]
    )


def test_running_again_asks_no_model(tmp_path, models, monkeypatch):
    settings = config(tmp_path, text=TEXT, models=models, documents=5)
    first = run(settings)

    def refuse(*args, **kwargs):
        raise AssertionError("scored again")

    monkeypatch.setattr("models.lm.local.LocalLanguageModel.score_tokens", refuse)
    again = run(settings)
    assert again.perplexity == first.perplexity and again.changes == first.changes


def test_rungs_keep_what_they_should(sample, tmp_path):
    rows = {r.action: r for r in run(config(tmp_path, rewritten={"x": str(sample.path)})).facts["x"].rows}
    if "drop_segment" in rows:
        kept = [x.mean for x in rows["drop_segment"].kept.values() if x is not None]
        assert not any(kept)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({}, InputError, "nothing to measure"),
        ({"models": {"a": "x"}}, InputError, "pass --text"),
        ({"text": TEXT}, InputError, "pass --model"),
        ({"text": TEXT, "models": {"a": "no/such/folder"}}, ModelError, "no/such/folder"),
        ({"text": TEXT, "models": {"a": "x"}, "against": "b"}, InputError, "no such model"),
        ({"rewritten": {"a": str(ROOT / "examples")}}, OutputError, "not the output of a tamis job"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, changes, error, match):
    with pytest.raises(error, match=match) as caught:
        run(config(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_another_columns_name_is_said(tmp_path, models):
    with pytest.raises(InputError, match=r"no column 'body'.*text"):
        run(config(tmp_path, text=TEXT, text_column="body", models=models))


def test_a_folder_of_something_else_is_left_alone(tmp_path, models):
    out = tmp_path / "eval"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match=r"not empty \(mine.txt\)"):
        run(config(tmp_path, text=TEXT, models=models))
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
