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
from schemas.errors import InputError, ModelError, OutputError, TamisError
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


def test_an_evaluation_that_is_refused_leaves_the_finished_one_whole(tiny, prompts, tmp_path):
    out = tmp_path / "out"
    given = config(tiny, prompts, out, reference="none")
    run(given, QUIET)

    def state() -> dict[str, bytes]:
        return {
            str(p.relative_to(out)): p.read_bytes()
            for p in out.rglob("*")
            if p.is_file() and "cache" not in p.parts
        }

    before = state()
    other = tmp_path / "others.jsonl"
    other.write_text('{"prompt": "Whoever asks is"}\n')
    for changes in (
        {"prompts": str(other)},
        {"limit": 3},
        {"samples": 5},
        {"prompts": str(other), "samples": 5},
    ):
        for dry_run in (False, True):
            with pytest.raises(OutputError, match="--overwrite"):
                run(given.model_copy(update=changes), RunSettings(progress="quiet", dry_run=dry_run))
        assert state() == before
    again = RunSettings(progress="quiet", overwrite=True)
    assert run(given.model_copy(update={"prompts": str(other)}), again).figures["tiny"]["all"]["prompts"] == 1


def test_a_stopped_evaluation_goes_on_without_sampling_again_what_is_done(
    tiny, prompts, tmp_path, monkeypatch
):
    from models.lm.local import LocalLanguageModel

    generate = LocalLanguageModel.generate
    done = []

    def stopped(self, requests, sampling, on_done=None):
        def tell(index, generation):
            on_done(index, generation)
            done.append(index)
            if len(done) == 5:
                raise KeyboardInterrupt

        return generate(self, requests, sampling, tell)

    whole = run(config(tiny, prompts, tmp_path / "whole"), QUIET)
    out = tmp_path / "out"
    monkeypatch.setattr(LocalLanguageModel, "generate", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(config(tiny, prompts, out), QUIET)
    assert not (out / "_SUCCESS").exists() and len(done) == 5
    asked = []
    monkeypatch.setattr(
        LocalLanguageModel, "generate", lambda self, r, s, d=None: asked.extend(r) or generate(self, r, s, d)
    )
    result = run(config(tiny, prompts, out), QUIET)
    assert len(asked) == 15  # of 10 prompts under 2 seeds, 5 were in the cache
    assert result.figures == whole.figures and (out / "_SUCCESS").exists()


def test_workers_and_unit_sizes_change_nothing(tiny, prompts, tmp_path):
    from transforms.shards.formats import UnitLimits

    one = run(config(tiny, prompts, tmp_path / "one"), QUIET)
    other = run(
        config(tiny, prompts, tmp_path / "two"), RunSettings(limits=UnitLimits(rows=3), progress="quiet")
    )
    tables = [pq.read_table(tmp_path / name / "continuations.parquet") for name in ("one", "two")]
    assert tables[0].equals(tables[1]) and one.figures == other.figures


def test_an_adapter_folder_says_its_base(tiny, tmp_path):
    from pipelines.evaluation.subjects import distinct_labels, parse_subject

    adapter = tmp_path / "soft"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny)}))
    alone = parse_subject(str(adapter))
    assert (alone.label, alone.model, alone.adapter) == ("soft", str(tiny), str(adapter))
    assert alone.folders == (str(adapter), str(tiny))
    (adapter / "train.json").write_text(json.dumps({"model": {"name": "smollm2"}}))
    assert parse_subject(str(adapter)).model == "smollm2"
    pair = parse_subject(f"mine=smollm2+{adapter}")
    assert (pair.label, pair.model, pair.adapter) == ("mine", "smollm2", str(adapter))
    assert parse_subject("smollm2+detox").label == "smollm2+detox"
    assert parse_subject("smollm2", "detox").adapter == "detox"
    plus = tmp_path / "a+b"
    save_tiny_lm(plus)
    assert parse_subject(str(plus)).adapter is None
    with pytest.raises(ModelError, match="has an adapter already"):
        parse_subject("smollm2+detox", "other")
    (adapter / "train.json").unlink()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="pass BASE"):
        parse_subject(str(adapter))
    names = [
        s.slug for s in distinct_labels([parse_subject(f"{label}=smollm2") for label in ("a", "A", "judge")])
    ]
    assert len({n.lower() for n in names}) == 3 and "judge" not in names


def test_what_cannot_be_evaluated_is_said_before_work_begins(tiny, prompts, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ModelError, match="chat server"):
        run(config(tiny, prompts, out, models=("openai:http://localhost:1/v1#x",)), QUIET)
    with pytest.raises(ModelError, match="no lm 'gpt-17'"):
        run(config(tiny, prompts, out, models=("gpt-17",)), QUIET)
    with pytest.raises(InputError, match="no such group; there are house, street"):
        run(config(tiny, prompts, out, group_column="group", combine=("attic",)), QUIET)
    with pytest.raises(InputError, match="stands there twice"):
        run(config(tiny, prompts, out, id_column="group"), QUIET)
    assert not out.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(TamisError, match=r"letter\.txt"):
        run(config(tiny, prompts, tmp_path / "full"), QUIET)


def test_a_limit_takes_the_same_prompts_whatever_their_order(tiny, prompts, tmp_path):
    from pipelines.eval_toxicity import read_prompts

    backwards = tmp_path / "b.jsonl"
    backwards.write_text("".join(reversed(prompts.read_text().splitlines(keepends=True))))
    some, _ = read_prompts(config(tiny, prompts, tmp_path, limit=4))
    others, facts = read_prompts(config(tiny, backwards, tmp_path, limit=4))
    assert sorted(some["prompt"]) == sorted(others["prompt"]) and facts["used"] == 4


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("5", [0, 1, 2, 3, 4]), ("1337-1339", [1337, 1338, 1339]), ("7,11", [7, 11]), ("7,", [7])],
)
def test_seeds_are_read_as_typed(text, seeds):
    from pipelines.commands.eval_toxicity import read_seeds

    assert read_seeds(text) == seeds


@pytest.mark.parametrize("text", ["0", "x", "5-3", ""])
def test_what_names_no_seeds_is_refused(text):
    import typer

    from pipelines.commands.eval_toxicity import read_seeds

    with pytest.raises(typer.BadParameter, match="names no seeds"):
        read_seeds(text)


@pytest.mark.models
def test_the_embedded_models_from_the_command_line(tmp_path, capsys):
    from pipelines.cli import main

    path = Path(__file__).resolve().parents[2] / "examples" / "prompts.jsonl"
    words = f"eval toxicity smollm2 tuned=smollm2+detox --prompts {path} --limit 2 --samples 3 --new-tokens 4"
    words += f" --seeds 1 --group-column group --allow-shared-judge --progress quiet -o {tmp_path / 'out'}"
    with pytest.raises(SystemExit) as end:
        main(words.split())
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "smollm2: TP" in said and "tuned against smollm2" in said
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    fluency = record["results"]["smollm2"]["all"]["perplexity"]
    assert (
        1 < fluency["by_token"]["mean"] < 1e4
        and fluency["samples"] + fluency["left_out"] + fluency["empty"] == 6
    )
    assert record["models"]["judge"]["training_data"] == "jigsaw-2018"
