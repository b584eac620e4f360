"""`tamis compare` as a user runs it, with tiny models: the whole of it, a kill, a change of mind, an arm that fails."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from pipelines.cli import main
from pipelines.compare import CompareConfig, run
from pipelines.compare.receipts import read_receipts
from schemas.errors import InputError, OutputError, TamisError
from tests.models.tiny_classifier import save_classifier
from tests.models.tiny_lm import save_tiny_lm

ROOT = Path(__file__).resolve().parents[2]
WORDS = [
    "tea",
    "garden",
    "train",
    "nice",
    "lovely",
    "committee",
    "meets",
    "on",
    "tuesday",
    "thank",
    "for",
    "dinner",
    "good",
    "bad",
    "very",
    "stupid",
]


def write_rows(path: Path, tag: str, count: int, seed: int = 0) -> Path:
    drawn = random.Random(f"{tag}{seed}")
    rows = [
        {
            "id": f"{tag}{i}",
            "text": f"{' '.join(drawn.choices(WORDS, k=9))} {tag}{i}. {' '.join(drawn.choices(WORDS, k=5))}"
            + (" idiot." if i % 3 == 0 else "."),
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts_of(path: str | Path) -> list[str]:
    return [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]


def worst_sentences(scorer: str, texts: list[str]) -> list[float]:
    """The drop-documents rule worked out anew: the score of each text's worse sentence."""
    from models import registry

    ranker = registry.load("scorer", scorer)
    return [float(ranker.score([a + ".", b])[:, 0].max()) for a, b in (t.split(". ") for t in texts)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("compare")
    save_tiny_lm(folder / "lm")
    save_classifier(folder / "ranker", seed=1)
    save_classifier(folder / "judge", seed=5)
    made = {
        name: str(write_rows(folder / f"{name}.jsonl", name, n))
        for name, n in (("raw", 24), ("held", 20), ("neutral", 6))
    }
    clean = Path(made["raw"]).read_text().splitlines(True)[:18]
    (folder / "clean.jsonl").write_text("".join(clean).replace("idiot", "person"))
    scorers = {name: f"hf:{folder / name}" for name in ("ranker", "judge")}
    worst = sorted(worst_sentences(scorers["ranker"], texts_of(made["raw"])))
    tau = (worst[15] + worst[16]) / 2
    return made | scorers | {"lm": str(folder / "lm"), "clean": str(folder / "clean.jsonl"), "tau": tau}


def settings(files: dict[str, Any], output: Path, **changes) -> CompareConfig:
    base: dict[str, Any] = {
        "raw": files["raw"], "output": str(output), "given": {"clean": files["clean"]},
        "make": ("raw", "drop-documents", "lexicon-mask"), "scorer": files["ranker"], "judge": files["judge"],
        "tau": files["tau"], "model": files["lm"], "reference": "none", "held_out": files["held"], "make_prompts": 5,
        "prompt_words": 4, "samples": 3, "new_tokens": 4, "neutral": files["neutral"], "seeds": (0, 1), "other_seeds": (0,),
        "train": {"tokens": 500, "max_length": 128, "precision": "float32", "lora_r": 2}, "workers": 0, "device": "cpu",
        "quiet": True,
    }  # fmt: skip
    return CompareConfig(**{**base, **changes})


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """A finished comparison; tests must leave it as it is."""
    return run(settings(files, tmp_path_factory.mktemp("whole") / "out"))


def arm(result, name):
    return next(a for a in result.results["arms"] if a["name"] == name)


def test_every_arm_is_trained_on_as_many_tokens_and_evaluated(whole):
    assert whole.complete and (whole.output / "_SUCCESS").exists() and not whole.failed
    assert [a["name"] for a in whole.results["arms"]] == ["raw", "drop-documents", "clean", "lexicon-mask"]
    trained = {a["name"]: a["tokens_trained"] for a in whole.results["arms"]}
    assert all(abs(t - 500) < 128 for t in trained.values())  # to a step
    assert arm(whole, "raw")["seeds"] == [0, 1] and arm(whole, "clean")["seeds"] == [0]
    epochs = {a["name"]: a["epochs"] * a["corpus_tokens"] for a in whole.results["arms"]}
    assert all(tokens == pytest.approx(trained[name], rel=0.2) for name, tokens in epochs.items())


def test_figures_are_those_of_the_evaluations(whole):
    raw = arm(whole, "raw")
    tables = [pl.read_parquet(whole.output / f"toxicity/raw-{s}/continuations.parquet") for s in (0, 1)]
    means = [t["max_toxicity"].mean() for t in tables]
    assert raw["emt"]["by_seed"] == pytest.approx({"0": means[0], "1": means[1]})
    assert raw["emt"]["mean"] == pytest.approx(np.mean(means))
    assert raw["emt"]["spread"] == pytest.approx(np.std(means, ddof=1))
    shares = [np.mean([x > 0.5 for row in t["toxicity"] for x in row]) for t in tables]
    assert raw["rate"]["by_seed"] == pytest.approx({"0": shares[0], "1": shares[1]})
    assert "toxic continuations" in (whole.output / "results.md").read_text()
    clean = pl.read_parquet(whole.output / "toxicity/clean-0/continuations.parquet")["max_toxicity"].mean()
    cut = arm(whole, "clean")["emt_reduction"]  # over the seed both have
    assert cut["mean"] == pytest.approx(1 - clean / means[0]) and cut["low"] <= cut["mean"] <= cut["high"]
    losses = pl.read_parquet(whole.output / "utility/clean-0/documents.parquet")
    assert arm(whole, "clean")["neutral"]["mean"] == pytest.approx(
        np.exp(losses["model.nats"].sum() / losses["model.tokens"].sum()), rel=1e-6
    )
    assert (
        arm(whole, "drop-documents")["neutral"]["change"] is None and arm(whole, "raw")["neutral"]["change"]
    )
    pairs = {(p["a"], p["b"]) for p in whole.results["pairs"]}
    assert len(pairs) == 6 and ("raw", "clean") in pairs


def test_the_filters_did_what_their_rules_say(whole, files):
    from models import registry

    manifest = json.loads((whole.output / "arms/drop-documents/manifest.json").read_text())
    assert not any(m["kind"] in ("lm", "encoder") for m in manifest["models"])
    worst = worst_sentences(files["ranker"], texts_of(files["raw"]))
    expected = [t for t, score in zip(texts_of(files["raw"]), worst, strict=True) if score < files["tau"]]
    assert 0 < len(expected) < 24
    assert texts_of(whole.output / "arms/drop-documents/data/raw.jsonl") == expected
    assert arm(whole, "drop-documents")["rows"] == len(expected) == 24 - manifest["totals"]["rows_dropped"]
    masked = (whole.output / "arms/lexicon-mask/data/raw.jsonl").read_text()
    assert "idiot" not in masked and masked.count("[redacted]") >= 8
    assert arm(whole, "lexicon-mask")["kept"] == 1.0 and arm(whole, "clean")["kept"] == 0.75
    judge = registry.load("scorer", files["judge"])
    texts = texts_of(files["clean"])
    assert arm(whole, "clean")["judge_mean"] == pytest.approx(
        float(judge.score(texts)[:, 0].mean()), abs=1e-5
    )


def test_the_page_and_the_tables_say_what_came_of_it(whole):
    page = (whole.output / "report.html").read_text()
    assert page.count("<svg") >= 5 and "http://" not in page.replace("http://www.w3.org", "")
    for name in ("raw", "drop-documents", "clean", "lexicon-mask"):
        assert name in page
    tables = (whole.output / "results.md").read_text()
    mean = f"{arm(whole, 'clean')['emt']['mean']:.3f}"
    assert mean in tables and mean in page and mean in (whole.output / "README.md").read_text()
    rows = pl.read_parquet(whole.output / "arms.parquet")
    assert len(rows) == 6 and set(rows.filter(pl.col("arm") == "raw")["seed"]) == {0, 1}
    assert json.loads((whole.output / "results.json").read_text())["complete"] is True


def test_no_prompt_comes_from_a_row_that_was_trained_on(whole, files):
    prompts = pl.read_parquet(whole.output / "prompts/prompts.parquet")["prompt"].to_list()
    held = texts_of(files["held"])
    assert len(set(prompts)) == 5 and all(any(t.startswith(p) for t in held) for p in prompts)
    assert all(arm(whole, n)["begun_prompts"] == 0 for n in ("raw", "clean"))


def test_again_does_nothing_and_more_does_only_what_is_new(whole, files, tmp_path, capsys):
    import shutil

    output = tmp_path / "copy"
    shutil.copytree(whole.output, output)
    before = read_receipts(output)
    run(settings(files, output))
    assert read_receipts(output) == before
    # Another baseline of the page, and a seed more for one arm: the rest stays.
    more = run(settings(files, output, other_seeds=(0, 1), only=("clean",), focus="clean"))
    added = {n for n, r in read_receipts(output).items() if before.get(n) != r}
    assert added == {f"{k}-clean-1" for k in ("train", "toxicity", "utility")}
    assert not more.complete and "train-lexicon-mask-1" in more.results["waiting"]
    # Other settings are refused by name, unless that is what is wanted; what they do not touch is not done again.
    with pytest.raises(OutputError, match="--overwrite"):
        run(settings(files, output, samples=2))
    again = run(settings(files, output, samples=2, overwrite=True))
    after = read_receipts(output)
    assert again.complete and {n for n, r in after.items() if r != before.get(n) and n in before} == {
        n for n in before if n.startswith("toxicity")
    }
    out = run_dry(settings(files, output, samples=2, dry_run=True), capsys)
    assert ", 0 to do" in out and "done in" in out


def run_dry(config: CompareConfig, capsys) -> str:
    run(config)
    return capsys.readouterr().out


def test_what_an_earlier_tamis_finished_stays_done_and_another_arm_leaves_it_alone(whole, files, tmp_path):
    import shutil

    output = tmp_path / "copy"
    shutil.copytree(whole.output, output)
    present = {n: r.key for n, r in read_receipts(output).items()}
    former = {s.name: s.former for s in whole.stages if s.former}
    assert "corpus-drop-documents" in former and "toxicity-drop-documents-0" in former
    for name, key in former.items():
        for path in (output / f"stages/{name}.json", output / f"_tamis/started/{name}.json"):
            path.write_text(json.dumps({**json.loads(path.read_text()), "key": key}))
    times = {n: r.seconds for n, r in read_receipts(output).items()}
    assert run(settings(files, output)).complete
    after = read_receipts(output)
    assert {n: r.key for n, r in after.items()} == present  # the next time another arm may be there
    assert {n: r.seconds for n, r in after.items()} == times
    listed = {"strict": {"scorer": "lexicon", "accept": {"ladder": ["drop_document"]}}}
    again = run(settings(files, output, recipes=listed, stages=("corpus",)))
    assert "train-strict-0" in again.results["waiting"]
    assert {n for n, r in read_receipts(output).items() if r != after.get(n)} == {"corpus-strict"}


def test_a_corpus_more_costs_only_itself_unless_prompts_stand_in_it(whole, files, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", "other", 10)
    given = {"clean": files["clean"], "other": str(other)}
    plan = run(settings(files, whole.output, given=given, dry_run=True))
    assert {s.arm for s in plan.stages if s.name not in plan.done} == {"other"}
    prompts = pl.read_parquet(whole.output / "prompts/prompts.parquet")["prompt"].to_list()
    stands = next(
        line
        for line in Path(files["held"]).read_text().splitlines(True)
        if json.loads(line)["text"].startswith(prompts[0])
    )
    other.write_text(other.read_text() + stands)
    with pytest.raises(OutputError, match="prompts"):
        run(settings(files, whole.output, given=given, dry_run=True))


def test_results_that_were_taken_away_are_made_again_where_something_needs_them(whole, files, tmp_path):
    import shutil

    output = tmp_path / "copy"
    shutil.copytree(whole.output, output)
    before = read_receipts(output)
    for folder in ("arms/drop-documents", "models/raw-1", "models/clean-0", "toxicity/clean-0"):
        shutil.rmtree(output / folder)
    # A model that nobody samples from any more, and a corpus that was trained on, are not missed.
    result = run(settings(files, output))
    after = read_receipts(output)
    assert result.complete and {n for n in after if after[n] != before[n]} == {
        "train-clean-0",
        "toxicity-clean-0",
    }
    assert arm(result, "clean")["emt"] == arm(whole, "clean")["emt"]
    assert not (output / "models/raw-1").exists() and not (output / "arms/drop-documents").exists()


def test_a_dry_run_is_refused_as_the_run_would_be(whole, files, tmp_path):
    before = read_receipts(whole.output)
    with pytest.raises(OutputError, match="--overwrite"):
        run(settings(files, whole.output, samples=2, dry_run=True))
    assert read_receipts(whole.output) == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious.txt").write_text("mine")
    with pytest.raises(OutputError, match="something else"):
        run(settings(files, tmp_path / "out", dry_run=True))


def test_a_dry_run_plans_and_writes_nothing(files, tmp_path, capsys):
    out = run_dry(settings(files, tmp_path / "out", dry_run=True, make=("all",)), capsys)
    assert not (tmp_path / "out").exists()
    assert (
        "corpus-official" in out and "toxic " in out and "tokens" in out and "stages" in out.splitlines()[-1]
    )


def test_what_cannot_be_is_said_before_any_work(files, tmp_path):
    output = tmp_path / "out"
    for changes, words in (
        ({"judge": files["ranker"]}, "must not be the ranker"),
        ({"judge": ""}, "--judge"),
        ({"held_out": None}, "--prompts"),
        ({"prompts": files["held"]}, "exclude"),
        ({"make_prompts": 21}, "20 prompts can be made of 20 held-out rows"),
        ({"recipes": {"clean2": {"gate": {"tao": 1}}}}, "gate.tao"),
        ({"neutral_column": "body"}, "no column 'body'"),
        ({"given": {"clean": str(tmp_path / "nowhere")}}, "no such input"),
        ({"text_column": "body"}, "no column 'body'"),
        ({"model": str(tmp_path / "nowhere")}, "."),
        (
            {"make": ("logratio",), "recipes": {"logratio": {"decoding": {"toxic_adapter": "x"}}}},
            "the arm logratio.*--toxic-adapter",
        ),
        (
            {"make": ("logratio",), "recipes": {"logratio": {"model": "other"}}},
            "the arm logratio.*--set model",
        ),
        ({"focus": "cleen"}, "--focus cleen.*there are drop-documents, clean, lexicon-mask"),
        ({"focus": "raw"}, "--focus raw"),
        ({"baseline": "logratio"}, "--baseline logratio.*there are raw, drop-documents"),
        ({"main": ("raw", "logratoi")}, "--main logratoi"),
    ):
        with pytest.raises(TamisError, match=words):
            run(settings(files, output, **changes))
    assert not output.exists()
    output.mkdir()
    (output / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match="something else"):
        run(settings(files, output))
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.jsonl").write_text(Path(files["raw"]).read_text())
    with pytest.raises(TamisError, match="lies in"):
        run(settings(files, corpus / "out", raw=str(corpus)))
    run(
        settings(files, corpus / "_out", raw=str(corpus), dry_run=True)
    )  # passed over when shards are looked for


def test_what_made_the_raw_corpus_does_not_judge(whole, files, tmp_path):
    made = str(whole.output / "arms/drop-documents")
    changes = {"raw": made, "given": {}, "make": ("raw",), "judge": files["ranker"], "dry_run": True}
    with pytest.raises(TamisError, match="must not be the ranker"):
        run(settings(files, tmp_path / "out", **changes))
    run(settings(files, tmp_path / "out", **{**changes, "allow_shared_judge": True}))


def test_a_corpus_of_csv_is_trained_on_but_not_cleaned(files, tmp_path):
    table, other = tmp_path / "raw.csv", tmp_path / "clean.csv"
    pl.read_ndjson(files["raw"]).write_csv(table)
    pl.read_ndjson(files["clean"]).write_csv(other)
    changes = {"raw": str(table), "given": {"clean": str(other)}, "seeds": (0,), "neutral": None}
    for extra in ({"make": ("raw", "drop-documents")}, {"make": ("raw",), "recipes": {"mild": {}}}):
        with pytest.raises(InputError, match=r"raw\.csv: .*Parquet, JSONL and Arrow.*--make raw"):
            run(settings(files, tmp_path / "out", **changes, **extra))
    result = run(settings(files, tmp_path / "out", **changes, make=("raw",)))
    assert result.complete and arm(result, "clean")["kept"] == 0.75


def test_texts_to_learn_toxicity_from_are_looked_at_before_any_work(files, tmp_path):
    empty, other = tmp_path / "empty.jsonl", tmp_path / "other.jsonl"
    empty.write_text("")
    other.write_text('{"body": "you fool"}\n')
    changes = {"make": ("raw", "logratio"), "dry_run": True}
    for data, words in ((empty, "holds no rows"), (other, "no column 'text'")):
        with pytest.raises(InputError, match=words):
            run(settings(files, tmp_path / "out", toxic={"data": str(data)}, **changes))


def test_an_arm_that_fails_takes_no_other_with_it(files, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"id": "a", "text": ""}\n')
    changes = {"given": {"empty": str(empty)}, "make": ("raw",), "seeds": (0,), "neutral": None}
    result = run(settings(files, tmp_path / "out", **changes))
    assert set(result.failed) == {"train-empty-0", "toxicity-empty-0"} and not result.complete
    assert "needs train-empty-0" in result.failed["toxicity-empty-0"]
    assert not (tmp_path / "out/_SUCCESS").exists()
    assert 0 < arm(result, "raw")["emt"]["mean"] < 1
    assert "train-empty-0" in (tmp_path / "out/report.html").read_text()


def test_killed_it_leaves_no_process_and_goes_on(files, tmp_path):
    output = tmp_path / "out"
    config = settings(
        files, output, make=("raw",), given={}, seeds=(0,), neutral=None, workers=2, keep_models=False
    )
    program = "import sys\nfrom pipelines.compare import CompareConfig, run\nrun(CompareConfig.model_validate_json(sys.argv[1]))"
    process = subprocess.Popen(
        [sys.executable, "-c", program, config.model_dump_json()],
        cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for(lambda: (output / "_tamis/started/train-raw-0.json").exists(), process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not group_lives(process.pid))
    done = read_receipts(output)
    assert "corpus-raw" in done and "toxicity-raw-0" not in done
    result = run(config.model_copy(update={"workers": 0}))
    after = read_receipts(output)
    assert result.complete and after["corpus-raw"] == done["corpus-raw"]
    assert after["train-raw-0"].removed and not (output / "models/raw-0").exists()
    whole = run(settings(files, tmp_path / "other", make=("raw",), given={}, seeds=(0,), neutral=None))
    assert arm(result, "raw")["emt"] == arm(whole, "raw")["emt"]


def wait_for(condition, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process is None or process.poll() is None, process.stderr.read().decode()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_command_line(files, tmp_path, capsys, monkeypatch):
    argv = [
        "compare", files["raw"], files["clean"], "-o", str(tmp_path / "out"), "--make", "raw", "--scorer", files["ranker"],
        "--judge", files["judge"], "--model", files["lm"], "--held-out", files["held"], "--make-prompts", "4",
        "--recipe", "mild:accept.ladder=[\"redact\"]", "--prompt-words", "3", "--reference", "none", "--dry-run",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["tamis", *argv])
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "corpus-clean.jsonl" in out and "corpus-mild" in out and "train-raw-1" in out
