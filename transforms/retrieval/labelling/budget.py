"""A cap on the tokens a labelling run may spend, shared by its workers and by every run that goes on with it.

What is spent is written down beside the request cache, so a killed run does not spend its budget again, and a run with
a larger one goes on from what is spent. Workers look and spend one after the other; a question under way when another
worker spends the rest is paid all the same, so the cap may be passed by one worker's batch.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import fsspec
from filelock import FileLock

from schemas.errors import OutputError

FILE = "spent_tokens"


class Ledger:
    """Tokens spent under a cap.

    Args:
        folder: Folder of the request cache, local to all workers.
        cap: Most tokens, prompt and completion together, over all runs that share the folder; None = no bound, but what
            is spent is still written down.

    Raises:
        OutputError: The folder is no local one.
    """

    def __init__(self, folder: str, cap: int | None) -> None:
        fs, root = fsspec.core.url_to_fs(folder)
        if cap is not None and not isinstance(fs, fsspec.get_filesystem_class("file")):
            raise OutputError(
                "a token budget needs an output folder on this machine; leave --budget-tokens out"
            )
        self._root, self.cap = Path(root), cap

    def spent(self) -> int:
        """Tokens spent so far."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return int((self._root / FILE).read_text())
        return 0

    def left(self) -> float:
        """Tokens that may still be spent; infinite where there is no cap, never below 0."""
        return float("inf") if self.cap is None else max(0, self.cap - self.spent())

    def spend(self, tokens: int) -> None:
        """Write down what was spent.

        Raises:
            OutputError: It cannot be written.
        """
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            with FileLock(self._root / f"{FILE}.lock", timeout=60, poll_interval=0.01):
                total = self.spent() + tokens
                temporary = self._root / f".{FILE}.new"
                temporary.write_text(str(total))
                temporary.replace(self._root / FILE)
        except OSError as error:
            raise OutputError(f"cannot write {self._root / FILE}: {error}") from error
