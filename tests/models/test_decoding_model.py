"""SoCD as a language model: two adapters on one base, or two models, on tiny random ones."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from models.decoding.model import SoCDModel
from models.decoding.pair import TwoAdapters, TwoModels, check_one_vocabulary, load_pair
from models.decoding.socd import SoCDSettings, steer
from models.lm.factors import difference, read_factors, stack_adapters
from models.lm.local import LocalLanguageModel
from models.protocols import GenerationRequest, LanguageModel, Message, Sampling
from schemas.errors import ModelError
from tests.models.tiny_lm import make_tokenizer, save_adapter, save_base, save_tiny_lm

SAMPLING = Sampling(temperatures=(0.0, 0.8, 1.5), per_temperature=2, max_new_tokens=24)
TEXTS = ("What a dumb idea.", "You stupid idiot, go away!", "Nice.")
OPTIONS = {"dtype": "float32", "threads": 1, "device": "cpu"}


def request(text, seed=5):
    return GenerationRequest((Message("user", f"Rewrite: {text}"),), seed=seed, prefill="<answer>")


REQUESTS = [request(text, seed) for seed, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base model, another one, and adapters."""
    folder = tmp_path_factory.mktemp("socd")
    base = save_base(folder / "base", 0)
    return {
        "base": base,
        "other": save_base(folder / "other", 1),
        "a": save_adapter(folder / "a", base, 1),
        "b": save_adapter(folder / "b", base, 2, r=6),
        "near": save_adapter(folder / "near", base, 5, scale=0.02),
        "few": save_adapter(folder / "few", base, 3, targets=["q_proj", "down_proj"], use_rslora=True),
        "dora": save_adapter(folder / "dora", base, 4, use_dora=True),
        "stacked": save_stacked(folder, base),
    }


def save_stacked(folder, base):
    """An adapter on top of `a`, of other linear layers, in the last of two layers only."""
    top = [f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]
    stacked = save_adapter(folder / "stacked", base, 7, targets=top, r=3)
    stack_adapters(folder / "a", stacked)
    return stacked


def texts_of(generations):
    return [[candidate.text for candidate in generation.candidates] for generation in generations]


def two_models(made, adapter, toxic_adapter, **options):
    """What `load_pair` makes of adapters it cannot put on one base."""
    options = {**OPTIONS, **options}
    base, toxic = (LocalLanguageModel(made["base"], adapter=a, **options) for a in (adapter, toxic_adapter))
    return TwoModels(base, toxic)


# -- both sides in one forward pass ------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("adapter", "toxic"), [(None, "a"), ("a", "b"), ("a", "few"), ("few", None), ("a", "stacked")]
)
def test_two_adapters_on_one_base_are_two_models(made, adapter, toxic, fast):
    shared = int(toxic == "stacked")
    adapter, toxic = (made[name] if name else None for name in (adapter, toxic))
    one = load_pair(made["base"], adapter=adapter, toxic_adapter=toxic, fast=fast, **OPTIONS)
    assert isinstance(one, TwoAdapters) and one.shared == shared
    two = two_models(made, adapter, toxic, fast=fast)
    ids = one.base.tokenizer.encode("You stupid thing")
    with one.base.exclusive(), two.base.exclusive():
        for side, expected in zip(one.logits(ids, 9), two.logits(ids, 9), strict=True):
            torch.testing.assert_close(side, expected, rtol=1e-3, atol=1e-3)
        base, toxic_side = two.logits(ids, 9)
        assert (base - toxic_side).abs().max() > 0.05  # or the comparison shows nothing


