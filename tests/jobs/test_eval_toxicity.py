from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from models import registry
from models.protocols import ModelInfo
from pipelines.eval_toxicity import ToxicityEvalConfig, run
from pipelines.run import RunSettings
from schemas.errors import InputError, ModelError, TamisError
from tests.models.tiny_lm import save_tiny_lm

QUIET = RunSettings(progress="quiet")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny_lm(tmp_path_factory.mktemp("lm") / "tiny", chat=True)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [
        {
            "prompt": f"Number {i} of my neighbours is",
            "group": "street" if i % 3 else "house",
            "name": f"n{i}",
        }
        for i in range(10)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(tiny: Path, prompts: Path, out: Path, **changes) -> ToxicityEvalConfig:
    settings = {
        "models": (f"tiny={tiny}",),
        "prompts": str(prompts),
        "output": str(out),
        "judge": "lexicon",
        "reference": str(tiny),
        "samples": 4,
        "new_tokens": 5,
        "seeds": (0, 1),
        "draws": 100,
        **changes,
    }
    return ToxicityEvalConfig(**settings)


def test_an_evaluation_leaves_figures_samples_and_a_page(tiny, prompts, tmp_path):
    out = tmp_path / "out"
    result = run(config(tiny, prompts, out, group_column="group", id_column="name"), QUIET)
    entry = result.figures["tiny"]
    assert entry["all"]["prompts"] == 10 and set(entry["groups"]) == {"house", "street"}
    rows = pq.read_table(out / "continuations.parquet").to_pylist()
    assert len(rows) == 20 and {r["seed"] for r in rows} == {0, 1} and rows[0]["id"] == "n0"
    for row in rows:
        assert len(row["samples"]) == len(row["toxicity"]) == len(row["perplexity"]) == 4
        assert not any(s.startswith(row["prompt"]) for s in row["samples"])
        assert row["max_toxicity"] == max(row["toxicity"])
    emt = [np.mean([r["max_toxicity"] for r in rows if r["seed"] == s]) for s in (0, 1)]
    assert entry["all"]["emt"]["seeds"] == pytest.approx(emt)
    assert entry["all"]["emt"]["std"] == pytest.approx(np.std(emt))
    groups = [entry["groups"][g]["emt"]["mean"] for g in ("house", "street")]
    assert entry["combined"]["emt"]["mean"] == pytest.approx(np.mean(groups))
    assert entry["all"]["perplexity"]["mean"] > 1
    record = json.loads((out / "results.json").read_text())
    assert record["kind"] == "toxicity" and record["models"]["judge"]["name"] == "lexicon"
    page = (out / "report.html").read_text()
    assert "<svg" in page and "EMT" in page and "not independent" not in page
    assert (out / "_SUCCESS").exists() and (out / "README.md").exists()


def test_samples_are_plain_continuations_seeded_by_content(tiny, prompts, tmp_path):
    from models.protocols import GenerationRequest, Sampling
    from schemas.fingerprint import derive_seed

    out = tmp_path / "out"
    run(config(tiny, prompts, out, reference="none"), QUIET)
    row = pq.read_table(out / "continuations.parquet").to_pylist()[3]
    model = registry.load("lm", str(tiny), dtype="auto", device="auto", threads=1)
    sampling = Sampling((1.0,), 4, top_p=0.9, top_k=0, repetition_penalty=1.0, max_new_tokens=5)
    request = GenerationRequest(
        (), derive_seed(row["seed"], "continue", row["prompt"]), prefill=row["prompt"]
    )
    (generation,) = model.generate([request], sampling)
    assert [c.text for c in generation.candidates] == row["samples"]
    assert generation.prompt_tokens == len(row["prompt"].encode())  # one token a byte: no template, no turn


def test_models_stand_side_by_side_compared_with_the_first(tiny, prompts, tmp_path):
    other = save_tiny_lm(tmp_path / "other", seed=5)
    both = config(
        tiny, prompts, tmp_path / "out", models=(str(tiny), f"other={other}", str(tiny)), reference="none"
    )
    result = run(both, QUIET)
    assert list(result.figures) == ["tiny", "other", "tiny 2"]
    same = result.record["differences"]["tiny 2"]
    assert same["emt"]["difference"]["mean"] == 0 and same["emt"]["p_value"] == 1.0
    assert set(result.record["differences"]) == {"other", "tiny 2"}


def test_a_finished_evaluation_asks_nothing_again_and_more_seeds_ask_for_those_alone(
    tiny, prompts, tmp_path, monkeypatch
):
    from models.lm.local import LocalLanguageModel

    asked = []
    generate = LocalLanguageModel.generate

    def counted(self, requests, *args, **kwargs):
        asked.append(len(requests))
        return generate(self, requests, *args, **kwargs)

    monkeypatch.setattr(LocalLanguageModel, "generate", counted)
    out = tmp_path / "out"
    first = run(config(tiny, prompts, out), QUIET)
    assert sum(asked) == 20
    again = run(config(tiny, prompts, out), QUIET)
    assert sum(asked) == 20 and again.work["tiny"][1:] == (2, 2)
    assert again.record["results"] == first.record["results"]
    more = config(tiny, prompts, out, seeds=(0, 1, 2))
    with pytest.raises(TamisError, match="--overwrite"):
        run(more, QUIET)
    third = run(more, RunSettings(progress="quiet", overwrite=True))
    assert sum(asked) == 30
    assert third.figures["tiny"]["all"]["emt"]["seeds"][:2] == first.figures["tiny"]["all"]["emt"]["seeds"]


def test_a_dry_run_writes_nothing(tiny, prompts, tmp_path):
    result = run(config(tiny, prompts, tmp_path / "out"), RunSettings(dry_run=True))
    assert result.state == "planned" and not (tmp_path / "out").exists()


class NotANumber:
    info = ModelInfo("broken", "scorer", "r0")
    labels = ("toxicity",)

    def score(self, texts):
        return np.full((len(texts), 1), np.nan, np.float32)


def test_a_judge_that_gives_no_numbers_is_an_error(tiny, prompts, tmp_path, monkeypatch):
    load = registry.load
    monkeypatch.setattr(
        registry, "load", lambda kind, name, **o: NotANumber() if kind == "scorer" else load(kind, name, **o)
    )
    with pytest.raises(ModelError, match="not a number"):
        run(config(tiny, prompts, tmp_path / "out"), QUIET)


def test_a_prompts_file_with_other_columns_names_those_there_are(tiny, tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("question,answer\na,b\n")
    with pytest.raises(InputError, match="question, answer"):
        run(config(tiny, path, tmp_path / "out"), QUIET)
    with pytest.raises(InputError, match=r"no column 'text'.*question, answer"):
        run(config(tiny, path, tmp_path / "out", prompt_column="text"), QUIET)
    assert run(config(tiny, path, tmp_path / "out", prompt_column="question"), QUIET).figures


def test_empty_and_too_long_prompts_are_counted_and_named(tiny, tmp_path):
    path = tmp_path / "p.jsonl"
    texts = ["They said", "", None, "x" * 600, "And then"]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    result = run(config(tiny, path, tmp_path / "out", reference="none"), QUIET)
    assert result.record["prompts"]["empty"] == 2
    assert result.figures["tiny"]["all"]["prompts"] == 2 and result.figures["tiny"]["failed"] == 1
    assert "exceed the context" in result.figures["tiny"]["first_error"]
    assert "could not be continued" in (tmp_path / "out" / "report.html").read_text()


def test_a_folder_without_generation_config_or_end_token_is_sampled_all_the_same(prompts, tmp_path):
    folder = save_tiny_lm(tmp_path / "bare", eos=False, chat=False)
    (folder / "generation_config.json").unlink()
    result = run(config(folder, prompts, tmp_path / "out", models=(str(folder),), reference="none"), QUIET)
    assert result.figures["bare"]["all"]["prompts"] == 10


def test_the_ranker_does_not_judge_unless_told_so(tiny, prompts, tmp_path):
    shared = config(tiny, prompts, tmp_path / "out", rankers=("lexicon",), reference="none")
    with pytest.raises(TamisError, match="--allow-shared-judge"):
        run(shared, QUIET)
    run(shared.model_copy(update={"allow_shared_judge": True}), QUIET)
    assert "The judge is not independent" in (tmp_path / "out" / "report.html").read_text()
    assert "not independent" in (tmp_path / "out" / "README.md").read_text()
