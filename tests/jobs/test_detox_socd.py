"""Contrastive decoding as a whole job: a toxic model trained on the corpus itself, spans by it, candidates steered.

On a language model of 60,000 random weights, whose rewrites are noise: what counts here is that the same noise comes out
of one shard or seven, one worker or two, and of a run that was killed.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from models import registry
from models.prompts import load_prompt
from pipelines.detox_config import DetoxConfig
from pipelines.steering_views import Passage, trace_edits
from pipelines.verify import verify_output
from tests.jobs.test_detox import edits_of, rows_of, tamis
from tests.models.tiny_lm import save_adapter, save_base
from transforms.detox.rewrite import Planner, Unit
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
STEPS = 23  # of training: a few past the first checkpoint
# What a rewriting model would be told, short; any of these letters ends an answer, so that noise makes some.
PROMPT = """{%- set stop = ["</answer>", "a", "e", "i", "o", " "] -%}
{%- block user -%}Rewrite: {{ text }}{%- endblock -%}
{%- block assistant -%}<answer>{%- endblock -%}
"""


@pytest.fixture(scope="module", autouse=True)
def _no_reports() -> Iterator[None]:
    """The report a job ends with has tests of its own, and takes longer than these jobs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.report.write_report", lambda out, **_: out)
        yield


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


def ran_options(tiny: Path, *more: str) -> list[str]:
    """Options of the run that others are compared with."""
    found = ["--localize", "lexicon,socd", "--set", "localize.socd_threshold=0.001"]
    return options(tiny, *found, *more, steps=STEPS)


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
    args = ran_options(tiny)
    assert tamis("detox", source, "-o", folder / "out", *args) == 0
    return folder / "out"


def test_a_toxic_model_is_trained_on_what_the_gate_flags(ran: Path) -> None:
    texts = [row["text"] for row in rows_of(ran / "_tamis/toxic-texts.jsonl")]
    assert sorted(texts) == sorted(f"You are an idiot, {noun}." for noun in NOUNS)
    assert texts != sorted(texts)  # in an order of their content's own
    toxic = toxic_of(ran)
    assert toxic["extra"] == {"texts": 22, "flagged": 23, "full": False} and len(toxic["revision"]) == 16
    record = json.loads((ran / "_tamis/toxic-model/train.json").read_text())
    assert (record["run"]["steps"], record["kind"], record["run"]["packing"]) == (
        STEPS,
        "adapter",
        "isolated",
    )
    manifest = json.loads((ran / "manifest.json").read_text())
    lm = next(m for m in manifest["models"] if "decoding" in m["extra"])
    assert lm["extra"]["decoding"]["mode"] == "logratio" and lm["name"].endswith("+toxic-model")
    assert str(ran) not in json.dumps(manifest["config"])


def test_its_adapter_lies_on_top_of_the_rewriters_in_the_last_layers(tiny: Path, tmp_path: Path) -> None:
    from models.decoding.pair import TwoAdapters, load_pair

    rewriter = save_adapter(tmp_path / "rewriter", tiny / "base", 3, scale=0.02)
    command = ("detox", write_shards(tmp_path / "in", 1), "-o", tmp_path / "out", *options(tiny))
    command = (*command, "--adapter", str(rewriter))
    assert tamis(*command, "--set", "decoding.train.layers=1") == 0
    toxic = tmp_path / "out/_tamis/toxic-model"
    record = json.loads((toxic / "train.json").read_text())
    assert record["model"]["on_adapter"]["name"] == str(rewriter) and record["lora"]["layers"] == 1
    assert str(rewriter) in toxic_of(tmp_path / "out")["source"]
    pair = load_pair(tiny / "base", adapter=rewriter, toxic_adapter=toxic, dtype="float32")
    assert isinstance(pair, TwoAdapters) and pair.shared == 1
    # Trained in another way it is another model: by default in all layers, on the plain base.
    assert tamis(*command) == 4
    assert tamis(*command, "--overwrite") == 0
    record = json.loads((toxic / "train.json").read_text())
    assert "on_adapter" not in record["model"] and record["lora"]["layers"] == 0