@pytest.mark.parametrize("toxic", ["b", "stacked"])
@pytest.mark.parametrize("fast", [True, False])
def test_decoders_give_both_sides_along_a_continuation(made, fast, toxic):
    one = load_pair(made["base"], adapter=made["a"], toxic_adapter=made[toxic], fast=fast, **OPTIONS)
    two = two_models(made, made["a"], made[toxic], fast=fast)
    prompt = one.base.encode(REQUESTS[0])
    written = torch.randint(200, (5, 3), generator=torch.Generator().manual_seed(0))
    seen = []
    with torch.inference_mode():
        for pair in (one, two):
            decoder = pair.decoder()
            steps = [decoder.start([prompt], 3, 8)]
            steps += [decoder.step(tokens) for tokens in written[:3]]
            decoder.keep([2, 1])
            steps += [decoder.step(tokens[[2, 1]]) for tokens in written[3:]]
            decoder.reset()
            seen.append(steps)
    for left, right in zip(*seen, strict=True):
        for side, expected in zip(left, right, strict=True):
            torch.testing.assert_close(side, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("toxic", ["b", "stacked"])
def test_each_side_reads_the_same_prompt(made, toxic):
    pair = load_pair(made["base"], adapter=made["a"], toxic_adapter=made[toxic], **OPTIONS)
    prompt = pair.base.encode(REQUESTS[1])
    with pair.base.exclusive():
        started = pair.decoder().start([prompt], 2, 4)
        for side, expected in zip(started, pair.logits(prompt, 1), strict=True):
            torch.testing.assert_close(side, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("toxic", ["b", "stacked"])
def test_the_base_side_alone_is_untouched_by_its_toxic_side(made, toxic):
    pair = load_pair(made["base"], adapter=made["a"], toxic_adapter=made[toxic], **OPTIONS)
    alone = LocalLanguageModel(made["base"], adapter=made["a"], **OPTIONS)
    assert texts_of(pair.base.generate(REQUESTS, SAMPLING)) == texts_of(alone.generate(REQUESTS, SAMPLING))


def test_another_kind_of_adapter_gets_its_own_weights(made):
    assert read_factors(made["dora"]) is None
    pair = load_pair(made["base"], adapter=made["a"], toxic_adapter=made["dora"], **OPTIONS)
    assert isinstance(pair, TwoModels)


@pytest.mark.parametrize("name", ["a", "few"])
def test_factors_are_the_change_peft_makes(made, name):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(made["base"])
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made["base"]), made[name])
    before, after = plain.state_dict(), adapted.merge_and_unload().state_dict()
    factors = read_factors(made[name])
    changed = {key.removesuffix(".weight") for key in before if not torch.equal(before[key], after[key])}
    assert set(factors) == changed
    for module, (up, down) in factors.items():
        key = f"{module}.weight"
        torch.testing.assert_close(before[key] + up @ down, after[key], rtol=1e-5, atol=1e-6)


# -- adapters on top of others -----------------------------------------------------------------------------------


