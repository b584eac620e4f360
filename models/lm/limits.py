"""Which sampling settings mean something, whatever backend they are for."""

from __future__ import annotations

from models.protocols import Sampling
from schemas.errors import ModelError


def check_sampling(sampling: Sampling) -> None:
    """Refuse settings that mean nothing.

    Raises:
        ModelError: With what is allowed.
    """
    problems = [
        (not sampling.temperatures, "no temperature: give at least one (0 is greedy)"),
        (
            any(not 0 <= t < float("inf") for t in sampling.temperatures),
            "a temperature must be 0 (greedy) or more",
        ),
        (len(set(sampling.temperatures)) < len(sampling.temperatures), "a temperature is given twice"),
        (sampling.per_temperature < 1, "candidates per temperature must be 1 or more"),
        (not 0 < sampling.top_p <= 1, "top_p must be in (0, 1]"),
        (sampling.top_k < 0, "top_k must be 0 (off) or more"),
        (not sampling.repetition_penalty > 0, "the repetition penalty must be above 0 (1 is off)"),
        (sampling.max_new_tokens < 1, "max_new_tokens must be 1 or more"),
    ]
    for wrong, message in problems:
        if wrong:
            raise ModelError(f"Sampling: {message}")
