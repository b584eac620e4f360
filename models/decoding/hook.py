"""SoCD in the sampling loop: edits each step's scores, after the repetition penalty and before the temperature."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from models.decoding.socd import SoCDSettings, steer
from models.lm.decoder import Sides
from models.lm.sampling import Step


@dataclass
class Trace:
    """Where a candidate was steered, and how hard: one entry a token, in each list.

    Attributes:
        alpha: How far the two models parted, as a force in [0, 1).
        k: Most tokens that might be edited.
        edited: Tokens whose score was edited.
        tokens: The tokens that were drawn.
    """

    alpha: list[float] = field(default_factory=list)
    k: list[int] = field(default_factory=list)
    edited: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def cut(self, tokens: int) -> Trace:
        """The first `tokens` entries (a finished candidate may have been carried along for a few steps more)."""
        return Trace(self.alpha[:tokens], self.k[:tokens], self.edited[:tokens], self.tokens[:tokens])


class SoCDHook:
    """A `models.lm.sampling.Hook` that expects two sides: the base's logits, then the toxic's.

    Args:
        settings: How to edit.
        record: Keep a trace of every candidate (three numbers a token; on an accelerator, a wait at every step).

    Attributes:
        traces: By the candidate's seed, where they are kept.
    """

    def __init__(self, settings: SoCDSettings, *, record: bool = False) -> None:
        self.settings, self.record = settings, record
        self.traces: dict[int, Trace] = {}

    def __call__(self, scores: torch.Tensor, sides: Sides, step: Step) -> torch.Tensor:
        """Edit the scores of a step in place; see `Hook`."""
        base, toxic = sides
        steering = steer(scores, toxic, self.settings, raw=base, in_place=True)
        if self.record:
            numbers = zip(steering.alpha.tolist(), steering.k.tolist(), steering.edited.tolist(), strict=True)
            for row, number, drawn, (alpha, k, edited) in zip(
                step.rows, step.numbers, step.drawn, numbers, strict=True
            ):
                trace = self.traces.setdefault(row.seed, Trace(tokens=drawn.tokens))
                if number == len(trace.alpha):  # else the row is finished, or the same candidate twice
                    trace.alpha.append(alpha)
                    trace.k.append(k)
                    trace.edited.append(edited)
        return steering.scores