def test_the_candidates_are_steered_and_socd_finds_spans(ran: Path) -> None:
    edits = record_of(ran)
    assert len(edits) == 23
    assert {s["source"] for e in edits for s in e["spans"]} >= {"lexicon+socd"}
    sampled = [c for e in edits for c in e["candidates"]]
    assert {round(c["temperature"], 4) for c in sampled} == {0.8, 1.5}
    assert {r for c in sampled for r in c["reasons"]} >= {"unparsed", "empty"}
    counters = json.loads((ran / "manifest.json").read_text())["counters"]
    assert counters["rewrite.unclosed"] > 0 and counters["reject.unparsed"] > 0 < counters["reject.empty"]
    twice = [e for e in edits if e["id"] in ("t0", "again")]
    assert len(twice) == 2 and twice[0]["candidates"] == twice[1]["candidates"]
    assert verify_output(str(ran)).problems == []


def test_seven_shards_and_two_workers_give_the_same_model_and_candidates(
    ran: Path, tiny: Path, tmp_path: Path
) -> None:
    source = write_shards(tmp_path / "in", 7)
    args = ran_options(tiny)
    assert tamis("detox", source, "-o", tmp_path / "out", *args, "--workers", "2", "--unit-rows", "3") == 0
    assert (tmp_path / "out/_tamis/toxic-texts.jsonl").read_bytes() == (
        ran / "_tamis/toxic-texts.jsonl"
    ).read_bytes()
    assert weights_of(tmp_path / "out") == weights_of(ran)
    assert record_of(tmp_path / "out") == record_of(ran)


