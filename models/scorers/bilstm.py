"""`jigsaw-bilstm`: six Jigsaw labels by a small bidirectional LSTM over words (tox-block's network).

    ids -> embedding 50 -> BiLSTM 2 x 50 (gates: hard sigmoid) -> max over time -> ReLU 50 -> sigmoid 6

The network was trained on sequences pre-padded to exactly 100 with index 0, *unmasked*: padding is input like
any other, so it is computed here too. What can be saved is saved:

- The product of embedding and kernel is tabled once (20000 x 200 for each direction), so a step costs a
  look-up and one 50 x 200 product.
- The forward direction meets the padding first, from the zero state: its states after k paddings are the same
  for every text, and are tabled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.batching import MIN_ROWS, FloatArray, fill_rows, max_by_owner, slices, windows
from models.embedded.jigsaw_bilstm import LABELS
from models.protocols import ModelInfo
from models.scorers.numbers import refuse_nan, sigmoid

if TYPE_CHECKING:
    import torch

_OVERLAP = 25  # words that neighbouring windows of an over-long text share
_ROWS = 256  # 256 rows of gates (200 kB) stay in the second-level cache
_BATCH_CHARACTERS = 4_000_000


class BilstmScorer:
    """Scores texts on the six labels of Jigsaw's Toxic Comment challenge, under Detoxify's names.

    Args:
        folder: The converted model (`models.store.path("jigsaw-bilstm")`).
        info: What manifests record of it.
        threads: torch threads of this process.
    """

    labels = LABELS

    def __init__(self, folder: Path, info: ModelInfo, *, threads: int = 1) -> None:
        import torch
        from safetensors.torch import load_file

        torch.set_num_threads(threads)
        self.info = info
        record = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        self._vocabulary: dict[str, int] = record["vocabulary"]
        self._separators = str.maketrans(dict.fromkeys(record["separators"], " "))
        self._limit: int = record["max_tokens"]
        # Cloned: the file's tensors lie at any offset, and products of unaligned memory take other kernels.
        arrays = {name: array.clone() for name, array in load_file(folder / "bilstm.safetensors").items()}
        self._forward = _Direction(arrays, "forward")
        self._backward = _Direction(arrays, "backward")
        self._dense = (arrays["dense.kernel"], arrays["dense.bias"])
        # Sixteen columns for six labels: products narrower than a vector round by the row's position.
        spare = (0, 16 - len(self.labels))
        self._output = (
            torch.nn.functional.pad(arrays["output.kernel"], spare),
            torch.nn.functional.pad(arrays["output.bias"], spare),
        )
        with torch.inference_mode():
            self._pads = self._table_pads()

    def score(self, texts: Sequence[str]) -> FloatArray:
        """Score texts of any length.

        Args:
            texts: n texts. Those over 100 words are scored in windows of 100 that overlap by 25; the maximum
                is taken.

        Returns:
            float32 of shape (n, 6), in the order of `labels`. A text without letters or digits scores 0.

        Raises:
            ModelError: A score is not a number.
        """
        out = np.zeros((len(texts), len(self.labels)), np.float32)
        for part in slices([len(t) for t in texts], _BATCH_CHARACTERS):
            out[part] = self._score(texts[part])
        return refuse_nan(out, self.info.name)

    def tokenize(self, text: str) -> list[int]:
        """Word indices, as Keras' Tokenizer gives them: unknown words are left out."""
        words = text.lower().translate(self._separators).split(" ")
        return [i for i in map(self._vocabulary.get, words) if i is not None]

    def _score(self, texts: Sequence[str]) -> FloatArray:
        import torch

        sequences = [self.tokenize(t) for t in texts]
        cut = windows([len(s) for s in sequences], self._limit, _OVERLAP)
        order = np.argsort(cut.start - cut.end, kind="stable")  # longest first
        scores = np.empty((len(order), len(self.labels)), np.float32)
        with torch.inference_mode():
            for i in range(0, len(order), _ROWS):
                rows = order[i : i + _ROWS]
                filled = fill_rows(rows)
                parts = [sequences[o][s:e] for o, s, e in zip(*(a[filled] for a in cut), strict=True)]
                scores[rows] = sigmoid(self._logits(parts).numpy()[: len(rows)])
        out = max_by_owner(scores, cut.owner, len(texts))
        blank = [i for i, text in enumerate(texts) if not any(c.isalnum() for c in text)]
        out[blank] = 0.0
        return out

    def _logits(self, parts: Sequence[Sequence[int]]) -> torch.Tensor:
        import torch

        longest = max(map(len, parts))
        pads = self._limit - longest
        ids = np.zeros((longest, len(parts)), np.int64)  # time first: a step reads one row
        for row, part in enumerate(parts):
            if part:
                ids[longest - len(part) :, row] = part
        steps = torch.from_numpy(ids)
        state, cell, peak = (t[pads].expand(len(parts), -1).contiguous() for t in self._pads)
        forward = self._forward.run(steps, state, cell, peak)
        # Backwards the words come first, then the padding, whose states differ from text to text.
        tail = torch.zeros((pads, len(parts)), dtype=torch.int64)
        zero = torch.zeros((len(parts), self._forward.units))
        lowest = torch.full_like(zero, -2.0)  # below any tanh
        backward = self._backward.run(torch.cat([steps.flip(0), tail]), zero, zero.clone(), lowest)
        hidden = torch.addmm(self._dense[1], torch.cat([forward, backward], 1), self._dense[0]).relu_()
        return torch.addmm(self._output[1], hidden, self._output[0])[:, : len(self.labels)]

    def _table_pads(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Forward state, cell and running maximum after 0, 1, ... paddings: each (limit + 1, units)."""
        import torch

        units = self._forward.units
        # Several equal rows, of which one is kept: a product of one row rounds otherwise than of many.
        state, cell = torch.zeros((MIN_ROWS, units)), torch.zeros((MIN_ROWS, units))
        peak = torch.full((MIN_ROWS, units), -2.0)
        table = [(state[0].clone(), cell[0].clone(), peak[0].clone())]
        step = torch.zeros((1, MIN_ROWS), dtype=torch.int64)
        for _ in range(self._limit):
            self._forward.run(step, state, cell, peak)
            table.append((state[0].clone(), cell[0].clone(), peak[0].clone()))
        states, cells, peaks = zip(*table, strict=True)
        return torch.stack(states), torch.stack(cells), torch.stack(peaks)


class _Direction:
    """One direction of the LSTM: gates in Keras' order (input, forget, cell, output), by hard sigmoid."""

    def __init__(self, arrays: dict[str, torch.Tensor], name: str) -> None:
        import torch

        self.recurrent = arrays[f"{name}.recurrent"]
        self.units = self.recurrent.shape[0]
        u = self.units
        table = torch.addmm(arrays[f"{name}.bias"], arrays["embedding"], arrays[f"{name}.kernel"])
        # Keras' hard sigmoid is clip(0.2 x + 0.5, 0, 1): the affine part is folded into table and kernel.
        scale, shift = torch.full((4 * u,), 0.2), torch.full((4 * u,), 0.5)
        scale[2 * u : 3 * u], shift[2 * u : 3 * u] = 1.0, 0.0
        self.table = table * scale + shift
        self.recurrent = (self.recurrent * scale).contiguous()

    def run(
        self, steps: torch.Tensor, state: torch.Tensor, cell: torch.Tensor, peak: torch.Tensor
    ) -> torch.Tensor:
        """Run over time, updating state, cell and running maximum in place; returns the maximum.

        Args:
            steps: (time, rows) word indices.
            state: (rows, units).
            cell: (rows, units).
            peak: (rows, units), the maximum of the outputs so far.
        """
        import torch

        u = self.units
        for ids in steps:
            gates = torch.addmm(self.table[ids], state, self.recurrent)
            gates[:, : 2 * u].clamp_(0.0, 1.0)
            gates[:, 3 * u :].clamp_(0.0, 1.0)
            cell.mul_(gates[:, u : 2 * u]).addcmul_(gates[:, :u], gates[:, 2 * u : 3 * u].tanh_())
            torch.tanh(cell, out=state).mul_(gates[:, 3 * u :])
            torch.maximum(peak, state, out=peak)
        return peak
