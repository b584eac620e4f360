"""The steps: picklable names and settings, models loaded through the registry, rows rescued by the engine."""

from __future__ import annotations

import pickle
from dataclasses import fields

import pytest
from detox_parts import BagEncoder, RuleRewriter, WordLexicon, WordScorer, in_flight
from pydantic import ValidationError

from models import registry
from schemas import flight
from schemas.errors import ModelError
from transforms.detox.options import (
    CONDITIONS,
    LADDER,
    AcceptOptions,
    GateOptions,
    LocalizeOptions,
    RewriteOptions,
    SamplingOptions,
    SegmentOptions,
)
from transforms.detox.steps import (
    AcceptRewrites,
    GateToxicity,
    LocalizeToxicSpans,
    RewriteToxicSegments,
    SegmentText,
)
from transforms.shards.cache import RequestCache
from transforms.shards.steps import Step, StepContext, apply_step

TEXTS = ["Fine day. You stupid idiot, Ann!", None, "", "All is well.", "Damn, that is a damn good plan."]


def steps(gate=GateOptions(), sampling=SamplingOptions(temperatures=(0.5, 1.0), per_temperature=2)):  # noqa: B008
    return (
        SegmentText(),
        GateToxicity(gate),
        LocalizeToxicSpans(gate=gate),
        RewriteToxicSegments(RewriteOptions(sampling=sampling)),
        AcceptRewrites(gate=gate),
    )


def run(chain, texts, context):
    batch = in_flight(texts)
    for step in chain:
        step.setup(context)
        batch = apply_step(step, batch, context)
    return batch


@pytest.fixture
def parts(monkeypatch):
    """The registry with the small models of these tests."""
    made = {
        ("scorer", "lexicon"): WordLexicon(["idiot", "stupid", "damn"]),
        ("scorer", "linear"): WordScorer(name="linear"),
        ("scorer", "jigsaw-bilstm"): WordScorer(),
        ("encoder", "minilm"): BagEncoder(),
        ("lm", "smollm2"): RuleRewriter(slips=False),
    }
    asked = []

    def load(kind, name, **options):
        asked.append((kind, name))
        if (kind, name) not in made:
            raise ModelError(f"no {kind} named {name}")
        return made[kind, name]

    monkeypatch.setattr(registry, "load", load)
    return made, asked


def test_the_chain_by_names(parts, tmp_path):
    context = StepContext("text", seed=3, cache=RequestCache(str(tmp_path)))
    batch = run(steps(), TEXTS, context)
    final = batch.column("text").to_pylist()
    assert final[1:4] == TEXTS[1:4]
    assert "idiot" not in final[0] and final[0].startswith("Fine day. ") and "Ann" in final[0]
    assert context.counters["gate.flagged"] == 2 and context.counters["RewriteToxicSegments.rows_in"] == 5
    again = StepContext("text", seed=3, cache=RequestCache(str(tmp_path)))
    assert run(steps(), TEXTS, again).equals(batch)
    assert again.counters["rewrite.asked"] == 0 and again.counters["rewrite.tokens_out"] == 0


def test_empty_units_and_units_of_one_row_have_the_same_columns(parts):
    whole = run(steps(), TEXTS, StepContext("text"))
    for texts in ([], [None], ["All is well."]):
        assert run(steps(), texts, StepContext("text")).schema == whole.schema


def test_rows_do_not_depend_on_how_they_are_split(parts):
    whole = run(steps(), TEXTS, StepContext("text")).to_pylist()
    parts_ = [run(steps(), [t], StepContext("text")).to_pylist()[0] for t in TEXTS]
    for i, (a, b) in enumerate(zip(whole, parts_, strict=True)):
        assert {k: v for k, v in a.items() if k not in (flight.ROW, flight.ID)} == {
            k: v for k, v in b.items() if k not in (flight.ROW, flight.ID)
        }, i


