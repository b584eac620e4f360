"""The shipped adapter: whole, small, described, and able; and the preparation of what it is trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import adapter as bench
from models.lm.folder import ADAPTERS

DETOX = ADAPTERS / "detox"
MILD = [
    "you are an idiot and you know it",
    "this damn printer is broken again",
    "What a stupid thing to say, Anna.",
    "he is a complete moron if he believes that",
    "shut up, you fool",
    "that was a dumb idea from the start",
]


def test_the_adapter_is_small_and_described():
    weights = DETOX / "adapter_model.safetensors"
    assert 1_000_000 < weights.stat().st_size <= 8_000_000
    card = (DETOX / "README.md").read_text("utf-8")
    for said in ("CC0", "Apache-2.0", "python -m benchmarks.adapter", "held-out", "people, first reference"):
        assert said in card
    settings = json.loads((DETOX / "adapter_config.json").read_text("utf-8"))
    assert settings["base_model_name_or_path"] == bench.BASE
    for text in (card, json.dumps(settings), bench.RESULTS.read_text("utf-8")):
        assert "/tmp" not in text and str(Path.home()) not in text


def test_the_adapter_was_trained_for_the_prompt_that_ships():
    from models.prompts import load_prompt

    assert load_prompt(bench.PROMPT).tag in (DETOX / "README.md").read_text("utf-8")


@pytest.mark.models
def test_the_adapter_rewrites():
    """Sampled as the job samples: nearly every text gets a candidate that is no longer toxic and near in meaning."""
    from models import registry, store
    from models.prompts import load_prompt
    from models.protocols import GenerationRequest, Sampling

    for name in ("smollm2", "jigsaw-bilstm", "minilm"):
        if not store.available(name):
            pytest.skip(f"the embedded model {name} has not been pulled")
    prompt = load_prompt(bench.PROMPT)
    requests = []
    for text in MILD:
        messages, prefill, stop = prompt.render(text=text)
        requests.append(GenerationRequest(messages, 0, prefill, stop))
    model = registry.load("lm", "smollm2", adapter="detox")
    scorer, encoder = registry.load("scorer", "jigsaw-bilstm"), registry.load("encoder", "minilm")
    rewritten = 0
    for text, generation in zip(MILD, model.generate(requests, Sampling(max_new_tokens=40)), strict=True):
        answers = [a for c in generation.candidates if (a := prompt.parse(c))]
        assert len(answers) >= 5
        toxicity = scorer.score(answers)[:, 0]
        vectors = encoder.encode([text, *answers])
        near = vectors[1:] @ vectors[0]
        rewritten += bool(((toxicity < 0.5) & (near > 0.45)).any())
    assert rewritten >= len(MILD) - 1


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=30), st.randoms())
def test_rows_are_dealt_by_content(texts, random):
    rows = [{"toxic": text if i % 2 else f" {text.upper()}!"} for i, text in enumerate(texts)]
    dealt = bench.split_rows(rows)
    assert sum(map(len, dealt.values())) == len(rows)
    mixed = rows[:]
    random.shuffle(mixed)
    where = {name: {bench.normalise(r["toxic"]) for r in part} for name, part in dealt.items()}
    assert where == {n: {bench.normalise(r["toxic"]) for r in p} for n, p in bench.split_rows(mixed).items()}
    assert not where["held_out"] & where["train"] and not where["held_out"] & where["choose"]


@pytest.mark.parametrize(
    ("source", "target", "cased", "expected"),
    [
        (
            "what a dumb idea.",
            "That is not a good idea",
            True,
            ("What a dumb idea.", "That is not a good idea."),
        ),
        (
            "what a dumb idea",
            "That is not a good idea.",
            False,
            ("what a dumb idea", "that is not a good idea"),
        ),
        ("i said  stop it !", "please stop", True, ("I said stop it !", "Please stop !")),
        ("is he stupid?", "is he well?", False, ("is he stupid?", "is he well?")),
        ("is he stupid?", "i do not trust him", False, ("is he stupid?", "i do not trust him.")),
    ],
)
def test_both_sides_of_a_pair_get_one_style(source, target, cased, expected):
    assert bench.align_style(source, target, cased) == expected


def test_joined_texts_keep_their_order_and_their_harmless_half():
    pairs = [{"source": f"dumb {i}", "target": f"not so good {i}", "row": i} for i in range(400)]
    joined = bench.join_some(pairs)
    assert 20 < len(joined) < 80
    kinds = set()
    for pair in joined:
        sources, targets = pair["source"].rstrip(".").split(". "), pair["target"].rstrip(".").split(". ")
        assert [s.split()[-1] for s in sources] == [t.split()[-1] for t in targets]
        assert all(t.startswith("Not so good") for t in targets)
        kinds.add(tuple(s.startswith("Dumb") for s in sources))
    assert kinds == {(True, True), (False, True), (True, False)}


def test_references_far_below_the_best_are_dropped():
    pair = {"source": "a", "target": "b", "similarity": 0.9, "tox_source": 0.9, "tox_target": 0.1}
    worse = {**pair, "target": "c", "similarity": 0.6}
    assert bench.keep_near_best([pair, worse]) == [pair]
    assert bench.keep_near_best([pair, {**worse, "similarity": 0.8}]) == [pair, {**worse, "similarity": 0.8}]
    assert bench.keeps(pair, floor=0.5, ceiling=0.4)
    assert not bench.keeps({**pair, "tox_target": 0.5}, floor=0.5, ceiling=0.4)
    assert not bench.keeps({**pair, "target": "A!"}, floor=0.5, ceiling=0.4)
