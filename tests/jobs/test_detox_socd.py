"""Contrastive decoding as a whole job: a toxic model trained on the corpus itself, spans by it, candidates steered.

On a language model of 60,000 random weights, whose rewrites are noise: what counts here is that the same noise comes out
of one shard or seven, one worker or two, and of a run that was killed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipelines.verify import verify_output
from tests.jobs.test_detox import edits_of, rows_of, tamis
from tests.models.tiny_lm import save_base
from transforms.detox.toxic_texts import Sample, merge_samples

pytestmark = pytest.mark.models

NOUNS = [
    "soup",
    "road",
    "phone",
    "cat",
    "plan",
    "song",
    "hat",
    "boat",
    "game",
    "shop",
    "lamp",
    "bread",
    "train",
    "coat",
    "film",
    "desk",
    "tree",
    "chair",
    "bus",
    "wall",
    "clock",
    "shoe",
]
# What a rewriting model would be told, short; any of these letters ends an answer, so that noise makes some.
PROMPT = """{%- set stop = ["</answer>", "a", "e", "i", "o", " "] -%}
{%- block user -%}Rewrite: {{ text }}{%- endblock -%}
{%- block assistant -%}<answer>{%- endblock -%}
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model and a prompt."""
    folder = tmp_path_factory.mktemp("tiny")
    save_base(folder / "base", 0)
    (folder / "prompt.jinja").write_text(PROMPT)
    return folder


def options(tiny: Path, *more: str, steps: int = 4, decoding: str = "logratio") -> list[str]:
    """Options of a run on the tiny model, the word list as its classifier."""
    given = ["--decoding", decoding, "--model", f"hf:{tiny / 'base'}", "--prompt", str(tiny / "prompt.jinja")]
    given += ["--scorer", "lexicon", "--gate", "all", "--id-column", "id", "--dtype", "float32"]
    given += ["--temperatures", "0.8,1.5", "--per-temperature", "2", "--progress", "quiet"]
    for setting in ("min_steps", "max_steps"):
        given += ["--set", f"decoding.train.{setting}={steps}"]
    given += ["--set", "decoding.train.precision=float32", "--set", "decoding.train.threads=1"]
    given += ["--set", "rewrite.sampling.max_new_tokens=96"]
    return [*given, *more]


def lines() -> list[str]:
    """The corpus: 22 rows with an insult, some twice the same, as many without, and one that is no JSON."""
    rows = []
    for i, noun in enumerate(NOUNS):
        rows.append(json.dumps({"id": f"t{i}", "text": f"The {noun} was fine. You are an idiot, {noun}."}))
        rows.append(json.dumps({"id": f"c{i}", "text": f"Nothing is wrong with the {noun}."}))
    rows.append(json.dumps({"id": "again", "text": f"Look. You are an idiot, {NOUNS[0]}."}))
    return [*rows, '{"id": "broken", "te']


def write_shards(folder: Path, shards: int) -> Path:
    folder.mkdir(parents=True)
    whole = lines()
    for i in range(shards):
        part = whole[i * len(whole) // shards : (i + 1) * len(whole) // shards]
        (folder / f"{i}.jsonl").write_text("".join(line + "\n" for line in part))
    return folder


def toxic_of(out: Path) -> dict[str, Any]:
    """What a run's manifest says of its toxic model."""
    models = json.loads((out / "manifest.json").read_text())["models"]
    return next(m for m in models if m["name"] == "toxic-model")


def record_of(out: Path) -> list[dict[str, Any]]:
    """All edits with their candidates, whatever shard they come from."""
    return edits_of(out).drop("shard", "row").sort("id", "start").to_dicts()


