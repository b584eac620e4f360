"""`tamis eval spans`: files and outputs of tamis against marked posts."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.eval_spans import SpansEvalConfig, run
from schemas.errors import InputError, OutputError
from tests.pipelines.sample_output import build_output
from transforms.shards.finish import SUCCESS

POSTS = [
    ("You are an idiot.", "[11, 12, 13, 14, 15]"),
    ("What a stupid, stupid idea.", "[7, 8, 9, 10, 11, 12, 15, 16, 17, 18, 19, 20]"),
    ("The bus leaves at noon.", "[]"),
]


def csv(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("spans,text\n" + "".join(f'"{s}","{t}"\n' for t, s in rows))
    return str(path)


def config(tmp_path, predicted, gold, **changes) -> SpansEvalConfig:
    return SpansEvalConfig(
        predicted=str(predicted), gold=str(gold), output=str(tmp_path / "eval"), draws=200, **changes
    )


def test_a_file_joined_by_text_in_any_order(tmp_path):
    gold = csv(tmp_path / "gold.csv", POSTS)
    found = csv(tmp_path / "found.csv", [(POSTS[2][0], "[0]"), (POSTS[0][0], POSTS[0][1])])
    result = run(config(tmp_path, found, gold))
    assert result.mixes["spans"].each.tolist() == [1, 0, 0] and result.missing == 1
    assert result.baselines["nothing"].mean == pytest.approx(1 / 3)
    record = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert record["kind"] == "spans" and record["posts_with_gold_spans"] == 2
    assert (tmp_path / "eval" / "_SUCCESS").exists()
    items = pq.read_table(tmp_path / "eval" / "posts.parquet")
    assert items.column("spans.f1").to_pylist() == [1, 0, 0]


def test_sources_are_scored_alone_and_together(tmp_path):
    gold = csv(tmp_path / "gold.csv", POSTS)
    spans = [
        [{"start": 11, "end": 16, "score": 1.0, "source": "lexicon"}],
        [
            {"start": 7, "end": 13, "score": 0.4, "source": "tagger"},
            {"start": 15, "end": 21, "score": 1.0, "source": "lexicon"},
        ],
        [{"start": 4, "end": 7, "score": 0.1, "source": "tagger"}],
    ]
    table = pa.table({"text": [t for t, _ in POSTS], "spans": spans})
    pq.write_table(table, tmp_path / "found.parquet")
    result = run(config(tmp_path, tmp_path / "found.parquet", gold))
    assert (
        list(result.mixes) == ["lexicon", "tagger", "lexicon+tagger"] and result.against == "lexicon+tagger"
    )
    assert result.mixes["lexicon"].each.tolist() == pytest.approx([1, 2 / 3, 1])
    assert result.mixes["lexicon+tagger"].each.tolist() == [1, 1, 0]
    sweep = dict(result.sweeps["lexicon+tagger"])
    assert sweep[0.2] == 1 and sweep[0.0] == pytest.approx(2 / 3)
    again = run(config(tmp_path, tmp_path / "found.parquet", gold, mixes=(("lexicon",),), threshold=0.2))
    assert list(again.mixes) == ["lexicon"]
    page = (tmp_path / "eval" / "report.html").read_text()
    assert "finds toxic spans with a character F1 of" in page and "idiot" in page


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    made = build_output(tmp_path_factory.mktemp("spans") / "out", shards=("part-0.jsonl",))
    (made.path / SUCCESS).touch()
    return made


def write_gold(tmp_path, sample) -> Path:
    """Marks exactly what the made-up job found, in the rows as they came."""
    found: dict[int, set[int]] = {}
    for edit in sample.edits:
        for s in edit["spans"]:
            found.setdefault(edit["row"], set()).update(range(s["start"], s["end"]))
    spans = [sorted(found.get(i, ())) for i in range(len(sample.before))]
    path = tmp_path / "gold.parquet"
    pq.write_table(pa.table({"text": sample.before, "spans": spans}), path)
    return path


def test_an_output_is_joined_by_row_though_texts_were_rewritten(tmp_path, sample):
    result = run(config(tmp_path, sample.path, write_gold(tmp_path, sample)))
    dead = sample.dead
    assert result.posts == len(sample.before)
    assert sum(x < 1 for x in result.mixes[result.best].each) <= dead


def test_another_corpus_is_refused(tmp_path, sample):
    gold = write_gold(tmp_path, sample)
    table = pq.read_table(gold)
    pq.write_table(table.slice(1), gold)
    with pytest.raises(InputError, match="was made from"):
        run(config(tmp_path, sample.path, gold))
    pq.write_table(table.set_column(0, "text", pa.array(["x" * 900] * len(table))), gold)
    with pytest.raises(InputError, match="is not the text it was made from"):
        run(config(tmp_path, sample.path, gold))


@pytest.mark.parametrize(
    ("predicted", "changes", "match"),
    [
        ([(POSTS[0][0], "[11]")], {"mixes": (("tagger",),)}, "no span is from 'tagger'"),
        ([(POSTS[0][0], "[99]")], {}, "reaches character 99"),
        ([("Another text.", "[]")], {}, "no post of"),
        ([(POSTS[0][0], "eleven")], {}, "row 0: spans must be"),
        ([(POSTS[0][0], "[11]")], {"gold_column": "gold"}, "no column 'gold'"),
        ([(POSTS[0][0], "[11]")], {"against": "x"}, "no such mix"),
    ],
)
def test_bad_input_is_one_line(tmp_path, predicted, changes, match):
    gold = csv(tmp_path / "gold.csv", POSTS)
    found = csv(tmp_path / "found.csv", predicted)
    with pytest.raises(InputError, match=match) as caught:
        run(config(tmp_path, found, gold, **changes))
    assert "\n" not in str(caught.value)


def test_an_unfinished_output_is_refused(tmp_path):
    made = build_output(tmp_path / "out", success=False)
    with pytest.raises(OutputError, match="not finished"):
        run(config(tmp_path, made.path, csv(tmp_path / "gold.csv", POSTS)))
