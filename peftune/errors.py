"""What can go wrong, as one tree; each leaf carries the exit code of the command line.

PeftuneError
├── UserError        2  the user's input is at fault: one line, no traceback
│   └── BaseNotFound
├── Interrupted      3  SIGTERM/SIGINT after a checkpoint was saved
├── CheckFailed      4  a check of ours failed (merge not equal, dead adapter, non-finite loss)
├── RankLost         1  another rank died or cannot be reached; the same command goes on from the last checkpoint
└── ReportedElsewhere    *  another rank has this error and tells the person; the code is that rank's
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class PeftuneError(Exception):
    """Root of every error that peftune raises on purpose."""

    exit_code = 1


class UserError(PeftuneError):
    """The input is at fault: what was found, what was expected, what to do."""

    exit_code = 2


class BaseNotFound(UserError):
    """There is no base where its name says, or where an adapter says; another name of it may help."""


class Interrupted(PeftuneError):
    """The run was told to stop and has saved a checkpoint first."""

    exit_code = 3


class CheckFailed(PeftuneError):
    """The result is not what it must be, so it is not delivered."""

    exit_code = 4


class RankLost(PeftuneError):
    """Another rank is gone, so the job cannot go on; starting it again can."""


class ReportedElsewhere(PeftuneError):
    """The error of another rank, which says it; this one leaves with the same code, in silence."""

    def __init__(self, exit_code: int, reason: str = "") -> None:
        super().__init__()
        self.exit_code, self.reason = exit_code, reason


@contextmanager
def report_once_per_machine() -> Iterator[None]:
    """Of the ranks that a launcher started here, one tells the person about input that all of them find wrong."""
    try:
        yield
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        raise ReportedElsewhere(error.exit_code, str(error)) from None


def record_for_launcher(line: str) -> None:
    """Have torch's launcher, which calls Accelerate's as well, end its traceback with this line.

    It names the file to each rank: https://pytorch.org/docs/stable/elastic/errors.html.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": line, "timestamp": int(time.time())}, file)


# What a terminal would obey instead of showing it: controls (ESC, BEL, the C1 set), line separators, and overrides of
# the direction of writing, which make a name look like another one.
_OBEYED = (*range(32), *range(127, 160), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in _OBEYED if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """A text that somebody else may have written, for a terminal: what it would obey becomes U+FFFD."""
    return text.translate(_CONTROLS)


def refuse_bare_string(value: object, what: str) -> None:
    """UserError for a string, or a path, where several are expected: it would be taken letter by letter."""
    if isinstance(value, str | bytes | os.PathLike):
        raise UserError(
            f"{what} is one {type(value).__name__}, {str(value)[:40]!r}; expected a list: put it in brackets"
        )


@contextmanager
def explained(what: object, advice: str = "") -> Iterator[None]:
    """UserError, `what` and why, where the system refuses a file, a directory or an address in this block."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {error.strerror or error}{advice}") from None


def first_line(error: BaseException) -> str:
    """What an error of another library says, cut to one line of at most 200 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
