"""SoCD on the embedded model with the shipped adapter: exact in any batch, and both sides what they should be."""

from __future__ import annotations

import pytest
import torch

from models import store
from models.decoding.model import SoCDModel
from models.decoding.pair import TwoAdapters
from models.lm import packed
from models.lm.folder import ADAPTERS
from models.lm.local import LocalLanguageModel
from models.prompts import load_prompt
from models.protocols import GenerationRequest, Sampling

pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(
        not store.available("smollm2"), reason="smollm2 is not pulled (tamis models pull smollm2)"
    ),
    pytest.mark.skipif(
        not (ADAPTERS / "detox" / "adapter_config.json").is_file(),
        reason="the detox adapter is not shipped here",
    ),
]

TEXTS = ("That was a stupid thing to say, Ben, and the 3 dogs heard it.", "Damn, what a moron.")


@pytest.fixture(scope="module")
def steered():
    """The rewriter steered away from the model it was made of: any pair will do here."""
    return SoCDModel(store.path("smollm2"), adapter="detox", toxic=store.path("smollm2"), device="cpu")


def test_neighbours_change_no_bit(steered):
    prompt = load_prompt("detox-rewrite-v1")
    requests = []
    for seed, text in enumerate(TEXTS):
        messages, prefill, stop = prompt.render(text=text)
        requests.append(GenerationRequest(messages, seed, prefill, stop))
    if packed.can_pack(torch.bfloat16):
        assert steered.base.batch_rows > 1
    sampling = Sampling(temperatures=(0.6, 1.5), per_temperature=2, max_new_tokens=12)
    together = steered.generate(requests, sampling)
    assert [steered.generate([request], sampling)[0] for request in requests] == together


def test_both_sides_are_what_they_are_alone(steered):
    assert isinstance(steered._pair, TwoAdapters)
    ids = steered.base.tokenizer.encode(TEXTS[0])
    with steered.base.exclusive():
        base, toxic = (side.float() for side in steered._pair.logits(ids, 8))
    alone = LocalLanguageModel(store.path("smollm2"), device="cpu")
    with alone.exclusive():
        expected = alone.model(torch.tensor([ids])).logits[0, -8:].float()
    # In bfloat16 two right ways differ by a few percent of the logits' spread.
    apart = (toxic - expected).std() / expected.std()
    assert apart < 0.1 < 2 * (base - expected).std() / expected.std()
