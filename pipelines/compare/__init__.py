"""`tamis compare`: does the cleaned corpus make a cleaner model? Same model, same budget, one corpus an arm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.compare.config import CompareConfig

if TYPE_CHECKING:
    from pipelines.compare.runner import CompareResult

__all__ = ["CompareConfig", "run"]


def run(config: CompareConfig) -> CompareResult:
    """Run a comparison, or go on with it where an earlier run stopped.

    Raises:
        TamisError: It cannot begin; see `pipelines.compare.runner.run`.
    """
    from pipelines.compare.runner import run as go

    return go(config)
