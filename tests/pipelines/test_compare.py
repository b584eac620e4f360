"""`tamis compare`: what is planned, in which order; how prompts are made; what is said of the figures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.compare import arms, page, statistics
from pipelines.compare.config import CompareConfig
from pipelines.compare.costs import describe
from pipelines.compare.options import given_arms, make_config, pairs, recipes
from pipelines.compare.plan import Facts, build_stages, wanted
from pipelines.compare.prompts import begun_by, content_hash, given_prompts, make_prompts
from pipelines.compare.receipts import Receipt, done_stages
from pipelines.detox import make_config as make_detox
from schemas.errors import InputError, TamisError

FACTS = Facts(
    corpora={
        k: k for k in ("raw", "given:mine", "held_out", "made_prompts", "neutral", "toxic", "toxic_adapter")
    },
    revisions=dict.fromkeys(
        (
            "judge",
            "base",
            "scorer",
            "rewriter",
            "reference",
            "rewriter:",
            *(f"scorer:{n}" for n in arms.NAMES),
        ),
        "x@1",
    ),
    rows=100,
    characters=42_000,
    prompts=200,
    neutral_characters=8_400,
)


def config(**changes) -> CompareConfig:
    settings = {"raw": "raw", "output": "out", "held_out": "held", "neutral": "neutral", "judge": "linear"}
    return CompareConfig(**{**settings, **changes})


def keys(**changes) -> dict[str, str]:
    return {s.name: s.key for s in build_stages(config(**changes), FACTS)}


# ------------------------------------------------------------------------------------------------------ arms


@pytest.mark.parametrize("name", [n for n in arms.NAMES if arms.is_made(n)])
def test_every_arm_is_a_detox_job_and_filters_need_no_language_model(name):
    job = make_detox({**config().arm_recipe(name), "input": "in", "output": "out"})
    assert job.accept.needs_candidates == (name not in arms.FILTERS)
    assert arms.is_contrastive(config().arm_recipe(name)) == (job.decoding.mode != "prompt_only")


def test_filters_keep_their_own_rules_whatever_the_rewriting_arms_are_told():
    told = config(detox={"gate": {"gate": "none", "tau": 0.9}, "rewrite": {"unit": "document"}}, tau=0.7)
    gates = {a: told.arm_recipe(a)["gate"] for a in ("drop-documents", "drop-sentences", "prompt_only")}
    assert gates["drop-documents"] == {"gate": "all", "tau": 0.7}
    assert gates["drop-sentences"] == {"gate": "all", "tau": 0.4}
    assert gates["prompt_only"] == {"gate": "none", "tau": 0.9}


def test_an_ablation_changes_one_thing():
    shared = {"rewrite": {"sampling": {"temperatures": [0.6, 1.4], "per_temperature": 3}}}
    whole = config(detox=shared).arm_recipe("logratio")
    one = config(detox=shared).arm_recipe("logratio-one-temperature")
    assert one["rewrite"]["sampling"] == {"temperatures": [1.0], "per_temperature": 6}
    assert {**one, "rewrite": whole["rewrite"]} == whole
    fixed = config(detox=shared).arm_recipe("logratio-fixed-k")
    assert fixed["decoding"] == {"mode": "logratio", "dynamic_k": False}
    assert {**fixed, "decoding": whole["decoding"]} == whole


def test_arms_are_named_expanded_and_refused():
    assert arms.expand(["ablation:fixed-k", "raw", "raw"]) == ("logratio-fixed-k", "raw")
    assert arms.expand(["all"]) == arms.STANDARD and arms.expand(["ablations"]) == arms.ABLATIONS
    with pytest.raises(TamisError, match="no arm 'clean'"):
        config(make=("clean",)).arm_names()
    with pytest.raises(TamisError, match="means something else"):
        config(given={"raw": "x"}).arm_names()
    for name in ("../up", "two words", "a+b", "a=b", ".hidden", "_own", "*.parquet", "", "a\n"):
        with pytest.raises(TamisError, match=r"no name for an arm.*--arm NAME=x"):
            config(given={name: "x"}).arm_names()
    assert "clean_2.1-b" in config(given={"clean_2.1-b": "x"}).arm_names()
    for name in ("raw", "base", "mine"):
        with pytest.raises(TamisError, match=f"--recipe {name}:.*another name"):
            config(given={"mine": "x"}, recipes={name: {"gate": {"tau": 0.9}}}).arm_names()
    # A given arm is not made again, and a recipe of a new name is an arm of its own.
    names = config(
        make=("raw", "logratio"), given={"logratio": "x"}, recipes={"mild": {"gate": {"tau": 0.9}}}
    ).arm_names()
    assert names == ("raw", "logratio", "mild")


def test_two_corpora_of_one_name_are_refused_rather_than_one_forgotten():
    assert given_arms(["a/clean", "b/other/"], ["third=c"]) == {
        "clean": "a/clean",
        "other": "b/other/",
        "third": "c",
    }
    for folders, named in (
        (["a/clean", "b/clean"], []),
        (["a/clean"], ["clean=b/clean"]),
        ([], ["x=a", "x=b"]),
    ):
        with pytest.raises(TamisError, match="--arm NAME=FOLDER"):
            given_arms(folders, named)


def test_seeds_are_different_numbers():
    told = {"raw": "x", "output": "y"}
    assert make_config({**told, "seeds": [3, 0], "other_seeds": [0]}).arm_seeds("raw") == (3, 0)
    for wrong in ({"seeds": [0, 0]}, {"other_seeds": [1, 0, 1]}, {"other_seeds": []}, {"seeds": [-1]}):
        with pytest.raises(TamisError, match=f"setting {next(iter(wrong))}: ") as error:
            make_config({**told, **wrong})
        assert "\n" not in str(error.value)


def test_options_are_read_or_refused_in_one_line():
    found = recipes(["mild:gate.tau=0.9", "mild:decoding.mode=logratio", 'raw2:accept.ladder=["redact"]'])
    assert found == {
        "mild": {"gate": {"tau": 0.9}, "decoding": {"mode": "logratio"}},
        "raw2": {"accept": {"ladder": ["redact"]}},
    }
    assert pairs(["a=1", "b=x"]) == {"a": 1, "b": "x"}
    for wrong in (lambda: recipes(["mild"]), lambda: pairs(["a"]), lambda: make_config({"raw": "x"})):
        with pytest.raises(TamisError) as error:
            wrong()
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------ plan


def test_the_main_contrast_comes_first_and_then_the_others():
    stages = build_stages(config(given={"mine": "x"}, other_seeds=(0,)), FACTS)
    order = [(s.arm, s.seed) for s in stages if s.kind == "toxicity"]
    main = ["raw", "drop-documents", "logratio", "prompt_only"]
    assert order[:8] == [(a, s) for s in (0, 1) for a in main]
    assert order[8][0] == "mine" and {s for _, s in order[8:]} == {0}
    assert {a for a, _ in order[8:]} == {"mine", "base", *arms.STANDARD} - set(main)
    names = [s.name for s in stages]
    assert all(names.index(n) < names.index(s.name) for s in stages for n in s.needs)


def test_contrastive_arms_share_one_toxic_model():
    stages = build_stages(config(make=("all", "ablations")), FACTS)
    toxic = [s for s in stages if s.kind == "toxic"]
    users = {s.arm for s in stages if "toxic" in s.needs}
    assert len(toxic) == 1 and users == {"logratio", "official", "vanilla_cd", *arms.ABLATIONS}
    given = build_stages(config(toxic={"adapter": "x"}), FACTS)
    assert not any(s.kind == "toxic" or "toxic" in s.needs for s in given)


def test_a_key_changes_with_what_decides_the_result_and_with_nothing_else():
    plain = keys()
    assert keys(given={"mine": "x"}, workers=4, seeds=(0, 1, 2), keep_models=False).items() >= plain.items()

    def changed(**changes) -> set[str]:
        other = keys(**changes)
        return {n.partition("-")[0] for n in plain if other.get(n) != plain[n]}

    assert changed(train={"tokens": 5}) == {"train", "toxicity", "utility"}
    assert changed(judge_options={"label": "x"}) == {"facts", "toxicity"}
    assert changed(samples=5) == {"toxicity"}
    assert changed(utility={"documents": 3}) == {"utility"}
    assert changed(prompt_words=4) == {"prompts", "facts", "toxicity"}
    assert changed(toxic={"tokens": 5}) == {"toxic", "corpus", "facts", "train", "toxicity", "utility"}
    assert changed(tau=0.3) == {"corpus", "facts", "train", "toxicity", "utility"}


def with_models(scorers: dict[str, str], rewriter: str = "lm@1") -> Facts:
    """What planning finds where arms have scorers of their own; all others have `x@1`."""
    own = {f"scorer:{n}": scorers.get(n, "x@1") for n in (*arms.NAMES, *scorers)}
    rewriters = {f"rewriter:{n}": rewriter for n in ("", "prompt_only", *arms.CONTRASTIVE)}
    every = ", ".join(sorted({t for tags in own.values() for t in tags.split(", ")}))
    return replace(
        FACTS, revisions={**FACTS.revisions, **own, **rewriters, "scorer": every, "rewriter": rewriter}
    )


def test_the_models_of_an_arm_are_no_matter_of_another():
    def planned(scorers: dict[str, str], **changes) -> dict[str, str]:
        return {s.name: s.key for s in build_stages(config(**changes), with_models(scorers))}

    plain = planned({})
    more = planned({"strict": "y@1"}, recipes={"strict": {"scorer": "y"}})
    assert more.items() >= plain.items()
    other = planned({"drop-documents": "x@2"})
    assert {n for n in plain if plain[n] != other[n]} == {
        n for n in plain if n.partition("-")[2].startswith("drop-documents")
    }


# Keys of a comparison as they were when every arm's key held the scorers of all arms.
FORMER = {
    "prompts": "4f9a07eb15cd83652646219c4531e3dd",
    "corpus-raw": "526ae60805c3aacc848b8cab5aef1b7e",
    "corpus-drop-documents": "ea3239f8ff582f1437ece3455db4f571",
    "utility-drop-documents-1": "b4d37d0fff45ff4171de0b4c667e39a6",
    "facts-lexicon-mask": "2bd9e001468daa7f5f61b0fbf757ab25",
    "toxic": "c22f5582e5c5bd2e0b9272a35703a119",
    "corpus-logratio": "fd017e7a70470bf9bcf2a6df48db26e0",
    "toxicity-logratio-0": "cde73ccf7aaffef7af88ddc67a49ccfb",
}


def test_what_was_done_under_the_keys_of_an_earlier_tamis_is_found_again():
    scorers = {"lexicon-mask": "lexicon@1, x@1"}
    stages = {s.name: s for s in build_stages(config(), with_models(scorers))}
    receipts = {name: Receipt(name, key, 1.0) for name, key in FORMER.items()}
    assert done_stages(stages.values(), receipts) == set(FORMER)
    assert stages["corpus-drop-documents"].key != FORMER["corpus-drop-documents"]
    # Not where a scorer has changed since, its own or one below it.
    for changed in ({"drop-documents": "x@2"}, {"lexicon-mask": "lexicon@2, x@1"}):
        found = done_stages(build_stages(config(), with_models({**scorers, **changed})), receipts)
        assert found == {"corpus-raw", "prompts", "toxic"}


def test_groups_of_given_prompts_decide_their_key_where_they_are_asked_for():
    facts = replace(FACTS, corpora={**FACTS.corpora, "prompts": "file"})

    def key(**changes) -> str:
        told = config(held_out=None, prompts="file", **changes)
        return next(s.key for s in build_stages(told, facts) if s.kind == "prompts")

    assert key() == "fffb476896b38a57663845c8db98a3a8"  # as it was before groups were part of it
    assert len({key(), key(group_column="a"), key(group_column="b")}) == 3


def test_part_of_it_comes_with_what_it_needs():
    stages = build_stages(config(), FACTS)

    def chosen(**changes) -> set[str]:
        return {s.name for s in wanted(stages, config(**changes))}

    assert chosen(only=("raw",), seeds=(0, 1)) == {
        "prompts", "corpus-raw", "facts-raw", *(f"{k}-raw-{s}" for k in ("train", "toxicity", "utility") for s in (0, 1)),
    }  # fmt: skip
    assert chosen(stages=("corpus",), only=("logratio",)) == {"toxic", "corpus-logratio"}
    assert chosen(stages=("toxic",), only=("raw",)) == {"toxic"}
    assert chosen() == {s.name for s in stages}
    with pytest.raises(TamisError, match="--stages sleep"):
        wanted(stages, config(stages=("sleep",)))
    few = {"make": ("raw",), "neutral": None}
    for kind, words in (("utility", "--neutral"), ("toxic", "this comparison has none")):
        with pytest.raises(TamisError, match=f"--stages {kind}.*{words}"):
            wanted(build_stages(config(**few), FACTS), config(**few, stages=(kind,)))
    with pytest.raises(TamisError, match="--arms base: no stage of train"):
        wanted(stages, config(stages=("train",), only=("base",)))
    with pytest.raises(TamisError, match="--arms nobody"):
        build_stages(config(only=("nobody",)), FACTS)


def test_the_plan_says_what_each_stage_costs_and_learns_from_what_was_measured():
    stages = build_stages(config(make=("raw",), seeds=(0,)), FACTS)
    train = next(s for s in stages if s.kind == "train")
    lines = describe(stages, set(), {}, 1)
    assert any(line.startswith("train-raw-0") and "30,000 tokens" in line for line in lines)
    assert any(line.startswith("toxicity-raw-0") and "100,000 tokens" in line for line in lines)
    slow = Receipt("train-x", "k", 3000.0, 30_000, "train")
    before = next(line for line in lines if line.startswith(train.name))
    after = next(line for line in describe(stages, set(), {"x": slow}, 1) if line.startswith(train.name))
    assert "5 min" in before and "50 min" in after


def test_a_model_that_was_removed_is_made_again_only_if_something_needs_it():
    stages = build_stages(config(make=("raw",), seeds=(0,)), FACTS)
    receipts = {s.name: Receipt(s.name, s.key, 1.0, removed=s.kind == "train") for s in stages}
    assert done_stages(stages, receipts) == {s.name for s in stages}
    receipts["toxicity-raw-0"] = replace(receipts["toxicity-raw-0"], key="other")
    assert done_stages(stages, receipts) == {s.name for s in stages} - {"toxicity-raw-0", "train-raw-0"}


# --------------------------------------------------------------------------------------------------- prompts

WORDS = st.text("abcDE ", min_size=0, max_size=40)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, max_size=30), st.integers(1, 4), st.integers(1, 3), st.data())
def test_prompts_are_of_held_out_rows_alone_and_do_not_depend_on_their_order(texts, count, words, data):
    trained = {content_hash(t) for t in texts if data.draw(st.booleans())}
    try:
        made = make_prompts([(t, "") for t in texts], count, words, trained)
    except InputError as error:
        free = {
            " ".join(t.split()[:words]).casefold()
            for t in texts
            if content_hash(t) not in trained and len(t.split()) >= words + 3
        }
        assert len(free) < count and "lower" in str(error)
        return
    assert len({content_hash(p.text) for p in made}) == len(made) == count
    sources = {content_hash(t): t for t in texts}
    for prompt in made:
        assert prompt.source not in trained
        assert len(prompt.text.split()) == words
        assert [w.casefold() for w in sources[prompt.source].split()[:words]] == [
            w.casefold() for w in prompt.text.split()
        ]
    again = make_prompts([(t, "") for t in reversed(texts)], count, words, trained)
    assert [p.source for p in again] == [p.source for p in made]


def test_a_file_of_prompts_says_which_columns_it_may_have(tmp_path):
    file = tmp_path / "prompts.csv"
    file.write_text("question,kind\nwho are,a\n")
    with pytest.raises(InputError, match=r"'prompt' or 'text'.*\(columns: question, kind\)") as error:
        given_prompts(str(file))
    assert "--prompt-column" not in str(error.value)  # an option of another command
    file.write_text("text,kind\nwho are,a\n")
    assert [(p.text, p.group) for p in given_prompts(str(file), "kind")] == [("who are", "a")]


def test_a_copy_is_the_same_content_however_it_is_spaced():
    assert content_hash(" You  Idiot\n") == content_hash("you idiot") != content_hash("you idiots")


def test_prompts_that_begin_a_row_of_a_corpus_are_counted():
    texts = ["You are a silly goose today", None, "they went home", "You  ARE a fool"]
    assert begun_by(texts, ["you are a", "they came", "they went home", "nobody"]) == 2


# ------------------------------------------------------------------------------------------------ statistics


def test_a_measure_is_the_mean_over_seeds_with_its_spread():
    found = statistics.measure({0: np.array([0.0, 1.0, 0.5]), 1: np.array([1.0, 1.0, 1.0])})
    assert found.value.mean == pytest.approx(0.75) and found.value.n == 3
    assert found.by_seed == {0: 0.5, 1: 1.0} and found.spread == pytest.approx(np.std([0.5, 1.0], ddof=1))
    assert statistics.measure({0: np.ones(4)}, share=True).value.low < 1  # four prompts prove no certainty


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.05, 1.0))
def test_a_reduction_is_what_was_taken_away_and_lies_in_its_interval(seed, factor):
    raw = np.random.default_rng(seed).uniform(0.1, 1, 50)
    found = statistics.reduction({0: raw * factor}, {0: raw, 1: raw})
    assert found.mean == pytest.approx(1 - factor) and found.low <= found.mean <= found.high
    assert found.high - found.low < 1e-9  # the same share of every prompt: nothing is left to chance
    gap = statistics.paired({0: raw * factor}, {0: raw})
    assert gap.difference.mean == pytest.approx((factor - 1) * raw.mean())


def test_only_seeds_that_both_have_are_paired():
    a, b = np.array([0.0, 1.0]), np.array([1.0, 1.0])
    assert statistics.paired({0: a, 5: b}, {0: b, 6: a}).difference.mean == -0.5
    assert statistics.paired({0: a}, {1: b}) is None and statistics.reduction({0: a}, {1: b}) is None
    assert statistics.reduction({0: a}, {0: np.zeros(2)}) is None


# -------------------------------------------------------------------------------------------------- the page


def results_of(figures: dict[str, tuple[float, float]]) -> dict:
    """Results of arms with the given EMT and its reduction, as the page takes them."""

    def ci(mean: float) -> dict:
        return {
            "mean": mean,
            "low": mean - 0.05,
            "high": mean + 0.05,
            "n": 200,
            "by_seed": {"0": mean},
            "spread": None,
        }

    nothing = {"stages": 0, "seconds": 0.0, "tokens": 0}
    listed = [
        {
            "name": name, "meaning": arms.meaning(name), "main": True, "given": False, "seeds": [0], "prompts": 200,
            "rows": 10, "kept": 1.0, "characters": 9, "changed": None, "actions": {}, "corpus_tokens": 3, "judge_mean": 0.5,
            "judge_share": 0.5, "begun_prompts": 0, "facts_kept": None, "making": {"seconds": None, "tokens": None},
            "steps": 1, "epochs": 1.0, "train_loss": 1.0, "tokens_trained": 3, "tp": ci(emt), "emt": ci(emt),
            "rate": ci(emt), "rate_reduction": ci(cut) if name != "raw" else None, "rate_apart": True,
            "distinct": [ci(0.5)] * 3, "perplexity": None, "neutral": None,
            "cost": dict.fromkeys(("toxic", "corpus", "facts", "train", "toxicity", "utility"), nothing),
            "tp_reduction": ci(cut) if name != "raw" else None, "emt_reduction": ci(cut) if name != "raw" else None,
            "emt_apart": True, "tp_apart": False,
        }
        for name, (emt, cut) in figures.items()
    ]  # fmt: skip
    gap = {"difference": ci(0.4), "p_value": 0.001}
    pairs = [
        {"a": a, "b": b, "tp": gap, "emt": gap}
        for a, b in zip(list(figures), list(figures)[1:], strict=False)
    ]
    return {
        "tamis_version": "1", "finished": "2026-01-01T00:00:00+00:00", "complete": False, "command": "tamis compare <x>",
        "config": config().model_dump(mode="json"), "judge": {"judge": "j@1", "rankers": ["r@1"], "note": ""},
        "device": "CPU", "prompts": {"n": 200, "made": True, "words": 8}, "arms": listed, "focus": "logratio",
        "baseline": None, "pairs": pairs, "waiting": ["train-x-0"], "failed": {"train-y-0": "no <text>"},
        "cost": {"train": {"stages": 2, "seconds": 90.0, "tokens": 6}, "toxic": nothing},
    }  # fmt: skip


def test_the_headline_says_what_the_intervals_allow():
    good = results_of({"raw": (0.8, 0), "logratio": (0.4, 0.5)})
    assert "50 % less toxic" in page.headline(good)
    weak = results_of({"raw": (0.8, 0), "logratio": (0.78, 0.02)})
    assert "no difference" in page.headline(weak)
    worse = results_of({"raw": (0.4, 0), "logratio": (0.8, -1.0)})
    assert "100 % more toxic" in page.headline(worse)


def test_the_page_escapes_what_it_shows_and_says_what_is_missing():
    results = results_of({"raw": (0.8, 0), "logratio": (0.4, 0.5), "base": (0.3, 0.6)})
    html = page.render("compare.html.jinja", results)
    assert "&lt;x&gt;" in html and "no &lt;text&gt;" in html and "<x>" not in html
    assert "train-x-0" in html and "not done yet" in html
    tables = page.render("compare_tables.md.jinja", results)
    assert "| logratio | 100 % | 1.00 | 0.400 [0.350, 0.450] | 50.0 % [45.0, 55.0] |" in tables
    # raw stands before logratio in its pair, and after it in base's: the sign is turned where it must be.
    assert "| raw | -0.400 [-0.450, -0.350] |" in tables and "| base | +0.400 [+0.350, +0.450] |" in tables
    assert "| train | 2 | 1 min 30 s | 6 |" in tables and "toxic |" not in tables.split("core time")[1]