def test_one_bad_row_does_not_take_its_batch_along(parts, monkeypatch):
    made, _ = parts

    class Choking(WordScorer):
        def score(self, texts):
            if any("poison" in t for t in texts):
                raise RuntimeError("bad tensor")
            return super().score(texts)

    made["scorer", "jigsaw-bilstm"] = Choking()
    gate = GateOptions(gate="all")
    batch = run(steps(gate), ["You idiot, go.", "poison here", "Fine."], StepContext("text"))
    assert batch.column(flight.FATE).to_pylist() == [flight.KEPT, flight.DEAD, flight.KEPT]
    assert "bad tensor" in batch.column(flight.ERROR)[1].as_py()
    assert batch.column(flight.STAGE)[1].as_py() == "GateToxicity"
    assert batch.column("text")[0].as_py() == "You person, go."


def test_steps_are_small_picklable_and_hashable():
    for step in steps():
        assert isinstance(step, Step)
        again = pickle.loads(pickle.dumps(step))
        assert again == step and hash(again) == hash(step)
        assert step.label == type(step).__name__
        assert len(pickle.dumps(step)) < 3000
        assert {f.name for f in fields(step)} >= {"options", "label"}


def test_a_missing_model_is_said_before_any_row_is_touched(parts):
    context = StepContext("text")
    with pytest.raises(ModelError, match="no scorer named nothing"):
        GateToxicity(classifier="nothing").setup(context)
    with pytest.raises(ModelError, match="no label"):
        GateToxicity(GateOptions(labels=("threat",))).setup(context)
    with pytest.raises(ModelError, match="no encoder named nothing"):
        AcceptRewrites(encoder="nothing").setup(context)


def test_models_that_no_setting_needs_are_not_loaded(parts):
    _, asked = parts
    context = StepContext("text")
    AcceptRewrites(AcceptOptions(ladder=("redact", "drop_segment")), encoder="nothing", lexicon=None).setup(
        context
    )
    GateToxicity(GateOptions(gate="all"), lexicon=None).setup(context)
    LocalizeToxicSpans(LocalizeOptions(sources=("occlusion",))).setup(context)
    assert set(asked) == {("scorer", "jigsaw-bilstm")}


@pytest.mark.parametrize(
    "options",
    [SegmentOptions(), GateOptions(), LocalizeOptions(), RewriteOptions(), AcceptOptions(skip={"names"})],
)
def test_options_are_documented_frozen_and_survive_json(options):
    assert all(f.description for f in type(options).model_fields.values())
    assert type(options).model_validate_json(options.model_dump_json()) == options
    with pytest.raises(ValidationError):
        options.anything = 1
    with pytest.raises(ValidationError):
        type(options)(unknown_setting=1)


def test_a_set_of_conditions_has_one_order():
    assert AcceptOptions(skip=("urls", "names", "urls")) == AcceptOptions(skip={"names", "urls"})


def test_options_refuse_what_makes_no_sense():
    for make in (
        lambda: GateOptions(tau=1.5),
        lambda: SegmentOptions(max_chars=0),
        lambda: SamplingOptions(temperatures=()),
        lambda: AcceptOptions(ladder=("candidate", "pray")),
        lambda: AcceptOptions(skip={"taste"}),
        lambda: AcceptOptions(ladder=()),
    ):
        with pytest.raises(ValidationError):
            make()
    assert AcceptOptions().ladder == LADDER and len(set(CONDITIONS)) == len(CONDITIONS)


@pytest.mark.models
def test_the_chain_with_the_embedded_models(tmp_path):
    context = StepContext("text", cache=RequestCache(str(tmp_path)))
    texts = ["The shop opens at 9. You are a stupid idiot. See you there, Ann.", "A quiet day by the lake."]
    chain = steps(sampling=SamplingOptions(temperatures=(0.6,), per_temperature=2, max_new_tokens=48))
    batch = run(chain, texts, context)
    final = batch.column("text").to_pylist()
    assert final[0] != texts[0] and final[1] == texts[1]
    assert final[0].startswith("The shop opens at 9. ") and final[0].endswith("See you there, Ann.")
    before, after = (
        flight.attribute(batch, name)[0]["score"].as_py() for name in ("toxicity", "toxicity_after")
    )
    assert before > 0.8 and after < 0.5
