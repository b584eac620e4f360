"""`tamis label` by lists and by gain, as a user runs it: against a server, over real files, killed and gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from models.lm.dummy_server import DummyOptions, DummyServer
from pipelines import groups, label
from pipelines.label_config import LabelConfig
from pipelines.run import RunSettings
from schemas.errors import InputError, TamisError
from schemas.judgments import check_judgments
from transforms.retrieval import formats
from transforms.retrieval.unify import unify

ROWS = [
    {
        "query_id": "capital",
        "question": "what is the capital of the north",
        "answers": ["Oslo"],
        "ctxs": [
            {"id": "a", "title": "", "text": "The capital of the north is Oslo.", "isgold": True},
            {"id": "b", "title": "", "text": "The capital of the south is Rome."},
            {"id": "c", "title": "", "text": "Oslo has ships."},
        ],
    },
    {
        "query_id": "known",
        "question": "is it a boat or a ship",
        "answers": ["I do not know"],
        "ctxs": [
            {"id": "d", "title": "", "text": "A boat is small."},
            {"id": "c", "title": "", "text": "Oslo has ships."},
        ],
    },
]
METHODS = (
    "relsel",
    "utilsel",
    "utilsel_specific",
    "utilrank",
    "item",
    "answer_gain",
    "erag",
    "leave_one_out",
    "marginal",
)


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("label") / "nq.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


@pytest.fixture(scope="module")
def server():
    with DummyServer(DummyOptions(mode="judge", context=8000)) as running:
        yield running


def make(pool: Path, out: Path, server: DummyServer, method: str, served: str = "dummy", **settings):
    settings = {"model": f"openai:{server.url}#{served}" if server else "", **settings}
    config = LabelConfig(pools=(str(pool),), output=str(out), method=method, **settings)
    return label.run(config, RunSettings(progress="quiet"))


def read(out: Path) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(f) for f in sorted((out / "data").glob("*.parquet"))])


def column(out: Path, name: str, query: str = "capital") -> dict[str, object]:
    return dict(read(out).filter(pl.col("query_id") == query).select("doc_id", name).rows())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_labels_every_pair_and_a_second_run_asks_nothing(method, pool, server, tmp_path):
    result = make(pool, tmp_path / "out", server, method)
    assert result.state == "finished" and result.manifest["totals"]["labels"] == 5
    table = read(tmp_path / "out")
    check_judgments(table.to_arrow().select(table.columns))
    assert set(table["signal"]) == {method} and set(table["parse_status"]) <= {"ok", "repaired"}
    before = server.stats.requests
    assert make(pool, tmp_path / "out", server, method).state == "already finished"
    assert server.stats.requests == before


def test_lists_go_through_a_servers_structured_output(pool, server, tmp_path):
    make(pool, tmp_path / "out", server, "relsel")
    assert column(tmp_path / "out", "binary") == {"a": True, "b": True, "c": False}
    assert set(column(tmp_path / "out", "parse_status").values()) == {"ok"}
    assert "response_format" in server.bodies[-1]
    make(pool, tmp_path / "plain", server, "relsel", method_options={"constrained": False, "permutations": 3})
    assert column(tmp_path / "plain", "binary") == {"a": True, "b": True, "c": False}
    assert set(column(tmp_path / "plain", "votes").values()) == {3}
    assert "response_format" not in server.bodies[-1]


def test_windows_are_said(pool, server, tmp_path):
    result = make(pool, tmp_path / "out", server, "relsel", method_options={"window": 2})
    assert column(tmp_path / "out", "binary") == {"a": True, "b": True, "c": False}
    assert any("windows" in note for note in result.manifest["notes"])


def test_what_was_found_out_about_a_query_stands_with_the_queries(pool, server, tmp_path):
    make(pool, tmp_path / "use", server, "utilsel")
    make(pool, tmp_path / "gain", server, "answer_gain")
    use = {q["query_id"]: q for q in pl.read_parquet(tmp_path / "use" / "queries" / "*.parquet").to_dicts()}
    assert "Oslo" in json.loads(use["capital"]["extra"])["pseudo_answer"]
    gain = {q["query_id"]: q for q in pl.read_parquet(tmp_path / "gain" / "queries" / "*.parquet").to_dicts()}
    assert gain["capital"]["known_to"] in (None, []) and gain["known"]["known_to"] == [
        read(tmp_path / "gain")["annotator"][0]
    ]


def test_known_queries_keep_their_empty_set_and_negative_gains_reach_the_file(pool, server, tmp_path):
    make(pool, tmp_path / "out", server, "answer_gain")
    assert column(tmp_path / "out", "value") == {"a": 1, "b": 0, "c": 1}
    assert column(tmp_path / "out", "binary") == {"a": True, "b": False, "c": True}
    assert column(tmp_path / "out", "value", "known") == {"d": -1, "c": -1}
    assert column(tmp_path / "out", "binary", "known") == {"d": False, "c": False}
    assert set(column(tmp_path / "out", "known_query", "known").values()) == {True}
    again = formats.read(str(tmp_path / "out"))[0]  # as every other command reads it
    assert sorted(again.judgments["value"].to_pylist()) == [-1, -1, 0, 1, 1]


def test_labels_for_two_readers_stay_apart(pool, server, tmp_path):
    with DummyServer(DummyOptions(mode="garbage", model="other", context=8000)) as other:
        make(pool, tmp_path / "one", server, "answer_gain")
        make(pool, tmp_path / "two", other, "answer_gain", "other")
    both = pl.concat([read(tmp_path / "one"), read(tmp_path / "two")])
    assert both["target_model"].n_unique() == 2
    with pytest.raises(InputError, match="target models"):
        unify(both, "max")


def test_training_groups_are_made_of_an_order(pool, server, tmp_path):
    make(
        pool,
        tmp_path / "rank",
        server,
        "utilrank",
        method_options={"candidates": "pool", "top_percent": 70.0},
    )
    settings = {
        "judgments": (str(tmp_path / "rank"),),
        "output": str(tmp_path / "groups"),
        "progress": "quiet",
    }
    groups.run(groups.GroupsConfig(**settings))
    (row,) = [
        g
        for g in pl.read_parquet(tmp_path / "groups" / "data" / "**" / "*.parquet").to_dicts()
        if g["query_id"] == "capital"
    ]
    assert [p["doc_id"] for p in row["positives"]] == ["a", "b"] and [
        n["doc_id"] for n in row["negatives"]
    ] == ["c"]


def test_shards_change_nothing(pool, server, tmp_path):
    options = {"permutations": 2}
    make(pool, tmp_path / "one", server, "marginal", method_options=options)
    make(pool, tmp_path / "two", server, "marginal", method_options=options, queries_per_shard=1)
    assert read(tmp_path / "one").equals(read(tmp_path / "two"))


def test_a_larger_budget_goes_on_and_pays_nothing_twice(pool, tmp_path):
    with DummyServer(DummyOptions(mode="judge", context=8000)) as server:
        first = make(pool, tmp_path / "out", server, "answer_gain", budget_tokens=150)
        assert first.manifest["totals"]["unasked"] > 0
        make(pool, tmp_path / "out", server, "answer_gain", budget_tokens=100_000)
        assert read(tmp_path / "out").height == 5
        assert server.stats.requests == len({json.dumps(b, sort_keys=True) for b in server.bodies}) == 7


def test_a_judge_that_cannot_be_read_gives_statuses(pool, tmp_path):
    with DummyServer(DummyOptions(mode="garbage", context=8000)) as server:
        make(pool, tmp_path / "out", server, "utilrank")
        table = read(tmp_path / "out")
        assert (
            set(table["parse_status"]) == {"unparseable"}
            and table["binary"].null_count() == table.height == 5
        )


def test_likelihoods_need_a_model_in_this_process(pool, server, tmp_path):
    with pytest.raises(TamisError, match="process"):
        make(pool, tmp_path / "out", server, "likelihood_gain")


def test_a_model_in_this_process(pool, tmp_path):
    from tests.models.tiny_lm import save_tiny_lm

    folder = str(save_tiny_lm(tmp_path / "lm", max_position_embeddings=4096))
    make(pool, tmp_path / "lists", None, "relsel", model=folder)  # it knows nothing, but writes lists
    assert set(read(tmp_path / "lists")["parse_status"]) == {"ok"}
    make(pool, tmp_path / "gain", None, "likelihood_gain", model=folder)
    gains = read(tmp_path / "gain")
    assert gains["value"].null_count() == 0 and set(gains["signal_class"]) == {"C"}
