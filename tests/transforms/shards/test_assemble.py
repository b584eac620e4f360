"""Assemble and finish: sidecars stand beside their rows, counts are true, and nothing stale is left."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas import flight
from schemas.edits import EDIT_SCHEMA
from schemas.errors import OutputError
from tests.helpers import (
    Drop,
    Fail,
    Keep,
    Replace,
    files_below,
    in_flight,
    read_output,
    read_texts,
    run_plainly,
    sample_corpus,
    sample_texts,
    write_jsonl,
    write_parquet,
)
from transforms.shards.files import Folder
from transforms.shards.finish import finish_output
from transforms.shards.formats import AssembleOptions, UnitLimits
from transforms.shards.keys import ShardKey
from transforms.shards.plan import load_plan, plan_key
from transforms.shards.receipts import (
    ORIGINAL,
    Receipt,
    commit_unit,
    load_unit,
    read_receipts,
    receipt_name,
    remove_receipts,
    total,
    unit_name,
)

STEPS = [Drop(), Fail(), Replace()]
SMALL = UnitLimits(rows=7)


@pytest.fixture
def corpus(tmp_path):
    return sample_corpus(tmp_path / "in")


def test_every_edit_is_a_row_that_says_where(corpus, tmp_path):
    write_parquet(corpus / "two.parquet", ["x idiot", "fine", "idiot y"])
    run_plainly(corpus, tmp_path / "out", STEPS, limits=UnitLimits(2), id_column="doc")
    table = pq.read_table(tmp_path / "out" / "edits" / "two.parquet")
    assert table.schema == EDIT_SCHEMA
    assert table.select(["shard", "row", "id", "start", "before", "after"]).to_pylist() == [
        {"shard": "two.parquet", "row": 0, "id": "d0", "start": 2, "before": "idiot", "after": "person"},
        {"shard": "two.parquet", "row": 2, "id": "d2", "start": 0, "before": "idiot", "after": "person"},
    ]


def test_attributes_stand_row_for_row_beside_data(corpus, tmp_path):
    manifest, _ = run_plainly(corpus, tmp_path / "out", STEPS, limits=SMALL, id_column="doc")
    for entry in manifest["shards"]:
        side = entry["path"] if entry["path"].endswith(".parquet") else entry["path"] + ".parquet"
        attribute = pq.read_table(tmp_path / "out" / "attributes" / "hits" / side)
        assert attribute.schema.names == ["id", "row", "value"]
        path = tmp_path / "out" / "data" / entry["path"]
        if path.suffix == ".jsonl":
            ids = [json.loads(line)["doc"] for line in path.read_text().splitlines()]
        else:
            ids = pq.read_table(path).column("doc").to_pylist()
        assert attribute.column("id").to_pylist() == ids
        before = read_texts(corpus / entry["path"])
        assert attribute.column("value").to_pylist() == [
            before[r].count("idiot") for r in attribute.column("row").to_pylist()
        ]


def test_attributes_of_a_shard_no_row_of_which_is_left(tmp_path):
    write_jsonl(tmp_path / "in" / "a.jsonl", ["spam", "spam"])
    manifest, _ = run_plainly(tmp_path / "in", tmp_path / "out", [Replace(), Drop()])
    assert (tmp_path / "out" / "data" / "a.jsonl").read_bytes() == b""
    assert pq.read_table(tmp_path / "out" / "attributes" / "hits" / "a.jsonl.parquet").num_rows == 0
    assert manifest["totals"]["rows_kept"] == 0 and manifest["totals"]["rows_dropped"] == 2


def test_dropped_and_dead_rows_stand_whole_with_their_reasons(tmp_path):
    write_jsonl(tmp_path / "in" / "a.jsonl", ["fine", "spam", "idiot", "poison", "spam poison"])
    run_plainly(tmp_path / "in", tmp_path / "out", [Replace(), *STEPS], limits=UnitLimits(2), id_column="doc")
    dropped, dead = (
        pq.read_table(tmp_path / "out" / f / "a.jsonl.parquet").to_pylist() for f in ("dropped", "dead")
    )
    assert [(r["shard"], r["row"], r["id"], r["stage"], r["reason"], r["error"]) for r in dropped] == [
        ("a.jsonl", 1, "d1", "DropRows", "is_spam", None),
        ("a.jsonl", 4, "d4", "DropRows", "is_spam", None),
    ]
    assert [(r["row"], r["id"], r["stage"], r["reason"], r["error"]) for r in dead] == [
        (3, "d3", "FailOnWord", None, "ValueError: cannot take 'poison'")
    ]
    lines = (tmp_path / "in" / "a.jsonl").read_bytes().splitlines(keepends=True)
    assert [r["raw"] for r in dropped] == [lines[1], lines[4]] and dead[0]["raw"] == lines[3]
    assert dead[0]["attribute.hits"] == 0  # what was known of it before it died


def test_columns_that_share_a_name_with_ours_are_kept_apart(tmp_path):
    (tmp_path / "in").mkdir()
    table = pa.table(
        {"text": ["spam"], "row": ["mine"], "id": [5], "error": ["none"], "reason": [None], "shard": [1.5]}
    )
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    run_plainly(tmp_path / "in", tmp_path / "out", [Drop()])
    (row,) = pq.read_table(tmp_path / "out" / "dropped" / "a.parquet").to_pylist()
    assert (row["row"], row["source.row"]) == (0, "mine")
    assert (row["id"], row["source.id"]) == ("a.parquet#0", 5)
    assert (row["shard"], row["source.shard"]) == ("a.parquet", 1.5)


def test_duplicate_ids_are_counted_across_units(tmp_path):
    (tmp_path / "in").mkdir()
    table = pa.table({"text": ["t"] * 7, "doc": ["a", "b", "a", None, "c", "a", "b"]})
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    for rows in (1, 2, 100):
        manifest, _ = run_plainly(
            tmp_path / "in", tmp_path / f"out{rows}", [Keep()], limits=UnitLimits(rows), id_column="doc"
        )
        assert manifest["shards"][0]["duplicate_ids"] == 3
    manifest, _ = run_plainly(tmp_path / "in", tmp_path / "numbered", [Keep()])
    assert manifest["shards"][0]["duplicate_ids"] == 0


def test_the_manifest_is_true(corpus, tmp_path):
    out = tmp_path / "out"
    manifest, plan = run_plainly(corpus, out, STEPS, limits=SMALL)
    texts = sample_texts(120) * 2
    assert [e["path"] for e in manifest["shards"]] == [s.name for s in plan.shards]
    for entry in manifest["shards"]:
        content = (out / "data" / entry["path"]).read_bytes()
        assert entry["bytes"] == len(content) and entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["rows_in"] == entry["rows_kept"] + entry["rows_dropped"] + entry["rows_dead"] == 60
        assert entry["rows_kept"] == len(read_texts(out / "data" / entry["path"]))
    count = Counter(w for t in texts for w in ("spam", "poison", "idiot") if w in t)
    totals = manifest["totals"]
    assert totals["rows_in"] == 240
    assert (totals["rows_dropped"], totals["rows_dead"], totals["rows_changed"], totals["edits"]) == (
        count["spam"], count["poison"], count["idiot"], count["idiot"],
    )  # fmt: skip
    assert totals["bytes"] == sum(e["bytes"] for e in manifest["shards"])
    counters = manifest["counters"]
    assert counters["DropRows.rows_in"] == 240
    assert counters["DropRows.rows_out"] == counters["FailOnWord.rows_in"] == 240 - count["spam"]
    assert counters["FailOnWord.rows_out"] == counters["ReplaceWord.rows_out"] == totals["rows_kept"]
    assert counters["FailOnWord.dead"] == count["poison"] and counters["replace.tokens_out"] == count["idiot"]
    assert manifest["outputs"] == {
        "data": "data",
        "edits": True,
        "attributes": ["hits"],
        "dropped": True,
        "dead": True,
    }
    assert json.loads((out / "manifest.json").read_text()) == json.loads(orjson.dumps(manifest))
    assert (out / "_SUCCESS").exists()


def test_a_row_that_was_changed_and_then_removed_was_not_changed(tmp_path):
    write_jsonl(tmp_path / "in" / "a.jsonl", ["idiot spam", "idiot poison", "idiot", "spam"])
    manifest, _ = run_plainly(tmp_path / "in", tmp_path / "out", [Replace(), Drop(), Fail()])
    assert manifest["totals"]["rows_changed"] == 1
    assert read_texts(tmp_path / "out" / "data" / "a.jsonl") == ["person"]


def test_units_give_the_same_output_whatever_their_size(corpus, tmp_path):
    outputs = []
    for i, limits in enumerate([UnitLimits(), UnitLimits(3), UnitLimits(50, 300)]):
        run_plainly(corpus, tmp_path / str(i), STEPS, limits=limits, id_column="doc")
        outputs.append(read_output(tmp_path / str(i)))
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize("shards", [1, 7])
def test_shards_give_the_same_rows_whatever_their_number(tmp_path, shards):
    texts = sample_texts(70)
    for i in range(shards):
        n = len(texts) // shards
        write_parquet(tmp_path / "in" / f"{i}.parquet", texts[i * n : (i + 1) * n])
    run_plainly(tmp_path / "in", tmp_path / "out", STEPS)
    got = [t for p in sorted((tmp_path / "out" / "data").iterdir()) for t in read_texts(p)]
    assert got == [t.replace("idiot", "person") for t in texts if "spam" not in t and "poison" not in t]


# ---------------------------------------------------------------------------------------------------------- again


def test_nothing_is_left_of_a_shard_the_input_no_longer_has(corpus, tmp_path):
    out = tmp_path / "out"
    run_plainly(corpus, out, STEPS)
    for name in ("part-0.parquet", "more/part-1.jsonl"):
        (corpus / name).unlink()
    run_plainly(corpus, out, STEPS)
    fresh = tmp_path / "fresh"
    run_plainly(corpus, fresh, STEPS)
    assert read_output(out) == read_output(fresh)


def test_a_shard_named_json_goes_as_well_and_a_companion_stays(tmp_path):
    for name in ("a.json", "b.jsonl"):
        write_jsonl(tmp_path / "in" / name, ["fine"])
    (tmp_path / "in" / "dataset_info.json").write_text("{}")
    run_plainly(tmp_path / "in", tmp_path / "out", [Keep()])
    assert set(files_below(tmp_path / "out" / "data")) == {"a.json", "b.jsonl", "dataset_info.json"}
    (tmp_path / "in" / "a.json").unlink()
    run_plainly(tmp_path / "in", tmp_path / "out", [Keep()])
    assert set(files_below(tmp_path / "out" / "data")) == {"b.jsonl", "dataset_info.json"}


def test_sidecars_of_rows_that_are_fine_now_go(tmp_path):
    path, out = tmp_path / "in" / "a.jsonl", tmp_path / "out"
    write_jsonl(path, ["spam", "poison", "idiot"])
    write_jsonl(tmp_path / "in" / "b.jsonl", ["fine"])
    run_plainly(tmp_path / "in", out, STEPS)
    assert {p.split("/")[0] for p in files_below(out)} >= {"dropped", "dead", "edits"}
    write_jsonl(path, ["fine"])
    run_plainly(tmp_path / "in", out, STEPS)
    fresh = tmp_path / "fresh"
    run_plainly(tmp_path / "in", fresh, STEPS)
    assert read_output(out) == read_output(fresh)


def test_nothing_is_left_of_a_shard_that_cannot_be_read_any_more(tmp_path):
    write_parquet(tmp_path / "in" / "a.parquet", ["spam", "poison", "idiot"])
    write_parquet(tmp_path / "in" / "b.parquet", ["fine"])
    run_plainly(tmp_path / "in", tmp_path / "out", STEPS)
    (tmp_path / "in" / "a.parquet").write_bytes(b"PAR1 and then nothing")
    run_plainly(tmp_path / "in", tmp_path / "out", STEPS)
    run_plainly(tmp_path / "in", tmp_path / "fresh", STEPS)
    assert read_output(tmp_path / "out") == read_output(tmp_path / "fresh")


def test_parts_of_a_killed_run_are_cleared_away(corpus, tmp_path):
    left = tmp_path / "out" / "_tamis" / "tmp" / "0123-part-0.parquet"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    run_plainly(corpus, tmp_path / "out", STEPS)
    assert not left.exists()


def test_an_assembled_shard_is_left_alone_unless_something_differs(corpus, tmp_path):
    out = tmp_path / "out"
    path = out / "data" / "part-0.parquet"

    def made_again(steps, **options):
        before = path.stat().st_ino
        run_plainly(corpus, out, steps, options=AssembleOptions(**options))
        return path.stat().st_ino != before

    run_plainly(corpus, out, [Keep()])
    assert not made_again([Keep()])
    assert made_again([Keep()], compression="zstd")
    assert not made_again([Keep()], compression="zstd")
    assert made_again([Keep()])
    assert made_again([Replace()])
    path.unlink()
    run_plainly(corpus, out, [Replace()])
    assert path.exists()


def test_a_report_that_fails_does_not_undo_the_run(corpus, tmp_path):
    run_plainly(corpus, tmp_path / "out", [Keep()])
    output = Folder(str(tmp_path / "out"))
    plan = load_plan(output)
    entries = json.loads(output.read("manifest.json"))["shards"]

    def hook(url):
        raise RuntimeError(f"no paper in {Path(url).name}")

    output.remove("_SUCCESS")
    manifest = finish_output(Folder(str(corpus)), output, plan, entries, [], {"job": "test"}, hook)
    assert manifest["report_error"] == "RuntimeError: no paper in out"
    assert (
        output.exists("_SUCCESS")
        and json.loads(output.read("manifest.json"))["report_error"] == manifest["report_error"]
    )


def test_a_shard_of_the_plan_without_an_entry_is_not_passed_over(corpus, tmp_path):
    manifest, plan = run_plainly(corpus, tmp_path / "out", [Keep()])
    output = Folder(str(tmp_path / "out"))
    output.remove("_SUCCESS")
    with pytest.raises(RuntimeError, match="1 shards were not assembled"):
        finish_output(Folder(str(corpus)), output, plan, manifest["shards"][1:], [], {"job": "test"})
    assert not output.exists("_SUCCESS")


# -------------------------------------------------------------------------------------------------------- receipts


def committed(tmp_path):
    write_parquet(tmp_path / "in" / "a.parquet", ["idiot", "spam", "poison", "fine"])
    _, plan = run_plainly(tmp_path / "in", tmp_path / "out", STEPS, limits=UnitLimits(2))
    return Folder(str(tmp_path / "out")), plan


def test_a_receipt_says_what_became_of_the_unit(tmp_path):
    output, plan = committed(tmp_path)
    first, second = (read_receipts(output, plan, "test")["a.parquet", i] for i in (0, 1))
    assert (first.rows, first.kept, first.dropped, first.dead, first.changed, first.edits) == (
        2,
        1,
        1,
        0,
        1,
        1,
    )
    assert (second.rows, second.kept, second.dropped, second.dead, second.changed) == (2, 1, 0, 1, 0)
    assert Receipt.loads(first.dumps()) == first
    sums = total([first, second])
    assert (sums["rows"], sums["kept"], sums["dead"], sums["edits"]) == (4, 2, 1, 1)
    assert sums["counters"]["DropRows.rows_in"] == 4


def test_a_unit_holds_the_new_text_and_no_other(tmp_path):
    output, plan = committed(tmp_path)
    receipts = read_receipts(output, plan, "test")
    unit = load_unit(output, receipts["a.parquet", 0])
    assert unit.column("_tamis.text").to_pylist() == ["person", None]
    assert not [n for n in unit.schema.names if n.startswith(flight.SCRATCH_PREFIX)]
    assert "text" not in unit.schema.names


def test_receipts_of_another_configuration_or_another_input_are_not_good(tmp_path):
    output, plan = committed(tmp_path)
    assert len(read_receipts(output, plan, "test")) == 2
    assert read_receipts(output, plan, "another") == {}
    write_parquet(tmp_path / "in" / "a.parquet", ["other", "texts", "of", "four"])
    _, changed = run_plainly(tmp_path / "in", tmp_path / "elsewhere", [Keep()], limits=UnitLimits(2))
    assert read_receipts(output, changed, "test") == {}


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b'{"shard": "a.parquet"}', b"\xff" * 10])
def test_a_damaged_receipt_is_no_receipt(tmp_path, content):
    output, plan = committed(tmp_path)
    output.write(receipt_name("a.parquet", 0), content)
    assert set(read_receipts(output, plan, "test")) == {("a.parquet", 1)}


def test_a_receipt_without_its_unit_is_no_receipt(tmp_path):
    output, plan = committed(tmp_path)
    output.remove(unit_name("a.parquet", 1))
    assert set(read_receipts(output, plan, "test")) == {("a.parquet", 0)}


def test_a_damaged_unit_is_found_out(tmp_path):
    output, plan = committed(tmp_path)
    receipts = read_receipts(output, plan, "test")
    content = bytearray(output.read(unit_name("a.parquet", 1)))
    content[len(content) // 2] ^= 1
    output.write(unit_name("a.parquet", 1), bytes(content))
    with pytest.raises(OutputError, match=r"a.parquet/000001.arrow is damaged.*run the same command again"):
        load_unit(output, receipts["a.parquet", 1])
    assert set(read_receipts(output, plan, "test")) == {("a.parquet", 0)}  # so the next run mends it


def test_forgotten_units_are_done_again(tmp_path):
    output, plan = committed(tmp_path)
    receipts = read_receipts(output, plan, "test")
    remove_receipts(output, [receipts["a.parquet", 0]])
    assert set(read_receipts(output, plan, "test")) == {("a.parquet", 1)}


def test_a_unit_committed_twice_is_there_once(tmp_path):
    """A runner may try a bundle again after it has committed."""
    output, plan = committed(tmp_path)
    batch = in_flight(["a", "b"])
    batch = flight.set_scratch(batch, ORIGINAL, batch.column("text"))
    key = ShardKey("a.parquet", 0, 0)
    one, two = (commit_unit(output, key, batch, "text", plan_key(plan.shards[0], "test")) for _ in range(2))
    assert one == two and read_receipts(output, plan, "test")["a.parquet", 0] == one
