"""The score of toxic spans, where the detox steps and their benchmarks look for it."""

from __future__ import annotations

from models.metrics.spans import character_f1, mean_character_f1, offsets_of

__all__ = ["character_f1", "mean_character_f1", "offsets_of"]