def weights_of(out: Path) -> bytes:
    return (out / "_tamis/toxic-model/adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def ran(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an undisturbed run over one shard."""
    folder = tmp_path_factory.mktemp("ran")
    source = write_shards(folder / "in", 1)
    args = options(tiny, "--localize", "lexicon,socd", "--set", "localize.socd_threshold=0.001")
    assert tamis("detox", source, "-o", folder / "out", *args) == 0
    return folder / "out"


def test_a_toxic_model_is_trained_on_what_the_gate_flags(ran: Path) -> None:
    texts = [row["text"] for row in rows_of(ran / "_tamis/toxic-texts.jsonl")]
    assert sorted(texts) == sorted(f"You are an idiot, {noun}." for noun in NOUNS)
    assert texts != sorted(texts)  # in an order of their content's own
    toxic = toxic_of(ran)
    assert toxic["extra"] == {"texts": 22, "flagged": 23, "full": False} and len(toxic["revision"]) == 16
    record = json.loads((ran / "_tamis/toxic-model/train.json").read_text())
    assert (record["run"]["steps"], record["kind"], record["run"]["packing"]) == (4, "adapter", "isolated")
    manifest = json.loads((ran / "manifest.json").read_text())
    lm = next(m for m in manifest["models"] if "decoding" in m["extra"])
    assert lm["extra"]["decoding"]["mode"] == "logratio" and lm["name"].endswith("+toxic-model")
    assert str(ran) not in json.dumps(manifest["config"])


def test_the_candidates_are_steered_and_socd_finds_spans(ran: Path) -> None:
    edits = record_of(ran)
    assert len(edits) == 23
    assert {s["source"] for e in edits for s in e["spans"]} >= {"lexicon+socd"}
    sampled = [c for e in edits for c in e["candidates"]]
    assert {round(c["temperature"], 4) for c in sampled} == {0.8, 1.5}
    assert {r for c in sampled for r in c["reasons"]} >= {"unparsed", "empty"}
    twice = [e for e in edits if e["id"] in ("t0", "again")]
    assert len(twice) == 2 and twice[0]["candidates"] == twice[1]["candidates"]
    assert verify_output(str(ran)).problems == []


def test_other_training_settings_are_refused_before_anything_is_trained(
    ran: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(ran, out)
    job = json.loads((out / "_tamis/job.json").read_text())
    args = options(tiny, "--localize", "lexicon,socd", "--set", "localize.socd_threshold=0.001", steps=5)
    assert tamis("detox", job["input"], "-o", out, *args) == 4
    assert "other settings (decoding)" in capsys.readouterr().err
    assert weights_of(out) == weights_of(ran)


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        ([], 3, "the gate flags 1 different passages"),
        (["--decoding", "prompt_only", "--localize", "socd"], 2, "--localize socd needs a toxic model"),
        (["--decoding", "prompt_only", "--compare-modes", "3"], 2, "--compare-modes needs a toxic model"),
        (["--decoding", "sideways"], 2, "decoding.mode"),
        (["--localize", "lexicon,guess"], 2, "localize.sources"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    more: list[str], code: int, says: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text(json.dumps({"id": "1", "text": "You are an idiot."}) + "\n")
    assert tamis("detox", tmp_path / "in", "-o", tmp_path / "out", *options(tiny), *more) == code
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and says in said[0]
    assert "pass" in said[0] or "setting" in said[0]


def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_shards(tmp_path / "in", 1)
    assert tamis("detox", source, "-o", tmp_path / "out", *options(tiny), "--dry-run") == 0
    assert "would first train a toxic model: LoRA r 8" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_of_too_many_texts_the_same_are_kept_however_they_are_seen() -> None:
    def sample(numbers: range) -> Sample:
        return Sample(len(numbers), len(numbers), {bytes([n * 37 % 256]): str(n) for n in numbers})

    whole = merge_samples([sample(range(100))], 10)
    parts = [sample(range(i, 100, 7)) for i in range(7)]
    for order in (parts, parts[::-1], [merge_samples(parts[:3], 10), merge_samples(parts[3:], 10)]):
        assert merge_samples(order, 10).texts == whole.texts
    assert len(whole.texts) == 10 and (whole.rows, whole.flagged) == (100, 100)


def test_frames_of_a_corpus_can_be_read_back(ran: Path) -> None:
    kept = pl.read_ndjson(ran / "data/0.jsonl")
    assert kept.height == 45 and not kept["text"].str.contains("idiot").any()
