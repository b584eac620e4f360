"""The errors a user reads. Each carries one line that says what is wrong and what to do."""

from __future__ import annotations


class TamisError(Exception):
    """A problem the user can mend; the command line prints its one line and no traceback.

    Attributes:
        exit_code: What the process exits with (documented in docs/guarantees.md).
    """

    exit_code = 2


class InputError(TamisError):
    """The input cannot be used as it stands: empty, missing column, wrong type, unreadable."""

    exit_code = 3


class OutputError(TamisError):
    """The output folder cannot be used: it holds another job, lies inside the input, is full."""

    exit_code = 4


class ModelError(TamisError):
    """A model cannot be used: not installed, weights missing, tokenizer differs, server unreachable."""

    exit_code = 5


class TooManyDeadError(TamisError):
    """More rows failed than `--max-dead` allows; what is committed stays, and the run can be resumed."""

    exit_code = 6


class FatalStepError(TamisError):
    """An error that is not a row's fault (disk full, out of memory): stops the run, kills no row."""

    exit_code = 7
