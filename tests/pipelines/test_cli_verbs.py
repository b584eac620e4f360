"""Every verb as it is typed: what the command line hands on is what the function takes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import orjson
import pytest
import typer
from typer.testing import CliRunner

from pipelines.cli import app
from schemas.errors import TamisError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def tamis(*words: object) -> str:
    done = CliRunner().invoke(app, [str(w) for w in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def verbs() -> list[list[str]]:
    found: list[list[str]] = []

    def walk(command: object, path: list[str]) -> None:
        children = getattr(command, "commands", None)
        if children is None:
            found.append(path)
        else:
            for name, child in children.items():
                walk(child, [*path, name])

    walk(typer.main.get_command(app), [])
    return found


@pytest.mark.parametrize("verb", verbs(), ids=" ".join)
def test_help_says_what_it_does_with_an_example(verb: list[str]) -> None:
    said = tamis(*verb, "--help")
    assert "Usage:" in said and "Example" in said


def test_judgments_come_in_and_go_out(tmp_path: Path) -> None:
    tamis("judgments", "import", EXAMPLES / "retrieval", "-o", tmp_path / "in", "--split", "test")
    assert (tmp_path / "in" / "_SUCCESS").exists()
    tamis("judgments", "export", tmp_path / "in", "--format", "trec-qrels", "-o", tmp_path / "out")
    exported = [
        line.split() for p in (tmp_path / "out").rglob("*.qrels*") for line in p.read_text().splitlines()
    ]
    given = (EXAMPLES / "retrieval/qrels/test.tsv").read_text().splitlines()[1:]
    assert {(q, d, g) for q, _, d, g in exported} == {tuple(line.split("\t")) for line in given}


def test_retrieval_is_evaluated(tmp_path: Path) -> None:
    args = [EXAMPLES / "retrieval", "--split", "test", "--system", "bm25", "-o", tmp_path / "out"]
    tamis("eval", "retrieval", *args, "--dry-run")
    assert not (tmp_path / "out").exists()
    tamis("eval", "retrieval", *args)
    assert "bm25" in (tmp_path / "out" / "results.json").read_text()


def test_spans_are_evaluated(tmp_path: Path) -> None:
    gold = EXAMPLES / "spans.jsonl"
    tamis("eval", "spans", gold, "--gold", gold, "-o", tmp_path / "out", "--spans-column", "spans")
    results = (tmp_path / "out" / "results.json").read_text()
    assert orjson.loads(results)["kind"] == "spans"


def test_rewrites_are_evaluated(tmp_path: Path) -> None:
    tamis(
        "eval", "rewrites", EXAMPLES / "rewrites.jsonl", "--source", "source", "--system", "ours=ours", "--reference",
        "reference", "--built-in", "copy,delete", "--judge", "linear", "--fluency", "ngram", "--limit", "6", "-o",
        tmp_path / "out", "--progress", "quiet",
    )  # fmt: skip
    systems = orjson.loads((tmp_path / "out" / "results.json").read_bytes())["systems"]
    assert {"ours", "copy", "delete"} <= systems.keys()


def test_toxicity_and_trainings_are_planned(tmp_path: Path) -> None:
    prompts = EXAMPLES / "prompts.jsonl"
    out = ["-o", tmp_path / "out", "--dry-run"]
    tamis("eval", "toxicity", "smollm2", "--prompts", prompts, "--judge", "lexicon", *out)
    tamis(
        "train",
        "spans",
        EXAMPLES / "spans.jsonl",
        "--spans-column",
        "spans",
        "--output",
        tmp_path / "out",
        "--dry-run",
    )
    assert not (tmp_path / "out").exists()


def test_a_report_is_made_again(tmp_path: Path) -> None:
    tamis(
        "score",
        EXAMPLES / "corpus.jsonl",
        "-o",
        tmp_path / "out",
        "--scorer",
        "lexicon",
        "--progress",
        "quiet",
    )
    page = tmp_path / "out" / "report.html"
    first = page.read_bytes()
    page.unlink()
    tamis("report", tmp_path / "out")
    assert page.read_bytes()[:200] == first[:200]


def test_models_are_listed_and_shown() -> None:
    assert "lexicon" in tamis("models", "list") and "minilm" in tamis("models", "list")
    assert "minilm" in tamis("models", "show", "minilm")


def test_a_dummy_server_answers_and_stops() -> None:
    server = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "serve-dummy", "--port", "0", "--mode", "echo"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        line = next(x for x in server.stdout if "http://" in x)
        url = next(w for w in line.split() if w.startswith("http://")).rstrip(",.;")
        with urlopen(f"{url.removesuffix('/v1')}/v1/models", timeout=20) as answer:
            assert answer.status == 200
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=20)


def test_the_defaults_that_detox_shows_are_those_in_force() -> None:
    from pipelines.detox_config import DetoxConfig

    config = DetoxConfig(input="in", output="out")
    shown = {p.name: p.default for p in typer.main.get_command(app).commands["detox"].params}  # type: ignore[attr-defined]
    settings = {
        "gate": "gate.gate", "tau": "gate.tau", "unit": "rewrite.unit", "decoding": "decoding.mode", "prompt": "prompt",
        "per_temperature": "rewrite.sampling.per_temperature", "max_toxicity": "accept.max_toxicity",
        "min_similarity": "accept.min_similarity", "fusion_lambda": "accept.fusion_lambda", "model": "model",
        "scorer": "scorer", "seed": "seed", "threads": "threads", "device": "device", "dtype": "dtype",
    }  # fmt: skip
    for option, path in settings.items():
        value: object = config
        for name in path.split("."):
            value = getattr(value, name)
        assert shown[option] == value, option
    assert shown["temperatures"] == ",".join(map(str, config.rewrite.sampling.temperatures))
    assert shown["localize"] == ",".join(config.localize.sources)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperatures", "0.6,hot"], "'hot' is no number"),
        (["--temperatures", "0.6,"], "'' is no number"),
        (["--temperatures", "0.6,0.6"], "a temperature is given twice"),
        (["--temperatures", "nan"], "a temperature must be 0 (greedy) or more"),
        (["--set", "gate=all", "--set", "gate.tau=0.4"], "gate.tau: 'gate' is 'all'"),
        (["--config", "list.json"], "holds no table of settings"),
        (["--ladder", "candidate, magic"], "accept.ladder"),
    ],
)
def test_detox_settings_that_mean_nothing_are_one_line(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n')
    done = CliRunner().invoke(app, ["detox", "a.jsonl", "-o", "out", *options])
    assert isinstance(done.exception, (TamisError, SystemExit)) and done.exit_code != 0
    assert message in f"{done.exception} {done.output}"
    assert not (tmp_path / "out").exists()
