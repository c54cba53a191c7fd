"""How the ranks of one machine ended, and which exit code says so best. Part of launch/ranks.py."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Collection
from dataclasses import dataclass, field

FAILED, BAD_INPUT, STOPPED, CHECK_FAILED = 1, 2, 3, 4
ITS_OWN_WORDS = (BAD_INPUT, CHECK_FAILED, STOPPED)  # codes whose reason a rank has printed; the first that occurs tells
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
AGAIN = "start the same command again, it goes on from the last checkpoint"


@dataclass
class Outcome:
    """How the ranks of this machine ended, as far as they have."""

    codes: dict[int, int] = field(default_factory=dict)  # by rank, of those that did not end with 0; negative: a signal
    stopped_by: str | None = None
    grace: int = 110


def told(outcome: Outcome) -> int:
    """The exit code of a run from those of its ranks, with a line where the ranks could not speak for themselves."""
    codes = outcome.codes
    killed = {rank: -code for rank, code in codes.items() if code < 0 and -code not in STOP_SIGNALS}
    for code in ITS_OWN_WORDS:
        # Without a signal from outside, a rank that stopped was told to because of another one's failure.
        alone = outcome.stopped_by or (not killed and FAILED not in codes.values())
        if code in codes.values() and (code != STOPPED or alone):
            return code
    host = socket.gethostname()
    if outcome.stopped_by and killed:
        say(f"{named(killed)} on {host} had not ended {outcome.grace} s after {outcome.stopped_by}; {AGAIN} "
            "(PEFTUNE_GRACE=SECONDS gives more time)")  # fmt: skip
    elif killed:
        name = signal.Signals(min(killed.values())).name
        hint = " (often for want of memory)" if name == "SIGKILL" else ""
        say(f"{named(killed)} on {host} was killed by {name}{hint}; {AGAIN}")
    elif FAILED in codes.values():
        say(f"{named([r for r, code in codes.items() if code == FAILED])} on {host} failed, see above; {AGAIN}")
    elif codes and outcome.stopped_by:
        say(f"{outcome.stopped_by} came before training had begun or after its end; {AGAIN}")
        return STOPPED
    elif codes:
        say(f"{named(codes)} on {host} ended with {sorted(set(codes.values()))}; {AGAIN}")
    return FAILED if codes else 0


def named(ranks: Collection[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, sorted(ranks)))}"


def say(text: str) -> None:
    print(f"peftune: {text}", file=sys.stderr, flush=True)