def test_a_stacked_adapter_is_one_adapter_on_the_plain_base(made, tmp_path):
    """As peft merges them one after the other."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    top = ["model.layers.1.mlp.up_proj"]
    above = save_adapter(tmp_path / "above", made["base"], 8, targets=top, r=2, scale=0.2)
    plain = AutoModelForCausalLM.from_pretrained(made["base"])
    below = PeftModel.from_pretrained(plain, made["few"]).merge_and_unload()
    expected = PeftModel.from_pretrained(below, above).merge_and_unload().state_dict()
    stack_adapters(made["few"], above)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made["base"]), above)
    for key, weight in again.merge_and_unload().state_dict().items():
        torch.testing.assert_close(weight, expected[key], rtol=1e-5, atol=1e-6)


def test_what_a_stacked_adapter_has_in_common_with_the_one_below_cancels_out(made):
    whole = difference(read_factors(made["stacked"]), read_factors(made["a"]))
    assert sorted(whole) == [
        f"model.layers.1.{n}" for n in ("mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj")
    ]
    assert all(factors.down.shape[0] == 3 for factors in whole.values())
    assert difference(read_factors(made["a"]), read_factors(made["a"])) == {}
    assert len(difference(read_factors(made["stacked"]), read_factors(made["b"]))) == 14  # nothing in common


def test_layers_in_common_are_computed_once(made):
    pair = load_pair(made["base"], adapter=made["a"], toxic_adapter=made["stacked"], **OPTIONS)
    rows = {}
    for number, layer in enumerate(pair.base.model.model.layers):
        note = lambda module, args, number=number: rows.setdefault(number, []).append(args[0].shape[0])  # noqa: E731
        layer.mlp.register_forward_pre_hook(note)
    decoder = pair.decoder()
    with torch.inference_mode():
        decoder.start([pair.base.encode(REQUESTS[0])], 5, 4)
        decoder.step(torch.arange(5))
    assert rows[0] == [1] * (len(rows[0]) - 1) + [5] and rows[1] == [2] * (len(rows[0]) - 1) + [10]


def test_nothing_is_stacked_on_another_kind_of_adapter(made, tmp_path):
    with pytest.raises(ModelError, match="no plain LoRA adapter"):
        stack_adapters(made["dora"], shutil.copytree(made["b"], tmp_path / "b"))


# -- as a language model -----------------------------------------------------------------------------------------


def test_it_is_a_language_model(made):
    model = SoCDModel(made["base"], adapter=made["a"], toxic_adapter=made["b"], **OPTIONS)
    assert isinstance(model, LanguageModel)
    (offsets, logprobs), *_ = model.score_tokens(["Nice."])
    assert len(offsets) == len(logprobs) == model.count_tokens("Nice.")


def test_prompt_only_is_the_base_model(made):
    base = LocalLanguageModel(made["base"], adapter=made["a"], **OPTIONS)
    model = SoCDModel(made["base"], adapter=made["a"], settings=SoCDSettings("prompt_only"), **OPTIONS)
    assert model.info == base.info
    assert model.generate(REQUESTS, SAMPLING) == base.generate(REQUESTS, SAMPLING)
    with pytest.raises(ModelError, match="prompt_only"):
        model.contrast(["x"])


def test_settings_share_the_weights_of_a_pair_and_prompt_only_is_its_base_side(made):
    alone = SoCDModel(made["base"], adapter=made["a"], toxic_adapter=made["b"], **OPTIONS)
    pair = load_pair(made["base"], adapter=made["a"], toxic_adapter=made["b"], **OPTIONS)
    sides = {"adapter": made["a"], "toxic_adapter": made["b"], "pair": pair}
    official, steered, plain = (
        SoCDModel(made["base"], settings=SoCDSettings(mode), **sides)
        for mode in ("official", "logratio", "prompt_only")
    )
    assert official.base is steered.base is plain.base
    assert texts_of(official.generate(REQUESTS, SAMPLING)) != texts_of(steered.generate(REQUESTS, SAMPLING))
    assert (steered.info, steered.generate(REQUESTS, SAMPLING)) == (
        alone.info,
        alone.generate(REQUESTS, SAMPLING),
    )
    base = LocalLanguageModel(made["base"], adapter=made["a"], **OPTIONS)
    assert (plain.info, plain.generate(REQUESTS, SAMPLING)) == (base.info, base.generate(REQUESTS, SAMPLING))


def test_a_force_of_nothing_is_the_base_model(made):
    base = LocalLanguageModel(made["base"], adapter=made["a"], **OPTIONS)
    still = SoCDModel(
        made["base"], adapter=made["a"], toxic_adapter=made["b"], settings=SoCDSettings(strength=0), **OPTIONS
    )
    assert texts_of(still.generate(REQUESTS, SAMPLING)) == texts_of(base.generate(REQUESTS, SAMPLING))


@pytest.mark.parametrize(
    ("mode", "raw", "penalty"),
    [("logratio", False, 1.0), ("logratio", True, 1.3), ("official", False, 1.3), ("vanilla_cd", False, 1.3)],
)
def test_candidates_follow_the_edited_scores(made, mode, raw, penalty):
    """Greedy decoding against the method written out, with plain transformers for both models."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    # The likeliest token is seldom among the few that the toxic model prefers most: all may be edited, and strongly.
    chosen = SoCDSettings(mode, k_min=300, compare_raw=raw, strength=50.0)
    model = SoCDModel(made["base"], toxic_adapter=made["near"], settings=chosen, **OPTIONS)
    sampling = Sampling((0.0,), 1, repetition_penalty=penalty, top_k=0, max_new_tokens=16)
    base, toxic = (AutoModelForCausalLM.from_pretrained(made["base"]).eval() for _ in range(2))
    toxic = PeftModel.from_pretrained(toxic, made["near"]).eval()
    end = model.base.tokenizer.eos_token_id
    expected = []
    for one in REQUESTS:
        ids = model.base.encode(one)
        start = len(ids)
        with torch.inference_mode():
            while len(ids) < start + 16 and ids[-1] != end:
                s, z = (side(torch.tensor([ids])).logits[:, -1].float() for side in (base, toxic))
                seen, logits = sorted(set(ids)), s.clone()
                s[:, seen] = torch.where(s[:, seen] < 0, s[:, seen] * penalty, s[:, seen] / penalty)
                ids.append(int(steer(s, z, chosen, raw=logits).scores.argmax()))
        expected.append([model.base.tokenizer.decode(ids[start:], skip_special_tokens=True)])
    assert texts_of(model.generate(REQUESTS, sampling)) == expected
    assert texts_of(model.base.generate(REQUESTS, sampling)) != expected  # or nothing was steered


