"""The loss of a batch: against sentence-transformers, in chunks, across processes, and in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.losses.cached import encode_chunks
from models.losses.retrieval import batch_loss
from models.losses.settings import LOSSES, LossSettings
from models.losses.targets import GroupIds

ROOT = Path(__file__).resolve().parents[2]


def batch(b=4, p=2, n=3, d=8, seed=0, dtype=torch.float64):
    """Queries with documents of their own: vectors, and who is whose."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(b, d, generator=generator, dtype=dtype)
    documents = torch.randn(b * (p + n), d, generator=generator, dtype=dtype)
    numbers = torch.arange(b * (p + n)).reshape(b, p + n)
    none = torch.full((b, 1), -1)
    return queries, documents, GroupIds(numbers.flatten(), numbers[:, :p], numbers[:, p:], none)


@pytest.mark.parametrize("name", ["mnrl", "single_lh"])
def test_one_positive_is_sentence_transformers_own_ranking_loss(name):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    queries, documents, groups = batch(b=5, p=1, n=2, dtype=torch.float32)
    own = batch_loss(queries, documents, groups, LossSettings(name, scale=20.0), cosine=True)
    columns = documents.reshape(5, 3, -1)
    theirs = MultipleNegativesRankingLoss(model=None, scale=20.0).compute_loss_from_embeddings(
        [queries, *(columns[:, i] for i in range(3))], None
    )
    assert float(own.mean) == pytest.approx(float(theirs), rel=1e-5)


def test_a_document_of_several_queries_is_no_negative_of_its_own():
    """The same document for two queries, as a positive and as a candidate, is one column and is masked by query."""
    torch.manual_seed(0)
    queries, documents = torch.randn(2, 4), torch.randn(3, 4)
    groups = GroupIds(
        torch.tensor([5, 6, 7]),
        torch.tensor([[5], [6]]),
        torch.tensor([[7], [7]]),
        torch.tensor([[6], [-1]]),
    )
    found = batch_loss(queries, documents, groups, LossSettings("single_lh"), cosine=False)
    s = queries @ documents.T
    first = torch.logsumexp(s[0, [0, 2]], 0) - s[0, 0]  # document 6 is masked for the first query
    second = torch.logsumexp(s[1], 0) - s[1, 1]
    assert float(found.total) == pytest.approx(float(first + second), rel=1e-5)
    assert int(found.usable) == 2


def test_the_mean_is_over_usable_queries():
    queries, documents, groups = batch(b=3, p=1, n=2)
    without = GroupIds(groups.documents, groups.positives.clone(), groups.negatives, groups.masked)
    without.positives[1] = -1
    found = batch_loss(queries, documents, without, LossSettings("lse_pair"), cosine=True, in_batch=False)
    kept = GroupIds(
        groups.documents, groups.positives[[0, 2]], groups.negatives[[0, 2]], groups.masked[[0, 2]]
    )
    alone = batch_loss(
        queries[[0, 2]], documents, kept, LossSettings("lse_pair"), cosine=True, in_batch=False
    )
    assert int(found.usable) == 2 and found.queries == 3
    assert float(found.mean) == pytest.approx(float(alone.mean), rel=1e-12)


def test_a_batch_without_any_usable_query_costs_nothing():
    queries, documents, groups = batch(b=2, p=1, n=1)
    nobody = GroupIds(groups.documents, torch.full((2, 1), -1), groups.negatives, groups.masked)
    leaf = queries.requires_grad_()
    found = batch_loss(leaf, documents, nobody, LossSettings("joint_lh"), cosine=True)
    found.mean.backward()
    assert float(found.mean) == 0 and not leaf.grad.any()
    assert float(found.positive_score) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_is_computed_in_float32_under_autocast_too(dtype):
    queries, documents, groups = batch(dtype=torch.float32)
    exact = batch_loss(
        queries.to(dtype), documents.to(dtype), groups, LossSettings("lse_pair", 20.0), cosine=True
    )
    with torch.autocast("cpu", torch.bfloat16):
        within = batch_loss(
            queries.to(dtype), documents.to(dtype), groups, LossSettings("lse_pair", 20.0), cosine=True
        )
    assert exact.total.dtype == torch.float32
    assert float(exact.total) == float(within.total)
    # 300 squared times 384 is more than float16 can say.
    large = torch.full((1, 384), 300.0, dtype=torch.float16)
    one = GroupIds(torch.tensor([0, 1]), torch.tensor([[0]]), torch.tensor([[1]]), torch.tensor([[-1]]))
    found = batch_loss(large, torch.cat([large, -large]), one, LossSettings("single_lh"), cosine=False)
    assert found.total.isfinite()


