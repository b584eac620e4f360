"""The detox job as a user runs it: the command line, real scorers and encoder, a model server or the embedded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.lm.dummy_server import DummyOptions, DummyServer
from pipelines.cli import main
from pipelines.verify import verify_output
from transforms.edits import apply_edits, revert_edits

pytestmark = pytest.mark.models

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FEW = ["--temperatures", "0.6,1.0", "--per-temperature", "1", "--progress", "quiet"]


def tamis(*args: str) -> int:
    """Run the command line in this process; its exit code."""
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in args])
    return int(stopped.value.code or 0)


def edits_of(out: Path) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(f) for f in sorted((out / "edits").rglob("*.parquet"))])


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def copy_of_examples(folder: Path) -> Path:
    """The shard alone in a folder of its own."""
    folder.mkdir(parents=True)
    target = folder / "corpus.jsonl"
    target.write_bytes((EXAMPLES / "corpus.jsonl").read_bytes())
    return target


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Input and output of a run against a model server."""
    folder = tmp_path_factory.mktemp("served")
    source, out = copy_of_examples(folder / "in"), folder / "out"
    with DummyServer() as server:
        code = tamis("detox", source, "--output", out, "--model", f"openai:{server.url}#dummy", *FEW)
    assert code == 0
    return source, out


def test_every_change_is_on_record_and_can_be_undone(served: tuple[Path, Path]) -> None:
    source, out = served
    before, after = rows_of(source), rows_of(out / "data/corpus.jsonl")
    edits = edits_of(out)
    assert len(edits) > 5
    by_row = {row: edits.filter(pl.col("row") == row).to_dicts() for row in edits["row"].unique()}
    for row, (old, new) in enumerate(zip(before, after, strict=True)):
        assert {k: v for k, v in old.items() if k != "text"} == {k: v for k, v in new.items() if k != "text"}
        assert apply_edits(old["text"], by_row.get(row, [])) == new["text"]
        assert revert_edits(new["text"], by_row.get(row, [])) == old["text"]


def test_untouched_lines_come_back_byte_for_byte(served: tuple[Path, Path]) -> None:
    source, out = served
    changed = set(edits_of(out)["row"])
    pairs = zip(
        source.read_bytes().splitlines(True),
        (out / "data/corpus.jsonl").read_bytes().splitlines(True),
        strict=True,
    )
    assert all(old == new for row, (old, new) in enumerate(pairs) if row not in changed)


def test_nothing_the_gate_calls_toxic_is_left(served: tuple[Path, Path]) -> None:
    _, out = served
    after = pl.read_parquet(out / "attributes/toxicity_after/corpus.jsonl.parquet")
    assert after["value"].struct.field("score").max() < 0.5