def test_two_models_of_one_tokenizer(made):
    model = SoCDModel(made["base"], toxic=made["other"], **OPTIONS)
    same = SoCDModel(made["base"], toxic=made["other"], **OPTIONS)
    assert texts_of(model.generate(REQUESTS, SAMPLING)) == texts_of(same.generate(REQUESTS, SAMPLING))
    base = LocalLanguageModel(made["base"], **OPTIONS)
    assert texts_of(model.generate(REQUESTS, SAMPLING)) != texts_of(base.generate(REQUESTS, SAMPLING))


def test_padded_rows_of_the_output_layer_are_cut(made, tmp_path):
    size = len(make_tokenizer())
    wide = save_tiny_lm(tmp_path / "wide", seed=1, vocab_size=size + 45)
    model = SoCDModel(made["base"], toxic=wide, **OPTIONS)
    sampling = dataclasses.replace(SAMPLING, top_k=0)
    for generation in model.generate(REQUESTS, sampling):
        assert generation.error is None
    with model.base.exclusive():
        for side in model._pair.logits([1, 2, 3], 2):
            assert side.shape == (2, size)


# -- the same candidates whatever runs beside them ---------------------------------------------------------------


@pytest.mark.parametrize("toxic", ["b", "stacked", "model"])
def test_a_request_gives_the_same_candidates_alone_and_beside_others(made, toxic):
    other = {"toxic": made["other"]} if toxic == "model" else {"toxic_adapter": made[toxic]}
    model = SoCDModel(made["base"], adapter=made["a"], **other, **OPTIONS)
    together = model.generate(REQUESTS, SAMPLING)
    assert [model.generate([one], SAMPLING)[0] for one in REQUESTS] == together
    assert model.generate(REQUESTS[::-1], SAMPLING)[::-1] == together


def test_short_answers_are_not_decoded_in_batches_so_large_that_products_round_otherwise(tmp_path):
    wide = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    base = save_tiny_lm(tmp_path / "base", seed=0, **wide)
    sides = {"adapter": save_adapter(tmp_path / "a", base, 1, scale=0.05)}
    sides |= {"toxic_adapter": save_adapter(tmp_path / "b", base, 2, scale=0.05)}
    model = SoCDModel(base, **sides, **OPTIONS)
    short = Sampling(temperatures=(0.6, 0.8, 1.0, 1.2, 1.5), per_temperature=2, max_new_tokens=6)
    requests = [request(f"text number {i}", seed=i) for i in range(8)]

    def alphas(asked):
        (_, traces), *_ = model.generate_traced(asked, short)
        return [trace.alpha for trace in traces]

    assert model.base.most_rows < len(requests) * short.n
    assert alphas(requests) == alphas(requests[:1])


