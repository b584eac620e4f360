"""`tamis compare`: does the cleaned corpus make a cleaner model? Same model, same budget, one corpus an arm."""

from __future__ import annotations

from pipelines.compare.config import CompareConfig

__all__ = ["CompareConfig", "run"]


def run(config: CompareConfig) -> object:
    """Run a comparison, or go on with it; see `pipelines.compare.runner.run`."""
    from pipelines.compare.runner import run as go

    return go(config)
