"""The loss: packing, padding, sharing a prompt and accumulating change how it is computed, not what it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from models.training.collate import BatchPlan, Collator
from models.training.loading import LoraSettings, add_lora, load_model, parameter_counts, resolve_model
from models.training.trainer import (
    COMPLETE,
    CausalTrainer,
    attention_mask,
    check_isolation,
    checkpoints,
    clock,
    remove_partial,
    selects_logits,
)
from schemas.errors import ModelError
from tests.models.tiny_lm import save_tiny_lm

PREFIX = [5, 6, 7, 8]


class Store:
    """Six examples with a common beginning and a learned end."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.examples = []
        for n in (3, 9, 5, 7, 4, 6):
            ids = np.array([*PREFIX, *rng.integers(10, 200, n)])
            self.examples.append((ids, [(len(PREFIX) + 2, len(ids))]))
        self.lengths = np.array([len(ids) for ids, _ in self.examples])
        self.prefix = PREFIX

    def __getitem__(self, number):
        return self.examples[number]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_lm(tmp_path_factory.mktemp("tiny"))


def make_trainer(tiny, tmp_path, *, packing="off", prefix=0, batch_size=6, attention="sdpa", accumulate=1):
    store = Store()
    plan = BatchPlan(store.lengths, np.arange(6), batch_size, 64, packing, prefix)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        max_steps=1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        disable_tqdm=True,
    )
    model = load_model(resolve_model(str(tiny)), attention=attention)
    return CausalTrainer(
        model, arguments, collator=Collator(store, 1, packing, prefix), train_plan=plan, eval_plan=plan
    )


def reference_loss(tiny) -> float:
    """Each example alone, in the plainest way."""
    model = load_model(resolve_model(str(tiny))).eval()
    total, count = 0.0, 0
    for ids, spans in Store().examples:
        with torch.no_grad():
            logprobs = model(torch.tensor(ids)[None]).logits[0].log_softmax(-1)
        for start, end in spans:
            total -= sum(float(logprobs[i - 1, ids[i]]) for i in range(start, end))
            count += end - start
    return total / count


WAYS = [
    {},
    {"batch_size": 2},
    {"packing": "isolated", "batch_size": 1},
    {"packing": "isolated", "batch_size": 1, "attention": "eager"},
    {"packing": "isolated", "batch_size": 1, "prefix": len(PREFIX)},
    {"packing": "isolated", "batch_size": 2, "prefix": 2, "attention": "eager"},
]


@pytest.mark.parametrize("way", WAYS)
def test_the_loss_is_the_same_however_rows_are_filled(tiny, tmp_path, way):
    trainer = make_trainer(tiny, tmp_path, **way)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(reference_loss(tiny), rel=1e-5)


@pytest.mark.parametrize(
    "way", [w for w in WAYS[2:] if "attention" not in w] + [{"batch_size": 2, "accumulate": 3}]
)
def test_a_step_is_the_same_however_rows_are_filled(tiny, tmp_path, way):
    plain = make_trainer(tiny, tmp_path / "a")
    other = make_trainer(tiny, tmp_path / "b", **way)
    start = {k: v.clone() for k, v in plain.model.state_dict().items()}
    plain.train()
    other.train()
    moved = 0.0
    for name, value in plain.model.state_dict().items():
        assert torch.allclose(value, other.model.state_dict()[name], atol=2e-6), name
        moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 1e-3


def test_evaluating_changes_no_random_number(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    trainer.evaluate()
    assert torch.equal(torch.rand(2), expected)


def test_masks_are_no_larger_than_needed():
    assert attention_mask(torch.tensor([[1, 1], [1, 1]]), "sdpa", torch.float32) is None
    assert attention_mask(torch.tensor([[1, 1], [1, -1]]), "sdpa", torch.float32).tolist() == [[1, 1], [1, 0]]
    assert attention_mask(torch.tensor([[1, 2]]), "sdpa", torch.float32).dtype == torch.bool
    eager = attention_mask(torch.tensor([[1, 2]]), "eager", torch.float32)
    assert eager[0, 0, 1].tolist() == [torch.finfo(torch.float32).min, 0.0]


def test_isolation_is_tried_out(tiny):
    model = load_model(resolve_model(str(tiny)))
    check_isolation(model, 64)
    leaky = torch.nn.Linear(32, 32, bias=False)
    before = model.model.embed_tokens.forward
    # A layer that looks back whatever the mask says, as convolutions and state-space layers do.
    model.model.embed_tokens.forward = lambda ids: before(ids) + leaky(before(ids)).cumsum(1)
    with pytest.raises(ModelError, match="--packing off"):
        check_isolation(model, 64)


def test_a_window_is_refused(tiny):
    model = load_model(resolve_model(str(tiny)))
    model.config.sliding_window = 32
    check_isolation(model, 32)
    with pytest.raises(ModelError, match="window of 32"):
        check_isolation(model, 33)


def test_logits_are_computed_where_they_are_needed(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path)
    assert selects_logits(trainer.model)
    shapes = []
    trainer.model.lm_head.register_forward_hook(lambda m, i, o: shapes.append(tuple(o.shape)))
    trainer.evaluate()
    assert shapes == [(sum(len(ids) - len(PREFIX) - 2 for ids, _ in Store().examples), 258)]


def test_lora_starts_as_the_base_and_trains_little(tiny):
    model = load_model(resolve_model(str(tiny)))
    ids = torch.arange(10)[None]
    before = model(ids).logits.detach()
    adapted = add_lora(model, LoraSettings(r=2, alpha=4, dora=True))
    assert torch.allclose(adapted(ids).logits, before, atol=1e-5)
    trainable, total = parameter_counts(adapted)
    assert 0 < trainable < total / 2
    with pytest.raises(ModelError, match="--lora-targets"):
        add_lora(load_model(resolve_model(str(tiny))), LoraSettings(targets=("no_such",)))


def test_only_whole_checkpoints_count(tmp_path):
    for step, whole in ((5, True), (10, True), (15, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / COMPLETE).write_text("")
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-10"]
    remove_partial(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-5"]


def test_models_that_cannot_be_trained_are_refused(tiny, tmp_path):
    with pytest.raises(ModelError, match="pass a folder"):
        resolve_model("no-such-model")
    with pytest.raises(ModelError, match="not a language model"):
        resolve_model("minilm")
    with pytest.raises(ModelError, match="no config"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    with pytest.raises(ModelError, match="no weights"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").rename(tmp_path / "adapter_config.json")
    with pytest.raises(ModelError, match="its base model"):
        resolve_model(str(tmp_path))


def test_the_clock():
    assert clock(75.9) == "1:15" and clock(3700) == "1:01:40" and clock(0) == "0:00"