@pytest.mark.parametrize("toxic", ["b", "stacked", "model"])
def test_padding_changes_nothing(made, toxic):
    """Prompts of different lengths in one left-padded batch, both sides masked and positioned."""
    other = {"toxic": made["other"]} if toxic == "model" else {"toxic_adapter": made[toxic]}
    other |= {"adapter": made["a"]} if toxic == "stacked" else {}
    padded = SoCDModel(made["base"], **other, fast=False, batch_rows=100, **OPTIONS)
    alone = SoCDModel(made["base"], **other, fast=False, batch_rows=1, **OPTIONS)
    lengths = {len(padded.base.encode(one)) for one in REQUESTS}
    assert len(lengths) == len(REQUESTS)
    assert texts_of(padded.generate(REQUESTS, SAMPLING)) == texts_of(alone.generate(REQUESTS, SAMPLING))


def test_layers_that_read_one_tensor_are_computed_once_and_nothing_is_held(made):
    from models.decoding.low_rank import SidedLinear

    pair = load_pair(made["base"], adapter=made["a"], toxic_adapter=made["b"], **OPTIONS)
    groups = {id(m.siblings): m.siblings for m in pair.base.model.modules() if isinstance(m, SidedLinear)}
    assert sorted(len(group.sizes) for group in groups.values()) == [
        1,
        1,
        1,
        1,
        2,
        2,
        3,
        3,
    ]  # two layers of each
    pair.base.generate(REQUESTS, SAMPLING)
    assert all(
        group._rows is None and not any(x is not None for x in group._outputs) for group in groups.values()
    )


def test_done_is_told_of_every_request(made):
    model = SoCDModel(made["base"], toxic_adapter=made["b"], **OPTIONS)
    told = {}
    generations = model.generate(REQUESTS, SAMPLING, told.__setitem__)
    assert [told[index] for index in range(len(REQUESTS))] == generations


# -- records -----------------------------------------------------------------------------------------------------


def test_the_revision_covers_both_models_and_every_setting(made):
    def revision(**changes):
        return SoCDModel.describe(
            made["base"], **{"adapter": made["a"], "toxic_adapter": made["b"], **changes}
        ).revision

    revisions = [
        revision(),
        revision(adapter=None),
        revision(toxic_adapter=made["few"]),
        revision(toxic_adapter=None, toxic=made["other"]),
        revision(settings=SoCDSettings("official")),
        revision(settings=SoCDSettings(divergence="js")),
        revision(settings=SoCDSettings(k_min=3)),
        revision(settings=SoCDSettings(dynamic_k=False)),
        revision(settings=SoCDSettings(strength=2.0)),
    ]
    assert len(set(revisions)) == len(revisions)
    assert revision(settings=SoCDSettings(beta1=2.0)) == revisions[0]  # means nothing in this mode


def test_a_toxic_model_a_job_trained_is_called_the_same_wherever_the_job_lies(made, tmp_path):
    described = []
    for out in ("here", "there"):
        shutil.copytree(made["b"], tmp_path / out / "_tamis/toxic-model")
        toxic = tmp_path / out / "_tamis/toxic-model"
        described.append(SoCDModel.describe(made["base"], toxic_adapter=toxic, name="tiny"))
    assert described[0].tag == described[1].tag and described[0].name.endswith("+toxic-model")
    assert str(tmp_path / "here") not in json.dumps(dataclasses.asdict(described[0]))


def test_describe_says_what_loading_will(made):
    options = {"adapter": made["a"], "toxic_adapter": made["b"]}
    described = SoCDModel.describe(made["base"], **options, name="tiny")
    loaded = SoCDModel(made["base"], **options, name="tiny", **OPTIONS).info
    assert (described.name, described.revision) == (loaded.name, loaded.revision)
    assert loaded.extra["decoding"] == SoCDSettings().relevant()
    assert loaded.extra["dtype"] == "float32"
    json.dumps(loaded.extra)