def test_verify_finds_it_sound_and_finds_a_tampered_byte(served: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = served
    verdict = verify_output(str(out))
    assert verdict.problems == [] and verdict.compared and verdict.edited_rows > 5
    shard = out / "data/corpus.jsonl"
    whole = shard.read_bytes()
    try:
        shard.write_bytes(whole.replace(b"e", b"3", 1))
        assert any("sha256" in p for p in verify_output(str(out)).problems)
    finally:
        shard.write_bytes(whole)
    assert tamis("verify", out) == 0


def test_the_report_and_the_card_are_there_and_models_are_on_record(served: tuple[Path, Path]) -> None:
    _, out = served
    assert "<html" in (out / "report.html").read_text()
    assert (out / "README.md").exists() and (out / "_SUCCESS").exists()
    manifest = json.loads((out / "manifest.json").read_text())
    assert {m["name"] for m in manifest["models"]} >= {"jigsaw-bilstm", "minilm", "linear", "lexicon"}
    assert all(m["revision"] for m in manifest["models"])


def test_parquet_comes_back_as_parquet_with_its_schema(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    table = pq.read_table(EXAMPLES / "corpus.parquet")
    pq.write_table(table, source / "a.parquet", compression="zstd", row_group_size=10)
    with DummyServer() as server:
        assert (
            tamis("detox", source, "-o", tmp_path / "out", "--model", f"openai:{server.url}#dummy", *FEW) == 0
        )
    written = pq.read_table(tmp_path / "out/data/a.parquet")
    assert written.schema.equals(table.schema, check_metadata=True)
    others = [c for c in table.schema.names if c != "text"]
    assert written.select(others).equals(table.select(others))
    assert not written.column("text").equals(table.column("text"))
    assert verify_output(str(tmp_path / "out")).problems == []


def test_another_threshold_pays_for_no_answer_twice(tmp_path: Path) -> None:
    source = copy_of_examples(tmp_path / "in")
    with DummyServer() as server:
        common = [source, "-o", tmp_path / "out", "--model", f"openai:{server.url}#dummy", *FEW]
        assert tamis("detox", *common) == 0
        paid = server.stats.answered
        assert tamis("detox", *common, "--min-similarity", "0.9") == 4  # other settings: refused
        assert tamis("detox", *common, "--min-similarity", "0.9", "--overwrite") == 0
        assert server.stats.answered == paid
        assert tamis("detox", *common, "--min-similarity", "0.9") == 0  # nothing left to do
        assert server.stats.answered == paid


def test_shards_and_workers_change_nothing(tmp_path: Path) -> None:
    rows = rows_of(EXAMPLES / "corpus.jsonl")
    (tmp_path / "one").mkdir()
    pq.write_table(
        pa.table({"id": [r["id"] for r in rows], "text": [r["text"] for r in rows]}),
        tmp_path / "one/a.parquet",
    )
    (tmp_path / "seven").mkdir()
    for i in range(7):
        part = rows[i * len(rows) // 7 : (i + 1) * len(rows) // 7]
        table = pa.table({"id": [r["id"] for r in part], "text": [r["text"] for r in part]})
        pq.write_table(table, tmp_path / f"seven/{i}.parquet")
    results = []
    with DummyServer() as server:
        for name, workers in (("one", 1), ("seven", 2)):
            out = tmp_path / f"out-{name}"
            args = [
                "--model",
                f"openai:{server.url}#dummy",
                "--id-column",
                "id",
                "--workers",
                str(workers),
                *FEW,
            ]
            assert tamis("detox", tmp_path / name, "-o", out, *args) == 0
            data = pl.concat([pl.read_parquet(f) for f in sorted((out / "data").glob("*.parquet"))])
            edits = edits_of(out).drop("shard", "row").sort("id", "start")
            results.append((data.sort("id").to_dicts(), edits.to_dicts()))
        assert server.stats.answered > 0
    assert results[0] == results[1]


def test_requests_that_fail_for_good_kill_their_rows_only_and_retry_replays_them(tmp_path: Path) -> None:
    source = copy_of_examples(tmp_path / "in")
    out = tmp_path / "out"
    # What is refused is told by its text: each request is a call a temperature, under way at once, and one that fails
    # by its number would fail now with its sibling, now without (whose answer would then be paid for again).
    with DummyServer(DummyOptions(refused="moron")) as server:
        model = f"openai:{server.url}#dummy"
        code = tamis("detox", source, "-o", out, "--model", model, *FEW)
        assert code == 0
        manifest = json.loads((out / "manifest.json").read_text())
        dead = manifest["totals"]["rows_dead"]
        table = pl.read_parquet(out / "dead/corpus.jsonl.parquet")
        assert table["stage"].unique().to_list() == ["RewriteToxicSegments"]
        expected = {line for line in source.read_bytes().splitlines(True) if b"moron" in line}
        assert len(expected) > 2 and set(table["raw"]) == expected
        assert manifest["totals"]["rows_kept"] + dead == len(rows_of(source))
        server.options = DummyOptions()
        assert tamis("retry", out, "--progress", "quiet") == 0
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["totals"]["rows_dead"] == 0
        assert server.stats.repeated == 0
    assert not (out / "dead").exists() or not list((out / "dead").rglob("*.parquet"))
    assert verify_output(str(out)).problems == []


def test_max_dead_stops_the_run_with_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy_of_examples(tmp_path / "in")
    with DummyServer(DummyOptions(faults=dict.fromkeys(range(200), "400"))) as server:
        args = ["--model", f"openai:{server.url}#dummy", "--max-dead", "0", *FEW]
        assert tamis("detox", source, "-o", tmp_path / "out", *args) == 6
    assert "--max-dead is 0" in capsys.readouterr().err
    assert not (tmp_path / "out/_SUCCESS").exists()


def test_a_server_that_is_not_there_is_one_line_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy_of_examples(tmp_path / "in")
    code = tamis("detox", source, "-o", tmp_path / "out", "--model", "openai:http://127.0.0.1:9/v1#x", *FEW)
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 5 and len(lines) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--set", "gate.tau=2"], 2, "gate.tau"),
        (["--set", "gate.typo=1"], 2, "gate.typo"),
        (["--text-column", "nope"], 3, "--text-column"),
        (["--scorer", "hf:./no-such-folder"], 5, "no-such-folder"),
        (["--adapter", "no-such-adapter"], 5, "no-such-adapter"),
    ],
)
def test_mistakes_are_one_line_that_says_what_to_do(
    args: list[str], code: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy_of_examples(tmp_path / "in")
    assert tamis("detox", source, "-o", tmp_path / "out", *FEW, *args) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and says in lines[0]


def test_a_dry_run_plans_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = copy_of_examples(tmp_path / "in")
    assert tamis("detox", source, "-o", tmp_path / "out", "--dry-run") == 0
    assert "would read 44 rows" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_settings_come_from_a_file_and_options_win(tmp_path: Path) -> None:
    from pipelines.detox import load_settings, make_config

    file = tmp_path / "detox.toml"
    file.write_text('scorer = "linear"\n[gate]\ntau = 0.3\n[accept]\nladder = ["redact"]\n')
    settings = load_settings(file, {"gate.tau": 0.4}, ["accept.redaction=[...]", "seed=7"])
    config = make_config({**settings, "input": "a", "output": "b"})
    assert (config.scorer, config.gate.tau, config.accept.redaction, config.seed) == (
        "linear",
        0.4,
        "[...]",
        7,
    )
    assert config.accept.ladder == ("redact",)


def test_the_embedded_rewriter_end_to_end(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    texts = ["The soup was fine. You are an idiot.", "Nothing wrong here.", None, ""]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    assert tamis("detox", folder, "-o", tmp_path / "out", *FEW) == 0
    after = [r["text"] for r in rows_of(tmp_path / "out/data/a.jsonl")]
    assert after[1:] == texts[1:]
    assert after[0].startswith("The soup was fine. ") and "idiot" not in after[0]
    edit = edits_of(tmp_path / "out").to_dicts()[0]
    assert (edit["start"], edit["before"]) == (19, "You are an idiot.")
    assert edit["toxicity_after"] < 0.5 < edit["toxicity_before"]


def test_contrastive_decoding_needs_a_toxic_model_and_records_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from models import store

    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps({"text": "You are an idiot."}) + "\n")
    assert tamis("detox", folder, "-o", tmp_path / "out", *FEW, "--decoding", "logratio") == 3
    assert "too few to train a toxic model on" in capsys.readouterr().err  # one insult is not a tone
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(store.path("smollm2"))
    settings = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(base, settings).save_pretrained(tmp_path / "toxic")
    args = ["--decoding", "logratio", "--toxic-adapter", str(tmp_path / "toxic")]
    assert tamis("detox", folder, "-o", tmp_path / "out", *FEW, *args) == 0
    lm = next(
        m for m in json.loads((tmp_path / "out/manifest.json").read_text())["models"] if m["kind"] == "lm"
    )
    assert lm["extra"]["decoding"]["mode"] == "logratio" and lm["extra"]["toxic_revision"]
    assert edits_of(tmp_path / "out")["model"][0] == f"{lm['name']}@{lm['revision']}"
