import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.lineage import brief, lineage_rankers, outputs_above
from models.protocols import ModelInfo
from models.scorers.judging import check_judge, training_tags
from schemas.errors import TamisError


def scorer(name: str, revision: str, data: str = "") -> ModelInfo:
    return ModelInfo(name, "scorer", revision, training_data=data)


JUDGE = scorer("hf:judge", "aa", "dghs+davidson")


def test_a_judge_of_other_weights_and_data_is_independent():
    verdict = check_judge(
        JUDGE, [scorer("jigsaw-bilstm", "bb", "jigsaw-2018"), scorer("lexicon", "cc", "none (a word list)")]
    )
    assert verdict.shared == () and verdict.note == ""
    assert verdict.rankers == ("jigsaw-bilstm@bb", "lexicon@cc")


@pytest.mark.parametrize(
    ("ranker", "said"),
    [
        (scorer("hf:judge", "aa", "dghs+davidson"), "hf:judge ranked the training data"),
        (scorer("hf:copy", "aa"), "hf:judge has the weights of hf:copy"),
        (scorer("hf:judge", "zz"), "another revision"),
        (scorer("other", "bb", "Davidson + jigsaw-2018"), "learnt from davidson, as did other"),
    ],
)
def test_what_is_shared_is_refused_in_one_line_or_noted(ranker, said):
    with pytest.raises(TamisError, match="--allow-shared-judge") as error:
        check_judge(JUDGE, [ranker])
    assert said in str(error.value) and "\n" not in str(error.value)
    verdict = check_judge(JUDGE, [ranker], allow_shared=True)
    assert len(verdict.shared) == 1 and said in verdict.note
    assert json.loads(json.dumps(verdict.as_dict()))["shared"]


def test_only_scorers_rank_and_two_word_lists_share_no_data():
    model = ModelInfo("smollm2", "lm", "aa", training_data="dghs")
    assert check_judge(JUDGE, [model]).rankers == ()
    lists = scorer("lexicon", "1", "none (a word list)"), scorer("lexicon:mine", "2", "none (a word list)")
    assert check_judge(lists[0], [lists[1]]).shared == ()


tags = st.lists(st.sampled_from(["a", "B", "c-1", "d"]), max_size=4)


@given(tags, tags)
def test_tags_are_sets(left, right):
    judge, ranker = scorer("j", "1", "+".join(left)), scorer("r", "2", " + ".join(right))
    shared = bool({t.lower() for t in left} & {t.lower() for t in right})
    assert bool(training_tags(judge) & training_tags(ranker)) == shared
    assert bool(check_judge(judge, [ranker], allow_shared=True).shared) == shared


def write(path, record):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def test_rankers_are_found_through_what_was_trained_on_what(tmp_path):
    ranker = {
        "name": "jigsaw-bilstm",
        "kind": "scorer",
        "revision": "bb",
        "training_data": "jigsaw-2018",
        "extra": {},
    }
    rewriter = {"name": "smollm2", "kind": "lm", "revision": "x"}
    early = {"name": "linear", "kind": "scorer", "revision": "cc"}
    write(tmp_path / "first" / "manifest.json", {"models": [early]})
    write(
        tmp_path / "clean" / "manifest.json",
        {"models": [rewriter, ranker], "lineage": {"job": "score", "models": brief({"models": [early]})}},
    )
    # A record that names the models, one that only says where the data lie, and an adapter on such a model.
    write(
        tmp_path / "a" / "train.json",
        {"data": {"source": "gone", "lineage": {"models": brief({"models": [ranker]})}}},
    )
    write(tmp_path / "b" / "train.json", {"data": {"source": str(tmp_path / "clean"), "lineage": {}}})
    write(
        tmp_path / "c" / "train.json",
        {"model": {"name": f"hf:{tmp_path / 'b'}"}, "data": {"source": str(tmp_path / "plain.jsonl")}},
    )
    assert [i.tag for i in lineage_rankers([tmp_path / "a"])] == ["jigsaw-bilstm@bb"]
    for name in ("b", "c"):
        assert [i.tag for i in lineage_rankers([tmp_path / name])] == ["jigsaw-bilstm@bb", "linear@cc"]
    assert lineage_rankers([tmp_path / "a"])[0].training_data == "jigsaw-2018"
    assert len(lineage_rankers([tmp_path / "a", tmp_path / "b"])) == 2


def test_folders_without_a_record_or_in_a_circle_have_no_rankers(tmp_path):
    (tmp_path / "model").mkdir()
    write(tmp_path / "odd" / "train.json", ["not", "an", "object"])
    write(tmp_path / "loop" / "train.json", {"model": {"name": str(tmp_path / "loop")}, "data": None})
    assert lineage_rankers([tmp_path / "model", tmp_path / "odd", tmp_path / "loop", tmp_path / "none"]) == ()


def test_training_and_jobs_record_what_made_their_data(tmp_path):
    from models.training.shards import list_shards
    from pipelines.run import RunSettings
    from pipelines.score import ScoreConfig, run

    (tmp_path / "in.jsonl").write_text('{"text": "you idiot"}\n')
    quiet = RunSettings(progress="quiet")
    run(ScoreConfig(input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "one")), quiet)
    run(ScoreConfig(input=str(tmp_path / "one"), output=str(tmp_path / "two"), attribute="again"), quiet)
    listing = list_shards(str(tmp_path / "one"))
    assert [m["name"] for m in listing.lineage["models"]] == ["lexicon"]
    second = json.loads((tmp_path / "two" / "manifest.json").read_text())
    assert [m["name"] for m in second["lineage"]["models"]] == ["lexicon"]
    # What a model trained on the second says survives the folders.
    write(
        tmp_path / "model" / "train.json", {"data": {"lineage": list_shards(str(tmp_path / "two")).lineage}}
    )
    assert [i.name for i in lineage_rankers([tmp_path / "model"])] == ["lexicon"]


