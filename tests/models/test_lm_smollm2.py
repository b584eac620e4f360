"""The embedded model as it is used: exact in any batch, and close to float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models import store
from models.lm import packed
from models.lm.local import LocalLanguageModel
from models.prompts import load_prompt
from models.protocols import GenerationRequest, Sampling

pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(
        not store.available("smollm2"), reason="smollm2 is not pulled (tamis models pull smollm2)"
    ),
]

TEXTS = [
    "That was a stupid thing to say, Ben, and the 3 dogs heard it.",
    "Only a moron would pay 40 euros for a phone that is broken. Take it back to the shop on Mill Street.",
    "Damn.",
]


@pytest.fixture(scope="module")
def lm():
    return LocalLanguageModel(store.path("smollm2"), name="smollm2", device="cpu")


def test_is_prepared(lm):
    assert lm.info.name == "smollm2" and lm.info.revision == store.package("smollm2").revision
    assert lm._prepared.shared
    if packed.can_pack(torch.bfloat16):
        assert lm.info.extra["dtype"] == "bfloat16" and lm.batch_rows > 1


def test_neighbours_change_no_bit(lm):
    prompt = load_prompt("detox-rewrite-v1")
    requests = []
    for seed, text in enumerate(TEXTS):
        messages, prefill, stop = prompt.render(text=text)
        requests.append(GenerationRequest(messages, seed, prefill, stop))
    sampling = Sampling((0.0, 1.0), 2, max_new_tokens=10)
    together = lm.generate(requests, sampling)
    assert [lm.generate([request], sampling)[0] for request in requests] == together
    assert all(len(c.text) > 0 for g in together for c in g.candidates)


def test_bfloat16_scores_are_close_to_float32_ones(lm):
    exact = LocalLanguageModel(store.path("smollm2"), device="cpu", dtype="float32", fast=False)
    for (offsets, scores), (others, reference) in zip(
        lm.score_tokens(TEXTS[:2]), exact.score_tokens(TEXTS[:2]), strict=True
    ):
        assert offsets == others
        assert np.abs(scores - reference).mean() < 0.1 and abs(scores.mean() - reference.mean()) < 0.05
