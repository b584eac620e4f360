"""A line that says how far an evaluation is: a bar on a terminal, a line now and then elsewhere, nothing if quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 110  # of a table of figures: cut off it says nothing, broken by a narrow terminal it can be read
_EVERY = 20.0  # seconds between plain lines


@contextmanager
def counting(what: str, total: int, mode: str = "auto") -> Iterator[Callable[[int], None]]:
    """Give a function to be called with how many more are done.

    Args:
        what: What is counted, in words.
        total: How many there are.
        mode: `auto` (a bar on a terminal, else lines), `plain`, `quiet`.
    """
    if mode == "quiet" or not total:
        yield lambda n: None
    elif mode == "auto" and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task(what, total=total)
            yield lambda n: bars.advance(task, n)
    else:
        done, said = 0, time.monotonic()

        def tell(n: int) -> None:
            nonlocal done, said
            done += n
            if time.monotonic() - said > _EVERY:
                said = time.monotonic()
                print(f"{what}: {done:,} of {total:,}", file=sys.stderr, flush=True)

        yield tell


def wide_console() -> Console:
    """A console on which a table of figures is not cut off."""
    from rich.console import Console

    console = Console()
    return console if console.width >= _WIDTH else Console(width=_WIDTH)
