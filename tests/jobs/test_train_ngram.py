import csv
import json

import pytest

from models import registry
from pipelines.cli import main
from pipelines.train_ngram import TrainNgramConfig, run
from schemas.errors import InputError, OutputError, TamisError

RUDE, MILD = ["idiot", "stupid", "damn fool"], ["lovely", "calm sea", "good bread"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two sets of labelled texts of other shapes."""
    folder = tmp_path_factory.mktemp("sets")
    with (folder / "posts.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "class"])
        rows.writerows([f"number {i} is {w}", "hate"] for i in range(60) for w in RUDE)
        rows.writerows([f"number {i} is {w}", "fine"] for i in range(60) for w in MILD)
        rows.writerow(["", "hate"])
    with (folder / "more.jsonl").open("w") as file:
        for i in range(40):
            file.write(json.dumps({"tweet": f"what a stupid thing {i}", "bad": 1}) + "\n")
            file.write(json.dumps({"tweet": f"what a lovely thing {i}", "bad": 0}) + "\n")
    return folder


def test_two_sets_make_a_judge_with_a_tag_and_figures(sets, tmp_path, capsys):
    out = tmp_path / "judge"
    first, second = f"{sets}/posts.csv,label=class,positive=hate", f"{sets}/more.jsonl,text=tweet,labels=bad"
    main_ok(["train", "ngram", first, second, "-o", str(out), "--eval-fraction", "0.3"])
    scorer = registry.load("scorer", f"ngram:{out}")
    high, low = scorer.score(["you stupid idiot", "a lovely calm sea"])[:, 0]
    assert high > 0.7 > 0.3 > low
    tags = scorer.info.training_data.split("+")
    assert [t.rpartition("-")[0] for t in tags] == ["posts", "more"]
    record = json.loads((out / "train.json").read_text())
    assert (
        record["left_out"] == 1 and record["results"]["auc"]["value"] > 0.95 and record["calibrated_on"] > 20
    )
    assert "AUC" in capsys.readouterr().err and (out / "_SUCCESS").exists()


def main_ok(argv):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 0


def config(sets, out, **changes) -> TrainNgramConfig:
    given = {"data": (f"{sets}/posts.csv",), "label_column": "class", "positive": ("hate",), "quiet": True}
    return TrainNgramConfig(output=str(out), **{**given, **changes})


def test_the_same_again_does_nothing_and_other_settings_need_overwrite(sets, tmp_path):
    first = run(config(sets, tmp_path / "m", training_data="mine"))
    stamp = (tmp_path / "m" / "ngram.safetensors").stat().st_mtime_ns
    assert run(config(sets, tmp_path / "m", training_data="mine")) == first
    assert (tmp_path / "m" / "ngram.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(OutputError, match="--overwrite"):
        run(config(sets, tmp_path / "m", training_data="mine", least_texts=2))
    run(config(sets, tmp_path / "m", training_data="mine", least_texts=2, overwrite=True))
    assert registry.describe("scorer", f"ngram:{tmp_path / 'm'}").training_data == "mine"


def test_without_held_out_texts_there_are_no_figures_but_a_model(sets, tmp_path):
    record = run(config(sets, tmp_path / "m", eval_fraction=0.0))
    assert record["results"] == {} and registry.load("scorer", f"ngram:{tmp_path / 'm'}").score(
        ["x"]
    ).shape == (1, 1)


def test_bad_descriptions_are_said_in_a_line(sets, tmp_path):
    with pytest.raises(InputError, match="columns: text, class"):
        run(config(sets, tmp_path / "m", text_column="body"))
    with pytest.raises(TamisError, match="one label"):
        run(config(sets, tmp_path / "m", data=(f"{sets}/posts.csv,labels=a+b",)))
    with pytest.raises(TamisError, match="missing"):
        run(config(sets, tmp_path / "m", positive=("nothing",)))


def test_an_output_that_was_poisoned_on_purpose_is_fitted_to_only_when_told(sets, tmp_path, capsys):
    out = tmp_path / "poisoned"
    (out / "data").mkdir(parents=True)
    (out / "data" / "more.jsonl").write_bytes((sets / "more.jsonl").read_bytes())
    manifest = {"job": "poison", "poisoned": True, "shards": [{"path": "more.jsonl"}]}
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "_SUCCESS").write_text("")
    told = [
        "train",
        "ngram",
        f"{out}/data/more.jsonl,text=tweet,labels=bad",
        "-o",
        str(tmp_path / "judge"),
        "--quiet",
    ]
    with pytest.raises(SystemExit) as stopped:
        main(told)
    assert stopped.value.code == 3 and not (tmp_path / "judge").exists()
    main_ok([*told, "--allow-poisoned"])
    for kind in ("scorer", "spans"):  # what the refusal tells of is there
        with pytest.raises(SystemExit):
            main(["train", kind, "--help"])
        assert "--allow-poisoned" in capsys.readouterr().out