def test_an_ensemble_is_known_by_its_members_generations_on(tmp_path):
    linear = scorer("linear", "cc")
    both = {
        "name": "max:linear,lexicon",
        "kind": "scorer",
        "revision": "ee",
        "extra": {"members": ["linear@cc", "lexicon@dd"]},
    }
    write(
        tmp_path / "out" / "manifest.json", {"models": [], "lineage": {"models": brief({"models": [both]})}}
    )
    (ranker,) = lineage_rankers([tmp_path / "out"])
    with pytest.raises(TamisError, match="linear is part of max:linear,lexicon"):
        check_judge(linear, [ranker])
    # The same weights under another name, and a record that never named the members.
    with pytest.raises(TamisError, match=r"hf:a@b has the weights of linear, which is part of max:"):
        check_judge(scorer("hf:a@b", "cc"), [ranker])
    with pytest.raises(TamisError, match="linear ranked the training data"):
        check_judge(linear, [scorer("max:linear,lexicon", "ee")])
    # And where the judge is the ensemble.
    with pytest.raises(TamisError, match="linear"):
        check_judge(
            ModelInfo("mean:linear,x", "scorer", "ff", extra={"members": ["linear@cc", "x@1"]}), [linear]
        )


def test_a_hubs_revision_and_a_folder_of_the_same_weights_are_one_model():
    hub = ModelInfo("hf:org/judge", "scorer", "a" * 40, extra={"weights": "bb"})
    with pytest.raises(TamisError, match="has the weights of"):
        check_judge(scorer("hf:/copy", "bb"), [hub])
    assert check_judge(scorer("hf:/copy", "bc"), [hub]).shared == ()


def test_an_adapter_below_and_a_base_named_from_elsewhere_are_followed(tmp_path, monkeypatch):
    for name, revision in (("below", "1"), ("base", "2")):
        made = {"models": [{"name": f"r{revision}", "kind": "scorer", "revision": revision}]}
        write(tmp_path / name / "train.json", {"data": {"lineage": made}})
    model = {
        "name": "hf:base",
        "source": str(tmp_path / "base"),
        "on_adapter": {"name": "below", "source": str(tmp_path / "below")},
    }
    write(tmp_path / "top" / "train.json", {"model": model, "data": {}})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert [r.name for r in lineage_rankers(["../top"])] == ["r2", "r1"]


@pytest.mark.parametrize(
    "place", ["out", "out/", "out/data", "out/data/sub/a.jsonl", "out/data/**/*.jsonl", "o*/data/*"]
)
def test_rankers_are_found_wherever_in_an_output_a_path_leads(tmp_path, monkeypatch, place):
    ranker = {"name": "linear", "kind": "scorer", "revision": "cc"}
    write(tmp_path / "out" / "manifest.json", {"job": "detox", "models": [ranker]})
    write(tmp_path / "out" / "_SUCCESS", {})
    write(tmp_path / "out" / "data" / "sub" / "a.jsonl", {"text": "x"})
    assert [r.tag for r in lineage_rankers([f"{tmp_path}/{place}"])] == ["linear@cc"]
    monkeypatch.chdir(tmp_path / "out" / "data")
    assert [r.tag for r in lineage_rankers(["."])] == ["linear@cc"]


def test_a_cascades_first_stage_is_told_from_what_ranked(tmp_path):
    linear = {"name": "linear", "kind": "scorer", "revision": "cc"}
    roles = {}
    for name, models, config in (
        ("said", [linear | {"role": "gate"}], {}),
        ("gate", [linear], {"scorer": "jigsaw-bilstm", "linear": "linear"}),
        ("ranker", [linear], {"scorer": "linear", "linear": "linear"}),
        ("member", [linear], {"scorer": "max:jigsaw-bilstm,linear", "linear": "linear"}),
        ("unknown", [linear], {}),
    ):
        write(tmp_path / name / "manifest.json", {"models": models, "config": config})
        (found,) = lineage_rankers([tmp_path / name])
        roles[name] = found.extra.get("role")
    assert roles == {"said": "gate", "gate": "gate", "ranker": None, "member": None, "unknown": None}
    # What was a gate in one output and ranked another has ranked.
    (found,) = lineage_rankers([tmp_path / "gate", tmp_path / "ranker", tmp_path / "gate"])
    assert found.extra.get("role") != "gate"


def test_a_record_says_where_a_base_lies_that_was_named_from_here(tmp_path, monkeypatch):
    from models.training.loading import resolve_model
    from tests.models.tiny_lm import save_tiny_lm

    whole = str(save_tiny_lm(tmp_path / "base"))
    monkeypatch.chdir(tmp_path)
    assert resolve_model("base").place == resolve_model("hf:base").place == {"source": whole}
    assert resolve_model(whole).place == {}


def test_what_stands_above_a_folder_need_not_be_readable(tmp_path):
    from fsspec.implementations.local import LocalFileSystem

    class Closed(LocalFileSystem):
        def exists(self, path, **kwargs):
            raise PermissionError(13, "Forbidden", path)

    assert outputs_above(Closed(), [f"{tmp_path}/data/a.jsonl"]) == []