def test_another_tokenizer_is_refused_before_weights_are_loaded(made, tmp_path):
    foreign = save_tiny_lm(tmp_path / "foreign")
    tokens = json.loads((foreign / "tokenizer.json").read_text("utf-8"))
    vocabulary = tokens["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (foreign / "tokenizer.json").write_text(json.dumps(tokens), "utf-8")
    with pytest.raises(ModelError, match="2 tokens differ"):
        SoCDModel.describe(made["base"], toxic=foreign)
    with pytest.raises(ModelError, match="one vocabulary"):
        SoCDModel(made["base"], toxic=foreign, **OPTIONS)


def test_a_tokenizer_written_otherwise_but_equal_is_accepted():
    check_one_vocabulary(make_tokenizer(), make_tokenizer(chat=False), "a", "b")


def test_a_model_is_not_contrasted_with_itself(made):
    for same in ({}, {"toxic": made["base"]}, {"adapter": made["a"], "toxic_adapter": made["a"]}):
        with pytest.raises(ModelError, match="the toxic side is the base side"):
            SoCDModel.describe(made["base"], **same)


def test_no_toxic_model_there(made, tmp_path):
    with pytest.raises(ModelError, match="No model folder"):
        SoCDModel.describe(made["base"], toxic=tmp_path / "none")
    with pytest.raises(ModelError, match="No adapter"):
        SoCDModel.describe(made["base"], toxic_adapter=tmp_path / "none")


# -- traces and contrasts ----------------------------------------------------------------------------------------


def test_a_trace_has_an_entry_for_each_token(made):
    model = SoCDModel(made["base"], adapter=made["a"], toxic_adapter=made["b"], **OPTIONS)
    traced = model.generate_traced(REQUESTS, SAMPLING)
    assert [generation for generation, _ in traced] == model.generate(REQUESTS, SAMPLING)
    for generation, traces in traced:
        for candidate, trace in zip(generation.candidates, traces, strict=True):
            assert len(trace.alpha) == len(trace.k) == len(trace.edited) == candidate.tokens
            assert len(trace.tokens) == candidate.tokens
            pieces = model.token_texts(trace.tokens)
            assert len(pieces) == candidate.tokens and "".join(pieces).startswith(candidate.text)
            assert all(0 <= alpha < 0.4685 for alpha in trace.alpha)
            assert all(0 <= edited <= k for edited, k in zip(trace.edited, trace.k, strict=True))
        assert any(sum(trace.edited) for trace in traces)


def test_a_contrast_is_what_the_first_step_of_a_trace_measures(made):
    model = SoCDModel(made["base"], adapter=made["a"], toxic_adapter=made["b"], **OPTIONS)
    sampling = Sampling((0.0,), 1, repetition_penalty=1.0, max_new_tokens=16)
    ((generation, (trace,)),) = model.generate_traced([REQUESTS[0]], sampling)
    text = generation.candidates[0].text
    (along,) = model.contrast([text], [REQUESTS[0]])
    assert [text[a:b] for a, b in along.offsets] == list(text) or len(text.encode()) != len(text)
    np.testing.assert_allclose(along.alpha[:1], trace.alpha[:1], atol=1e-4)
    if len(along.offsets) == len(trace.alpha):
        np.testing.assert_allclose(along.alpha, trace.alpha, atol=1e-4)


def test_a_long_text_is_read_in_windows(made, monkeypatch):
    from models.decoding import contrast

    model = SoCDModel(made["base"], adapter=made["a"], toxic_adapter=made["b"], **OPTIONS)
    text = "You are a silly person. " * 6
    (whole,) = model.contrast([text])
    monkeypatch.setattr(contrast, "WINDOW", 40)
    (pieces,) = model.contrast([text])
    assert pieces.offsets == whole.offsets
    assert len(pieces.alpha) == len(text)
    np.testing.assert_allclose(pieces.force[:40], whole.force[:40], atol=1e-4)
    # The second window begins in the middle of the first, and reads on where that ended.
    (second,) = model.contrast([text[20:60]])
    np.testing.assert_allclose(pieces.force[40:60], second.force[20:], atol=1e-4)


def test_a_text_without_tokens_has_no_contrast(made):
    model = SoCDModel(made["base"], toxic_adapter=made["b"], **OPTIONS)
    (empty,) = model.contrast([""])
    assert empty.offsets == []
    assert len(empty.force) == len(empty.edited) == 0


def test_a_prompt_without_room_is_an_error(made):
    model = SoCDModel(made["base"], toxic_adapter=made["b"], context_limit=32, **OPTIONS)
    with pytest.raises(ModelError, match="leaves no room"):
        model.contrast(["x"], [request("very " * 20)])