class Encoder(torch.nn.Module):
    """A small network with dropout."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(1)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(6, 16), torch.nn.GELU(), torch.nn.Dropout(dropout), torch.nn.Linear(16, 8)
        ).double()

    def forward(self, x):
        return self.layers(x)


def gradients(dropout, sizes, cached):
    encoder = Encoder(dropout)
    inputs = torch.randn(20, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    queries, _, groups = batch()
    torch.manual_seed(3)
    documents = encode_chunks(encoder, [(x,) for x in inputs.split(sizes)], cached=cached)
    found = batch_loss(queries, documents, groups, LossSettings("lse_pair", 5.0), cosine=True)
    found.mean.backward()
    return torch.cat([p.grad.flatten() for p in encoder.parameters()]), found.mean


def test_a_cached_batch_has_the_gradients_of_a_whole_one():
    whole, value = gradients(0.0, 20, cached=False)
    for sizes in (1, 3, 7):
        cached, again = gradients(0.0, sizes, cached=True)
        torch.testing.assert_close(cached, whole, rtol=1e-10, atol=1e-12)
        assert float(again) == pytest.approx(float(value), rel=1e-12)


def test_a_cached_batch_draws_its_dropout_once():
    """Encoded again for the gradient, a chunk must drop what it dropped the first time."""
    plain, _ = gradients(0.4, 5, cached=False)
    cached, _ = gradients(0.4, 5, cached=True)
    torch.testing.assert_close(cached, plain, rtol=1e-10, atol=1e-12)


def test_cached_chunks_are_encoded_one_at_a_time_for_their_gradient():
    alive, most = 0, 0

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            ctx.save_for_backward(x)
            return x * 1

        @staticmethod
        def backward(ctx, gradient):
            nonlocal alive
            ctx.saved_tensors  # noqa: B018 - asks for them, so the chunk is encoded again by now
            alive -= 1
            return gradient

    weight = torch.ones(1, requires_grad=True)

    chunks = [(torch.ones(2, 2),) for _ in range(6)]
    out = encode_chunks(lambda x: Watched.apply(x * weight), chunks, cached=True)
    first, alive, most = alive, 0, 0
    out.sum().backward()
    assert first == 6 and most == 1  # each was run once before, and in the backward pass never two at once
    assert float(weight.grad) == 24


PROGRAM = """
import os, sys, torch
from torch import distributed
from models.losses.retrieval import batch_loss
from models.losses.settings import LossSettings
from models.losses.targets import GroupIds
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
distributed.init_process_group("gloo")
data = torch.load(sys.argv[1], weights_only=False)
part = data["parts"][rank]
weight = data["weight"].clone().requires_grad_()
model = torch.nn.Linear(6, 8, bias=False).double()
model.weight.data.copy_(data["weight"])
model = torch.nn.parallel.DistributedDataParallel(model)
groups = GroupIds(*part["groups"])
out = {}
for name in ("lse_pair", "joint_lh"):
    model.zero_grad()
    vectors = model(torch.cat([part["queries"], part["documents"]]))
    queries, documents = vectors.split([len(part["queries"]), len(part["documents"])])
    found = batch_loss(queries, documents, groups, LossSettings(name, 3.0), cosine=True)
    usable = found.usable.clone()
    distributed.all_reduce(usable)
    (found.total / usable * world).backward()
    total = found.total.detach().clone()
    distributed.all_reduce(total)
    out[name] = {"gradient": model.module.weight.grad.clone(), "mean": total / usable}
if rank == 0:
    torch.save(out, sys.argv[2])
distributed.destroy_process_group()
"""


def test_two_processes_train_as_one_with_all_their_documents(tmp_path):
    """Negatives cross devices with their gradients; a document both have counts once; ranks of unequal size."""
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weight, queries, texts = make(8, 6), make(5, 6), make(9, 6)
    positives = torch.tensor([[0, 1], [2, -1], [3, 4], [5, -1], [6, 0]])
    negatives = torch.tensor([[2], [7], [8], [8], [7]])
    masked = torch.tensor([[5], [-1], [0], [-1], [-1]])  # 5 and 0 come from the other process
    rows = [[0, 1, 2], [3, 4]]
    documents = [[0, 1, 2, 3, 4, 7, 8], [8, 5, 7, 6, 0]]
    parts = [
        {
            "queries": queries[r],
            "documents": texts[d],
            "groups": (torch.tensor(d), positives[r], negatives[r], masked[r]),
        }
        for r, d in zip(rows, documents, strict=True)
    ]
    torch.save({"weight": weight, "parts": parts}, tmp_path / "in.pt")
    _spawn(PROGRAM, [str(tmp_path / "in.pt"), str(tmp_path / "out.pt")])
    out = torch.load(tmp_path / "out.pt")
    groups = GroupIds(torch.arange(9), positives, negatives, masked)
    for name, found in out.items():
        leaf = weight.clone().requires_grad_()
        whole = batch_loss(queries @ leaf.T, texts @ leaf.T, groups, LossSettings(name, 3.0), cosine=True)
        whole.mean.backward()
        assert found["mean"].item() == pytest.approx(whole.mean.item(), rel=1e-12)
        torch.testing.assert_close(found["gradient"], leaf.grad, rtol=1e-9, atol=1e-12)


def _spawn(program, arguments, world=2):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env={**shared, "RANK": str(r), "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stderr=subprocess.PIPE,
        )
        for r in range(world)
    ]
    for process in running:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said.decode()[-2000:]


def test_memory_is_flat_in_the_number_of_pairs():
    """A row of 2,000 positives and 2,000 negatives has four million pairs: no tensor of that size is ever made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.size = max(self.size, tensor.numel())
            return out

    sides = 2000
    numbers = torch.arange(2 * sides)
    groups = GroupIds(numbers, numbers[None, :sides], numbers[None, sides:], torch.full((1, 1), -1))
    for name in LOSSES:
        if name in ("margin_mse", "kl"):
            teacher = {"positive_teacher": torch.ones(1, sides), "negative_teacher": torch.zeros(1, sides)}
            groups = GroupIds(groups.documents, groups.positives, groups.negatives, groups.masked, **teacher)
        queries, documents = (
            torch.randn(1, 4, requires_grad=True),
            torch.randn(2 * sides, 4, requires_grad=True),
        )
        with Largest() as largest:
            batch_loss(queries, documents, groups, LossSettings(name), cosine=True).total.backward()
        assert largest.size <= 4 * 2 * sides + 1000, name