def test_a_run_stopped_while_training_and_again_while_rewriting_ends_as_if_it_had_not_been(
    ran: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.training.trainer import CausalTrainer
    from transforms.detox import steps as detox_steps

    out = tmp_path / "out"
    command = ("detox", write_shards(tmp_path / "in", 1), "-o", out, *ran_options(tiny, "--unit-rows", "4"))

    def stop_at_call(owner: object, name: str, number: int) -> None:
        calls, real = itertools.count(1), getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    stop_at_call(CausalTrainer, "compute_loss", 22)  # the step after the one that was kept
    assert tamis(*command) == 130
    assert not (out / "_tamis/toxic-model/_SUCCESS").exists()
    monkeypatch.undo()
    stop_at_call(detox_steps, "rewrite_toxic_segments", 4)
    assert tamis(*command) == 130
    record = json.loads((out / "_tamis/toxic-model/train.json").read_text())
    assert record["results"]["resumed_from"] == 20 and record["run"]["steps"] == STEPS
    assert list((out / "_tamis/receipts").rglob("*.json")) and not (out / "_SUCCESS").exists()
    monkeypatch.undo()
    assert tamis(*command) == 0
    assert weights_of(out) == weights_of(ran)
    assert record_of(out) == record_of(ran)


def test_the_model_is_kept_over_other_settings_retries_and_new_rows(
    ran: Path, tiny: Path, tmp_path: Path
) -> None:
    out, source = tmp_path / "out", tmp_path / "in"
    shutil.copytree(ran.parent / "in", source)
    args = options(tiny)
    assert tamis("detox", source, "-o", out, *args) == 0
    made = (out / "_tamis/toxic-model/train.json").stat().st_mtime_ns
    before = record_of(out)
    assert tamis("detox", source, "-o", out, *args) == 0  # finished already
    assert tamis("retry", out, "--progress", "quiet") == 0  # the broken line
    assert verify_output(str(out)).problems == []
    (source / "more.jsonl").write_text(json.dumps({"id": "new", "text": "So stupid, a hat."}) + "\n")
    assert tamis("detox", source, "-o", out, *args) == 0
    assert [e for e in record_of(out) if e["id"] != "new"] == before
    assert tamis("detox", source, "-o", out, *args, "--min-similarity", "0.9") == 4
    assert (out / "_tamis/toxic-model/train.json").stat().st_mtime_ns == made
    # Trained anew where the input has changed, and only if told so.
    assert tamis("detox", source, "-o", out, *args, "--overwrite") == 0
    assert toxic_of(out)["extra"]["texts"] == 23


def test_what_every_mode_would_have_chosen_can_be_asked_of_a_finished_run(
    ran: Path, tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(ran, out)
    source = json.loads((out / "_tamis/job.json").read_text())["input"]
    args = ran_options(tiny)
    assert tamis("detox", source, "-o", out, *args, "--compare-modes", "2") == 0
    modes = json.loads((out / "_tamis/views.json").read_text())["modes"]
    assert len(modes) == 2
    chosen = {e["id"]: e for e in record_of(ran)}
    for row in modes:
        noun = row["text"].removeprefix("You are an idiot, ").rstrip(".")
        assert noun in NOUNS and row["toxicity"] > 0.5  # the whole passage, though the edit was of a word
        assert list(row["modes"]) == ["prompt_only", "vanilla_cd", "official", "logratio"]
        measured = [c for c in chosen[f"t{NOUNS.index(noun)}"]["candidates"] if c["toxicity"] is not None]
        mine = row["modes"]["logratio"]
        assert (mine["text"] if mine else None) == (measured[0]["text"] if measured else None)
    assert len({json.dumps(row["modes"][m]) for row in modes for m in row["modes"]}) > 2
    assert "What each mode would have chosen" in (out / "report.html").read_text()
    written = (out / "_tamis/views.json").stat().st_mtime_ns
    assert tamis("detox", source, "-o", out, *args, "--compare-modes", "1") == 0
    assert (out / "_tamis/views.json").stat().st_mtime_ns == written


def test_a_winner_is_drawn_once_more_to_see_where_it_was_steered(ran: Path) -> None:
    stored = json.loads((ran / "_tamis/job.json").read_text())
    config = DetoxConfig.model_validate(
        {**{k: v for k, v in stored["config"].items() if k != "prompt_tag"}, "input": "", "output": str(ran)}
    )
    config = config.with_toxic(str(ran / "_tamis/toxic-model"), full=False)
    model = registry.load("lm", config.model, **dict(config.model_options()))
    planner = Planner(model, load_prompt(config.prompt), config.rewrite)
    document = "Look. You are an idiot, hat."
    whole = (6, len(document))
    request = planner.request(Unit(0, 1, *whole, (whole,)), whole, document, 0)
    sampling = replace(config.rewrite.sampling.sampling(), max_new_tokens=planner.output_budget(document[6:]))
    winner = model.generate([request], sampling)[0].candidates[3]
    passages = [
        Passage(document, *whole, {"seed": seed, "after": "A hat."}) for seed in (None, 1, winner.seed)
    ]
    (trace,) = trace_edits(config, passages)
    assert (trace["before"], trace["temperature"]) == ("You are an idiot, hat.", winner.temperature)
    told = "".join(trace["tokens"]).replace("<|im_start|>", "")  # marks are tokens, and no text
    assert told.startswith(winner.text)
    assert {len(trace[name]) for name in ("tokens", "alpha", "k", "edited")} == {winner.tokens}
    assert max(trace["alpha"]) > 0 and all(10 <= k <= trace["vocabulary"] for k in trace["k"])


def test_other_training_settings_are_refused_before_anything_is_trained(
    ran: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(ran, out)
    job = json.loads((out / "_tamis/job.json").read_text())
    args = ran_options(tiny, "--set", "decoding.train.epochs=2")
    assert tamis("detox", job["input"], "-o", out, *args) == 4
    assert "other settings (decoding)" in capsys.readouterr().err
    assert weights_of(out) == weights_of(ran)


def test_all_weights_can_be_trained_instead(tiny: Path, tmp_path: Path) -> None:
    source = write_shards(tmp_path / "in", 1)
    args = options(tiny, "--toxic-full", "--set", "decoding.train.learning_rate=1e-3")
    assert tamis("detox", source, "-o", tmp_path / "out", *args) == 0
    assert (tmp_path / "out/_tamis/toxic-model/model.safetensors").exists()
    assert toxic_of(tmp_path / "out")["extra"]["full"] is True
    lm = record_of(tmp_path / "out")[0]["model"]
    assert "~toxic-model@" in lm


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        ([], 3, "the gate flags 1 different passages"),
        (["--decoding", "prompt_only", "--localize", "socd"], 2, "--localize socd needs a toxic model"),
        (
            ["--decoding", "prompt_only", "--toxic-adapter", "x"],
            2,
            "does nothing with --decoding prompt_only",
        ),
        (["--decoding", "prompt_only", "--compare-modes", "3"], 2, "--compare-modes needs a toxic model"),
        (["--decoding", "sideways"], 2, "decoding.mode"),
        (["--model", "openai:http://127.0.0.1:9/v1#x"], 2, "needs the model in this process"),
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


def test_a_dry_run_over_the_output_of_other_settings_is_refused_as_the_run_is(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_shards(tmp_path / "in", 1)
    command = ("detox", source, "-o", tmp_path / "out")
    assert tamis(*command, *options(tiny, decoding="prompt_only")) == 0
    for more in ([], ["--dry-run"]):
        capsys.readouterr()
        assert tamis(*command, *options(tiny), *more) == 4
        assert "with other settings (decoding)" in capsys.readouterr().err


def test_the_model_of_another_input_is_not_taken_for_this_ones(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_shards(tmp_path / "in", 1)
    command = ("detox", source, "-o", tmp_path / "out", *options(tiny))
    assert tamis(*command) == 0
    (source / "0.jsonl").write_text(json.dumps({"id": "1", "text": "You are an idiot."}) + "\n")
    for _ in range(2):  # refused, and the second time by what the first left behind
        capsys.readouterr()
        assert tamis(*command, "--overwrite") == 3
        assert "too few to train a toxic model" in capsys.readouterr().err
    assert tamis(*command) == 3


def test_localising_by_contrast_leaves_plain_decoding_as_it_is(tiny: Path, tmp_path: Path) -> None:
    source = write_shards(tmp_path / "in", 1)
    toxic = save_adapter(tmp_path / "toxic", tiny / "base", 1)
    given = ["--toxic-adapter", str(toxic)]
    plain = options(tiny, decoding="prompt_only")
    assert tamis("detox", source, "-o", tmp_path / "a", *plain) == 0
    assert tamis("detox", source, "-o", tmp_path / "b", *plain, "--localize", "socd", *given) == 0
    a, b = record_of(tmp_path / "a"), record_of(tmp_path / "b")
    assert [e["model"] for e in a] == [e["model"] for e in b]
    assert [[c["text"] for c in e["candidates"]] for e in a] == [
        [c["text"] for c in e["candidates"]] for e in b
    ]
    assert {s["source"] for e in b for s in e["spans"]} == {"socd"}


def test_a_filter_that_localises_by_contrast_has_its_toxic_model_trained_too(
    tiny: Path, tmp_path: Path
) -> None:
    source = write_shards(tmp_path / "in", 1)
    given = options(
        tiny, "--localize", "socd", "--set", "localize.socd_threshold=0.001", "--ladder", "redact"
    )
    assert tamis("detox", source, "-o", tmp_path / "out", *given) == 0
    assert toxic_of(tmp_path / "out")["revision"]
    edits = edits_of(tmp_path / "out").to_dicts()
    assert edits and {s["source"] for e in edits for s in e["spans"]} == {"socd"}
    assert not any(e["candidates"] for e in edits)


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
