"""`tamis train lm` as a user runs it: train, kill, go on, load the result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from pipelines.train_lm import TrainLMConfig, main, parse, run
from schemas.errors import FatalStepError, InputError, ModelError, OutputError, TamisError
from tests.jobs.killing import kill_after
from tests.models.tiny_lm import save_tiny_lm

ROOT = Path(__file__).resolve().parents[2]
PAIRS = [
    {"source": f"That was a {word} idea, number {i}.", "target": f"That was not a good idea, number {i}."}
    for i, word in enumerate(["stupid", "dumb", "damn silly", "moronic"] * 8)
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_tiny_lm(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def pairs(tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(PAIRS[:20]), folder / "a.parquet")
    (folder / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS[20:]))
    return str(folder)


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    rows = [{"text": f"Document {i} tells of {i * 7 % 13} things. " * (i % 5 + 1)} for i in range(80)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    return str(folder)


def config(data, tiny, output, **changes) -> TrainLMConfig:
    settings = {
        "data": data, "model": tiny, "output": str(output), "max_length": 128, "batch_size": 4, "threads": 1,
        "max_steps": 6, "save_steps": 2, "log_steps": 1, "learning_rate": 1e-2, "eval_fraction": 0.1,
        "device": "cpu", "quiet": True,
    }  # fmt: skip
    return TrainLMConfig(**{**settings, **changes})


def weights(folder):
    path = Path(folder)
    return load_file(next(iter(path.glob("*model.safetensors"))))


def assert_equal_weights(one, other):
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(a[name].equal(b[name]) for name in a)


def test_a_full_model_is_trained_and_loads(tiny, texts, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = run(config(texts, tiny, tmp_path / "out", eval_steps=3))
    assert result.record["results"]["eval_loss"] < result.record["results"]["eval_loss_before"] - 0.1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert (tmp_path / "out" / "_SUCCESS").exists()
    assert not (tmp_path / "out" / "_tamis" / "checkpoints").exists()
    record = json.loads((tmp_path / "out" / "train.json").read_text())
    assert record["data"]["counts"]["rows"] == 80
    assert record["data"]["shards"][0]["fingerprint"].startswith("xxh3:")
    card = (tmp_path / "out" / "README.md").read_text()
    assert record["config_hash"] in card and record["data"]["shards"][0]["fingerprint"] in card
    assert "tamis train lm" in card and "/80" not in card
    events = [
        json.loads(line)
        for path in (tmp_path / "out" / "_tamis" / "events").iterdir()
        for line in path.read_text().splitlines()
    ]
    steps = [e for e in events if e.get("event") == "step"]
    assert [e["step"] for e in steps] == [1, 2, 3, 4, 5, 6]
    assert all(e["loss"] > 0 and e["tokens_per_second"] > 0 and e["eta_seconds"] >= 0 for e in steps)
    assert [e["step"] for e in events if e.get("event") == "eval"] == [0, 3, 6]
    assert events[-1]["kind"] == "run" and events[-1]["state"] == "finished"


def test_an_adapter_is_trained_and_loads(tiny, pairs, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    options = {
        "lora": True,
        "lora_r": 4,
        "prompt": "detox-rewrite-v1",
        "max_length": 512,
        "save_dtype": "bfloat16",
        "eval_fraction": 0.3,
    }
    result = run(config(pairs, tiny, tmp_path / "out", **options))
    assert result.plan.prefix > 50 and result.plan.packing == "isolated"
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}
    assert not (tmp_path / "out" / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(tiny)
    ids = torch.arange(12)[None]
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, tmp_path / "out")
    assert not torch.allclose(adapted(ids).logits, before, atol=1e-3)
    assert result.record["results"]["eval_loss"] < result.record["results"]["eval_loss_before"]


def test_an_adapter_on_top_of_another_holds_both(tiny, texts, tmp_path):
    """In the last layer only; the layers below stay as the adapter below has them."""
    from models.lm.factors import difference, read_factors

    run(config(texts, tiny, tmp_path / "below", lora=True, lora_r=4))
    options = {"lora": True, "lora_r": 2, "lora_layers": 1, "on_adapter": str(tmp_path / "below")}
    result = run(config(texts, tiny, tmp_path / "above", seed=1, **options))
    below, above = read_factors(tmp_path / "below"), read_factors(tmp_path / "above")
    added = difference(above, below)
    assert added and all(name.startswith("model.layers.1.") for name in added)
    assert {len(factors.down) for factors in added.values()} == {2} and above.keys() == below.keys()
    # It begins where the one below has ended, and goes on from there.
    before = json.loads((tmp_path / "below" / "train.json").read_text())["results"]["eval_loss"]
    assert result.record["results"]["eval_loss_before"] == pytest.approx(before, abs=0.02)
    assert result.record["results"]["eval_loss"] < before
    assert result.record["model"]["on_adapter"]["name"] == str(tmp_path / "below")
    card = (tmp_path / "above" / "README.md").read_text()
    assert "of the last 1 layers" in card and "| on top of | adapter `" in card
    again = run(config(texts, tiny, tmp_path / "above", seed=1, **options))
    assert again.plan is None  # nothing to do
    run(config(texts, tiny, tmp_path / "below", lora=True, lora_r=4, seed=5, overwrite=True))
    with pytest.raises(OutputError, match="--overwrite"):  # the adapter below is another one now
        run(config(texts, tiny, tmp_path / "above", seed=1, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_layers": 1}, "needs --lora"),
        ({"lora": True, "lora_layers": 3}, "the model has 2 layers"),
        ({"lora": True, "lora_layers": 1, "lora_targets": "no_such"}, "no such module"),
        ({"lora": True, "on_adapter": "/no/such"}, "No adapter"),
        ({"lora": True, "dora": True, "on_adapter": "detox"}, "exclude each other"),
        ({"on_adapter": "detox"}, "made for another model"),
    ],
)
def test_where_an_adapter_cannot_lie_is_said_in_one_line(tiny, texts, tmp_path, options, message):
    with pytest.raises(TamisError, match=message):
        run(config(texts, tiny, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{}, {"lora": True, "lora_dropout": 0.2, "eval_steps": 3}])
def test_the_same_command_makes_the_same_weights(tiny, texts, tmp_path, options):
    for name in ("one", "two"):
        run(config(texts, tiny, tmp_path / name, **options))
    assert_equal_weights(tmp_path / "one", tmp_path / "two")


def test_a_killed_run_goes_on_to_the_very_same_weights(tiny, texts, tmp_path):
    """Kill -9 in the middle of an epoch, twice; dropout, accumulation and evaluations are on, a second epoch begins."""
    options = {
        "lora": True, "lora_dropout": 0.1, "max_steps": 17, "save_steps": 3, "accumulate": 2, "batch_size": 2,
        "eval_steps": 4,
    }  # fmt: skip
    whole = run(config(texts, tiny, tmp_path / "whole", **options))
    assert 9 < whole.plan.steps_per_epoch < 17, "kills in the middle of an epoch, the end in the next one"
    killed = tmp_path / "killed"
    checkpoints = killed / "_tamis" / "checkpoints"
    for after in (3, 9):
        kill_after(checkpoints / f"checkpoint-{after}" / "COMPLETE", config(texts, tiny, killed, **options))
        assert not (killed / "_SUCCESS").exists()
    (checkpoints / "checkpoint-13").mkdir(parents=True)  # as a kill in the middle of saving leaves it
    (checkpoints / "checkpoint-13" / "adapter_model.safetensors").write_bytes(b"half")
    result = run(config(texts, tiny, killed, **options))
    assert result.resumed_from >= 9
    assert_equal_weights(tmp_path / "whole", killed)
    for figure in ("train_loss", "eval_loss", "eval_loss_before", "tokens_seen"):
        assert result.record["results"][figure] == whole.record["results"][figure]


def test_a_run_killed_after_its_last_step_takes_no_step_more(tiny, texts, tmp_path, monkeypatch):
    from models.training.session import Session

    run(config(texts, tiny, tmp_path / "whole"))
    with monkeypatch.context() as patched:
        patched.setattr(Session, "_publish", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(config(texts, tiny, tmp_path / "out"))
    assert run(config(texts, tiny, tmp_path / "out")).resumed_from == 6
    assert_equal_weights(tmp_path / "whole", tmp_path / "out")


def test_checkpointed_activations_change_nothing_but_memory(tiny, texts, tmp_path):
    import torch

    for name, wanted in (("plain", False), ("thrifty", True)):
        run(config(texts, tiny, tmp_path / name, lora=True, gradient_checkpointing=wanted))
    one, two = weights(tmp_path / "plain"), weights(tmp_path / "thrifty")
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_a_run_of_one_step_moves_the_weights(tiny, texts, tmp_path):
    result = run(config(texts, tiny, tmp_path / "out", max_steps=1))
    assert result.plan.warmup == 0
    before, after = weights(tiny), weights(tmp_path / "out")
    assert any(not after[name].equal(before[name]) for name in before)
    assert run(config(texts, tiny, tmp_path / "two", max_steps=2)).plan.warmup == 1


def test_a_tokenizer_with_several_chat_templates_is_saved_with_all_of_them(texts, tmp_path):
    from transformers import AutoTokenizer

    base = save_tiny_lm(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "rag": "{{ messages }} and documents"}
    tokenizer.save_pretrained(base)
    for seed in (0, 1):  # and over another model
        run(config(texts, str(base), tmp_path / "out", max_steps=1, seed=seed, overwrite=True))
    assert (tmp_path / "out" / "additional_chat_templates").stat().st_mode & 0o777 == 0o755
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == tokenizer.chat_template


def test_a_loss_that_is_no_number_stops_the_run(tiny, texts, tmp_path):
    with pytest.raises(FatalStepError, match="--learning-rate"):
        run(config(texts, tiny, tmp_path / "out", learning_rate=1e30, max_grad_norm=0))


def test_a_full_disk_is_said_in_one_line(tiny, texts, tmp_path, monkeypatch):
    from models.training import session

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session, "save_trained", full)
    with pytest.raises(OSError, match="No space"):
        run(config(texts, tiny, tmp_path / "out"))
    monkeypatch.setattr(session.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(FatalStepError, match="is full"):
        run(config(texts, tiny, tmp_path / "out"))


def test_a_finished_run_is_not_done_again(tiny, texts, tmp_path):
    run(config(texts, tiny, tmp_path / "out"))
    stamp = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    again = run(config(texts, tiny, tmp_path / "out", log_steps=3, save_steps=5))  # cosmetic changes only
    assert again.plan is None and again.record["kind"] == "full"
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == stamp


def test_another_run_needs_overwrite(tiny, texts, tmp_path):
    run(config(texts, tiny, tmp_path / "out"))
    with pytest.raises(OutputError, match="--overwrite"):
        run(config(texts, tiny, tmp_path / "out", seed=1))
    result = run(config(texts, tiny, tmp_path / "out", seed=1, overwrite=True, lora=True))
    assert result.record["kind"] == "adapter"
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_folder_of_something_else_is_left_alone(tiny, texts, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="something else"):
            run(config(texts, tiny, tmp_path / "out", overwrite=overwrite))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious.txt"]
    with pytest.raises(OutputError, match="local folder"):
        run(config(texts, tiny, "s3://bucket/out"))


def test_two_processes_do_not_train_into_one_folder(tiny, texts, tmp_path):
    from filelock import FileLock

    (tmp_path / "out" / "_tamis").mkdir(parents=True)
    with FileLock(tmp_path / "out" / "_tamis" / "lock"), pytest.raises(OutputError, match="another process"):
        run(config(texts, tiny, tmp_path / "out"))


def test_a_dry_run_prints_the_plan_and_writes_nothing(tiny, pairs, tmp_path, capsys):
    result = run(config(pairs, tiny, tmp_path / "out", dry_run=True, epochs=3, max_steps=0))
    assert not (tmp_path / "out").exists()
    assert result.plan.steps == 3 * result.plan.steps_per_epoch and result.plan.seconds > 0
    assert result.plan.examples + result.plan.held_out == 32
    printed = capsys.readouterr().out
    assert "32 rows in 2 shards" in printed and "tokens/s" in printed


def test_lineage_of_a_tamis_output_stands_in_the_record(tiny, pairs, tmp_path):
    (tmp_path / "job" / "data").mkdir(parents=True)
    Path(pairs, "a.parquet").rename(tmp_path / "job" / "data" / "a.parquet")
    manifest = {"job": "detox", "run_id": "run-7", "config_hash": "abc", "shards": [{"path": "a.parquet"}]}
    (tmp_path / "job" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="_SUCCESS"):
        run(config(str(tmp_path / "job"), tiny, tmp_path / "out"))
    (tmp_path / "job" / "_SUCCESS").write_text("run-7\n")
    result = run(config(str(tmp_path / "job"), tiny, tmp_path / "out", max_steps=1))
    assert result.record["data"]["lineage"]["run_id"] == "run-7"
    assert "run-7" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"text_column": "body"}, InputError, r"no column 'body' \(columns: source, target\)"),
        ({"text_column": "source", "messages_column": "m"}, InputError, "one form"),
        ({"prompt": "no-such-prompt"}, TamisError, "no prompt of that name"),
        ({"model": "gpt-17"}, ModelError, "no model 'gpt-17'"),
        ({"data": "nowhere"}, InputError, "no such input"),
        ({"max_length": 1024}, ModelError, "more than"),
        ({"max_length": 8}, InputError, "longer than --max-length"),
        ({"share_prefix": True, "packing": "off"}, TamisError, "needs --packing isolated"),
        ({"lora": True, "lora_targets": "nothing"}, ModelError, "--lora-targets"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(tiny, pairs, tmp_path, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        run(config(**{"data": pairs, "tiny": tiny, "output": tmp_path / "out", **changes}))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_eos_is_refused(pairs, tmp_path):
    save_tiny_lm(tmp_path / "mute", eos=False)
    with pytest.raises(ModelError, match="end-of-sequence"):
        run(config(pairs, str(tmp_path / "mute"), tmp_path / "out"))


def test_the_command_line(tiny, texts, tmp_path, capsys):
    output = tmp_path / "out"
    words = [texts, "--model", tiny, "--output", str(output), "--max-steps=2", "--max-length", "64", "--lora"]
    assert main([*words, "--threads", "1", "--no-dora"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("step 1/2  loss") and "left" in line for line in lines)
    assert main([*words, "--threads", "1", "--no-dora"]) == 0  # nothing to do
    assert main([*words, "--seed", "2"]) == OutputError.exit_code
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


@pytest.mark.slow
def test_two_processes_make_the_model_one_makes(tiny, texts, tmp_path):
    import torch

    words = [texts, "--model", tiny, "--max-length", "128", "--max-steps", "4", "--learning-rate", "0.01"]
    words += ["--eval-fraction", "0.1", "--device", "cpu", "--threads", "1"]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29533",
    ]
    command = [
        *launcher,
        "-m",
        "pipelines.train_lm",
        *words,
        "--output",
        str(tmp_path / "two"),
        "--batch-size",
        "2",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sum("step 1/4" in line for line in done.stderr.splitlines()) == 1
    assert main([*words, "--output", str(tmp_path / "one"), "--batch-size", "4"]) == 0
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    figures = [json.loads((tmp_path / name / "train.json").read_text())["results"] for name in ("one", "two")]
    assert figures[0]["eval_loss"] == pytest.approx(figures[1]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["d", "--no-such", "1"], "no option --no-such"),
        (["d", "e"], "one DATA"),
        (["d", "--model"], "needs a value"),
        (["d", "--model", "m"], "--output: Field required"),
        (["d", "--model", "m", "--output", "o", "--packing", "tight"], "--packing"),
        (["d", "--model", "m", "--output", "o", "--prompt-options", "x"], "JSON"),
    ],
)
def test_a_wrong_command_line_is_said_in_one_line(words, message):
    with pytest.raises(TamisError, match=message):
        parse(words)


def test_the_recorded_command_makes_the_same_configuration():
    settings = TrainLMConfig(
        data="in put", model="m", output="o", lora=True, share_prefix=False, prompt="p", prompt_options={"shots": 1},
        learning_rate=3e-4,
    )  # fmt: skip
    import shlex

    words = shlex.split(settings.command_line())
    assert words[:3] == ["tamis", "train", "lm"]
    again = parse(words[3:])
    assert again.model_copy(update={"command": ""}) == settings
