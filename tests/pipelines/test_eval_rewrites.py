"""`tamis eval rewrites`: systems from columns, files and outputs of tamis, side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.eval_rewrites import RewritesEvalConfig, run
from schemas.errors import InputError, ModelError, TamisError
from tests.models.test_encoders import save_encoder
from tests.models.tiny_classifier import save_classifier
from tests.pipelines.sample_output import build_output
from transforms.shards.finish import SUCCESS

ROWS = [
    ("you are an idiot .", "you are not so good .", "you are not nice ."),
    ("the committee is so stupid", "the committee is very bad", None),
    ("thank you for the tea", "thank you for the tea", ""),
    ("you stupid moron !", "", "stupid"),
    ("the train was stupid . the garden is lovely .", "the train was bad . the garden is lovely .", "the train was not good ."),
]  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("parts")
    return {
        "encoder": f"hf:{save_encoder(folder / 'encoder')}",
        "judge": f"hf:{save_classifier(folder / 'judge', seed=4)}",
        "cola": f"hf:{save_classifier(folder / 'cola', labels=('unacceptable', 'acceptable'), seed=5)}",
    }


@pytest.fixture
def pairs(tmp_path) -> Path:
    path = tmp_path / "pairs.parquet"
    table = {"id": ["a", "b", "c", "d", "e"], "toxic": [r[0] for r in ROWS], "ours": [r[1] for r in ROWS]}
    pq.write_table(pa.table(table | {"neutral1": [r[2] for r in ROWS]}), path)
    return path


def config(tmp_path, parts, **changes) -> RewritesEvalConfig:
    settings = {
        "output": str(tmp_path / "eval"), "encoder": parts["encoder"], "judge": parts["judge"], "fluency": parts["cola"],
        "classifier": "lexicon", "draws": 200, "progress": "quiet", **changes,
    }  # fmt: skip
    return RewritesEvalConfig(**settings)


def test_columns_and_built_in_systems_side_by_side(tmp_path, parts, pairs):
    settings = config(tmp_path, parts, inputs=(str(pairs),), systems={"ours": "ours"})
    result = run(settings)
    assert list(result.systems) == ["copy", "delete", "lexicon-mask", "sentence-drop", "ours", "human"]
    assert result.against == "ours" and set(result.changes) == set(result.systems) - {"ours"}
    assert (
        result.systems["copy"].metrics["SIM"].mean == pytest.approx(1) and result.systems["copy"].copied == 1
    )
    ours = result.measures["ours"]
    assert ours.empty.tolist() == [False, False, False, True, False]
    assert ours.sim[3] == ours.fl[3] == ours.joint[3] == 0
    assert result.systems["human"].chrf is None and result.systems["copy"].chrf is not None
    out = Path(settings.output)
    record = json.loads((out / "results.json").read_text())
    assert (
        (out / "_SUCCESS").exists()
        and record["rows_with_references"] == 3
        and record["references"] == ["neutral1"]
    )
    assert record["judging"]["shared"] == [] and record["models"]["judge"]["name"] == parts["judge"]
    sentences = pq.read_table(out / "sentences.parquet").to_pylist()
    assert len(sentences) == 5 * 5 + 3
    for row in sentences:
        assert row["j"] == pytest.approx(row["sta"] * row["sim"] * row["fl"]) and 0 <= row["sim"] <= 1
    dropped = {r["row"]: r["output"] for r in sentences if r["system"] == "sentence-drop"}
    assert dropped[4] == "the garden is lovely ." and dropped[3] == ""
    page = (out / "report.html").read_text()
    assert "Reveal all texts" in page and "ours" in page


def test_adding_a_system_costs_only_that_system(tmp_path, parts, pairs, monkeypatch):
    base = run(config(tmp_path, parts, inputs=(str(pairs),), human=False))
    asked: list[str] = []
    from models.scorers.sequence import SequenceScorer

    score = SequenceScorer.score
    monkeypatch.setattr(
        SequenceScorer, "score", lambda self, texts: asked.extend(texts) or score(self, texts)
    )
    again = run(config(tmp_path, parts, inputs=(str(pairs),), systems={"ours": "ours"}, human=False))
    assert asked and set(asked) <= {r[1] for r in ROWS}
    for name, figures in base.systems.items():
        assert again.systems[name] == figures


def test_files_are_joined_by_row_or_by_id(tmp_path, parts, pairs):
    rows = [("e", ROWS[4][1]), ("a", ROWS[0][1]), ("b", ROWS[1][1])]
    (tmp_path / "theirs.jsonl").write_text(
        "".join(json.dumps({"id": i, "output": t}) + "\n" for i, t in rows)
    )
    theirs = str(tmp_path / "theirs.jsonl")
    settings = config(
        tmp_path, parts, inputs=(str(pairs),), systems={"theirs": theirs}, built_in=(), human=False
    )
    with pytest.raises(InputError, match="has 3 rows"):
        run(settings)
    result = run(settings.model_copy(update={"id_column": "id"}))
    assert result.missing == {"theirs": 2}
    assert result.measures["theirs"].empty.tolist() == [False, False, True, True, False]
    common = run(settings.model_copy(update={"id_column": "id", "common": True}))
    assert common.rows == 3 and common.missing == {"theirs": 0}
    assert common.measures["theirs"].sim.tolist() == result.measures["theirs"].sim[[0, 1, 4]].tolist()


def test_an_output_of_tamis_is_a_system_and_its_input_the_sources(tmp_path, parts):
    made = build_output(tmp_path / "out", shards=("part-0.jsonl",), rows=30)
    (made.path / SUCCESS).touch()
    source = tmp_path / "corpus"
    source.mkdir()
    (source / "part-0.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in made.before))
    manifest = json.loads((made.path / "manifest.json").read_text())
    manifest["input"]["root"] = str(source)
    (made.path / "manifest.json").write_text(json.dumps(manifest))
    result = run(config(tmp_path, parts, systems={"detox": str(made.path)}, built_in=("copy",)))
    assert result.rows == len(made.before) and result.missing["detox"] == made.dropped + made.dead
    assert 0 < result.systems["detox"].copied < 1 == result.systems["copy"].copied
    same = run(
        config(tmp_path, parts, inputs=(str(source),), systems={"detox": str(made.path)}, built_in=("copy",))
    )
    assert same.systems == result.systems
    # More rows than the job saw, in another order: joined by text.
    more = tmp_path / "more.jsonl"
    lines = [json.dumps({"text": t}) for t in (*reversed(made.before), "the train was not good .")]
    more.write_text("\n".join(lines))
    settings = config(
        tmp_path, parts, inputs=(str(more),), systems={"detox": str(made.path)}, built_in=("copy",)
    )
    wide, common = run(settings), run(settings.model_copy(update={"common": True}))
    assert wide.rows == common.rows + 1 == len(made.before) + 1
    assert wide.missing["detox"] >= common.missing["detox"] + 1


def test_a_judge_that_ranked_is_refused_unless_told_so(tmp_path, parts, pairs):
    left = run(config(tmp_path, parts, inputs=(str(pairs),), classifier=parts["judge"]))
    assert "sentence-drop" not in left.systems and "makes it" in left.left_out["sentence-drop"]
    built_in = ("copy", "sentence-drop")
    settings = config(tmp_path, parts, inputs=(str(pairs),), classifier=parts["judge"], built_in=built_in)
    with pytest.raises(TamisError, match="judge must not be the ranker"):
        run(settings)
    result = run(settings.model_copy(update={"allow_shared_judge": True}))
    assert "not independent" in result.note
    assert "not independent" in (tmp_path / "eval" / "report.html").read_text()


@pytest.mark.parametrize("way", ["folder", "data", "file", "column"])
def test_a_judge_is_refused_where_it_ranked_and_the_default_finds_one_that_did_not(tmp_path, parts, way):
    made = build_output(tmp_path / "made", shards=("part-0.jsonl",), rows=12).path
    shard = made / "data" / "part-0.jsonl"
    (tmp_path / "plain.jsonl").write_bytes(shard.read_bytes())
    places = {
        "folder": made,
        "data": made / "data",
        "file": f"{shard}#text",
        "glob": made / "data" / "*.jsonl",
    }
    settings = config(
        tmp_path,
        parts,
        inputs=(str(shard if way == "column" else tmp_path / "plain.jsonl"),),
        systems={"ours": str(places.get(way, "text"))},
        judge="auto",
        built_in=(),
        limit=2,
    )
    manifest = made / "manifest.json"
    record = json.loads(manifest.read_text())

    def judged(judge: str, *rankers: tuple[str, str, str]) -> str:
        models = [
            {"name": name, "kind": "scorer", "revision": "zz", "role": role, "training_data": data}
            for name, role, data in rankers
        ]
        manifest.write_text(json.dumps(record | {"models": models}))
        result = run(settings.model_copy(update={"judge": judge}))
        assert (
            result.note == "" and result.record["config"]["judge"] == result.record["models"]["judge"]["name"]
        )
        return result.record["config"]["judge"]

    for judge in ("linear", "auto"):
        with pytest.raises(TamisError, match="linear ranked the training data"):
            judged(judge, ("linear", "ranker", "davidson+jigsaw-2018"))
        with pytest.raises(TamisError, match="linear was the gate"):
            judged(judge, ("jigsaw-bilstm", "ranker", "jigsaw-2018"), ("linear", "gate", "davidson"))
    assert judged("auto", ("hf:own", "ranker", "dghs")) == "linear"
    # What opened the gate does not judge; what only learnt from the same data as it may.
    assert (
        judged("auto", ("hf:own", "ranker", "davidson"), ("linear", "gate", "jigsaw-2018")) == "jigsaw-bilstm"
    )


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"systems": {"x": "nowhere"}}, InputError, "neither a column"),
        ({"systems": {"copy": "ours"}}, InputError, "taken by a built-in"),
        ({"built_in": ("magic",)}, InputError, "no built-in system 'magic'"),
        ({"against": "x"}, InputError, "no such system"),
        ({"source": "body"}, InputError, "no column 'body'"),
        ({"fluency": "cola"}, InputError, "pass lm:MODEL"),
        ({"fluency_label": "fine"}, ModelError, "no label 'fine'"),
        ({"inputs": ()}, InputError, "nothing to compare"),
    ],
)
def test_bad_input_is_one_line(tmp_path, parts, pairs, changes, error, match):
    with pytest.raises(error, match=match) as caught:
        run(config(tmp_path, parts, **{"inputs": (str(pairs),), **changes}))
    assert "\n" not in str(caught.value)


def test_an_evaluation_that_is_refused_leaves_the_finished_one_whole(tmp_path, parts, pairs):
    settings = config(tmp_path, parts, inputs=(str(pairs),), systems={"ours": "ours"}, built_in=("copy",))
    run(settings)
    for changes in (
        {"against": "nobody"},
        {"encoder": str(tmp_path / "nowhere")},
        {"lexicon": parts["judge"]},
    ):
        with pytest.raises((InputError, ModelError)):
            run(settings.model_copy(update=changes))
        assert (tmp_path / "eval" / SUCCESS).exists()


@pytest.mark.parametrize("place", ["pairs", "other"])
@pytest.mark.parametrize("ids", [["a", "a", "c", "d", "e"], ["a", None, "c", "d", "e"]])
def test_rows_are_not_joined_by_ids_that_are_not_theirs_alone(tmp_path, parts, pairs, place, ids):
    table = pq.read_table(pairs)
    other = tmp_path / "other.parquet"
    pq.write_table(table, other)
    spoilt = pairs if place == "pairs" else other
    pq.write_table(table.set_column(0, "id", pa.array(ids, pa.string())), spoilt)
    settings = config(tmp_path, parts, inputs=(str(pairs),), systems={"x": f"{other}#ours"}, id_column="id")
    with pytest.raises(InputError, match=rf"{spoilt.name}: .*--id-column"):
        run(settings)


def test_people_are_measured_where_they_wrote_something(tmp_path, parts, pairs):
    """Two of the five rows have no reference: these say nothing of people, and count in no comparison with them."""
    result = run(config(tmp_path, parts, inputs=(str(pairs),), systems={"ours": "ours"}, built_in=("copy",)))
    table = pq.read_table(pairs)
    kept = [i for i, text in enumerate(table.column("neutral1").to_pylist()) if text]
    assert len(kept) == 3
    few = tmp_path / "few.parquet"
    pq.write_table(table.take(kept), few)
    alone = run(
        config(tmp_path / "alone", parts, inputs=(str(few),), systems={"ours": "ours"}, built_in=("copy",))
    )
    assert result.systems["human"] == alone.systems["human"]
    assert result.changes["human"] == alone.changes["human"]
    assert result.systems["ours"].metrics["J"].n == 5 and result.record["systems"]["human"]["rows"] == 3
    assert "human (3 sentences)" in (tmp_path / "eval" / "report.html").read_text()
    sentences = pq.read_table(tmp_path / "eval" / "sentences.parquet").to_pylist()
    assert [r["row"] for r in sentences if r["system"] == "human"] == kept
    assert (
        "human"
        in run(
            config(tmp_path / "c", parts, inputs=(str(pairs),), systems={"ours": "ours"}, against="human")
        ).systems
    )


def test_word_classes_alone_need_no_model(tmp_path, parts, pairs):
    result = run(config(tmp_path, parts, inputs=(str(pairs),), systems={"ours": "ours"}, fluency="ngram"))
    assert result.record["fluency"]["quality"]["auc"] > 0.75 and "word classes" in result.fluency
    assert result.record["models"]["fluency"]["name"] == "fluency"


def test_another_language_model_has_to_be_calibrated(tmp_path, parts, pairs):
    from tests.models.tiny_lm import save_tiny_lm

    tiny = f"lm:{save_tiny_lm(tmp_path / 'lm')}"
    with pytest.raises(ModelError, match="pass --fluency-text"):
        run(config(tmp_path, parts, inputs=(str(pairs),), fluency=tiny))
    whole = [
        f"The bus number {i} leaves the old town at noon and waits for you at stop {i % 7}."
        for i in range(120)
    ]
    (tmp_path / "whole.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in whole))
    settings = config(
        tmp_path, parts, inputs=(str(pairs),), fluency=tiny, fluency_text=str(tmp_path / "whole.jsonl")
    )
    result = run(settings)
    assert "broken on purpose" in result.fluency
    assert result.record["fluency"]["quality"]["whole_passed"] >= 0.85


@pytest.mark.models
def test_the_example_by_its_command(tmp_path, capsys):
    from pipelines.cli import main

    example = Path(__file__).resolve().parents[2] / "examples" / "rewrites.jsonl"
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                "eval",
                "rewrites",
                str(example),
                "--system",
                "ours=ours",
                "--fluency",
                "ngram",
                "-o",
                str(tmp_path / "eval"),
            ]
        )
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "ours" in shown and "report:" in shown
    # Its classifier and the judge at hand learnt from the same comments.
    assert "sentence-drop is left out: linear learnt from jigsaw-2018" in shown
    systems = json.loads((tmp_path / "eval" / "results.json").read_text())["systems"]
    # On short mild sentences leaving the word out does as well: what the example shows is the other two.
    for name in ("copy", "lexicon-mask"):
        assert systems["ours"]["J"]["mean"] > systems[name]["J"]["mean"] + 0.3
    assert systems["ours"]["facts_kept"]["mean"] > 0.8 and systems["copy"]["SIM"]["mean"] > 0.999
