"""Damage to valid input, for tests of what reads it: no traceback, no hang, nothing but an error of ours.

    @fuzz(30)
    @given(content=damaged_json(VALID))
    def test_any_x_is_read_or_refused(content: bytes, …) -> None:
        with deadline():
            read_or_refuse(lambda: read_x(write(content)))

`PEFTUNE_FUZZ_SECONDS=1200 python -m pytest -m fuzz` goes on with each such test for twenty minutes.
"""

from __future__ import annotations

import copy
import faulthandler
import functools
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from peftune.errors import PeftuneError

SECONDS = float(os.environ.get("PEFTUNE_FUZZ_SECONDS", "0"))  # for each test that is marked `fuzz`
_HUGE = "9" * 400  # more digits than any number type of JSON readers holds


def _nested(depth: int) -> Any:
    value: Any = []
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, -(2**70), 0.0, 0.5, -1e-300, 1e308, float("nan"), float("inf"),
    "", "a", "0", "null", "\0", "\x1b[2J\x1b]0;title\x07", "\u202eevil", "\ud800", "\x9b31m", "line\nbreak", "é" * 300,
    "x" * 70_000, "../../etc/passwd", "/dev/zero", "~root", "(.*.*)*(a+)+$.*!", "(a|a)*$", "[", "%s{}",
    [], {}, [None], [1, "a"], [[]], {"": {}}, {"a": 1}, {"\x1b[2J": "\x1b[2J"}, [0] * 2_000, _nested(30), _nested(70),
]  # fmt: skip
"""Values that stand where something else is expected."""


def _places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Ways to every value in a tree of lists and objects; () is the tree itself."""
    yield way
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _places(child, (*way, key))


@st.composite
def damaged_values(draw: st.DrawFn, valid: Any) -> Any:
    """The value with one to three of its parts replaced by junk, taken out, renamed, doubled or swapped for another."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        way = places[draw(st.integers(0, len(places) - 1))]
        if not way:
            if draw(st.integers(0, 9)) == 0:
                value = copy.deepcopy(draw(st.sampled_from(JUNK)))
            continue
        parent = value
        for key in way[:-1]:
            parent = parent[key]
        kind = draw(st.sampled_from(["junk", "junk", "junk", "any", "out", "rename", "other", "wrap"]))
        if kind == "junk":
            parent[way[-1]] = copy.deepcopy(draw(st.sampled_from(JUNK)))
        elif kind == "any":
            parent[way[-1]] = draw(st.integers() | st.floats() | st.text(max_size=20) | st.booleans() | st.none())
        elif kind == "out":
            del parent[way[-1]]
        elif kind == "rename" and isinstance(parent, dict):
            parent[draw(st.text(max_size=10) | st.sampled_from(["\x1b[2J", "\u202e", "\ud800", ""]))] = parent.pop(
                way[-1]
            )
        elif kind == "other":
            parent[way[-1]] = copy.deepcopy(_at(value, places[draw(st.integers(0, len(places) - 1))]))
        else:
            parent[way[-1]] = [parent[way[-1]]]
    return value


def _at(value: Any, way: tuple[Any, ...]) -> Any:
    for key in way:
        value = value[key]
    return value


@st.composite
def damaged_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """The bytes with some flipped, cut off, put in, or filled with zeros."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        kind = draw(st.sampled_from(["flip", "flip", "cut", "insert", "zero"]))
        if kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = draw(st.binary(max_size=20))
        elif kind == "zero":
            content[at : at + 16] = bytes(len(content[at : at + 16]))
    return bytes(content)


def damaged_json(valid: Any) -> st.SearchStrategy[bytes]:
    """JSON texts near to that of `valid`: of other values, of other bytes, and what only a text can be."""
    text = json.dumps(valid, indent=1)
    odd = [
        b"", b"null", b"[]", b"{}", b'"x"', b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe" + text.encode("utf-16-le"),
        b"\xef\xbb\xbf" + text.encode(), text.replace("1", _HUGE).encode(), text.replace("1", "1" * 5_000).encode(),
        text.replace("1", "1e999").encode(), (text[:-1] + "," + text[1:]).encode(), b"\0" * 4_096, text.encode() * 2,
    ]  # fmt: skip
    values = damaged_values(valid).map(lambda value: json.dumps(value).encode())
    return values | values | damaged_bytes(text.encode()) | st.sampled_from(odd)


def rounds(number: int, seconds: float = SECONDS) -> Iterator[int]:
    """0, 1, 2, …: so many, and then as many more as begin in that time."""
    end = time.monotonic() + seconds
    for done in itertools.count():
        if done >= number and time.monotonic() >= end:
            return
        yield done


def fuzz(examples: int) -> Callable[[Callable[..., None]], Any]:
    """So many examples, the same ones each time; where `PEFTUNE_FUZZ_SECONDS` is set, new ones for so long."""
    chosen = settings(
        max_examples=examples,
        deadline=None,
        derandomize=not SECONDS,
        database=None,
        suppress_health_check=list(HealthCheck),
    )

    def decorate(test: Callable[..., None]) -> Any:
        @functools.wraps(test)
        def repeated(*arguments: Any, **named: Any) -> None:
            for _ in rounds(1):
                once(*arguments, **named)

        once = chosen(test)
        return pytest.mark.fuzz(repeated)

    return decorate


class Late(BaseException):
    """The deadline has passed; no `except Exception` holds it up."""


@contextmanager
def deadline(seconds: float = 60.0) -> Iterator[None]:
    """Late after so many seconds (generous: the machine may be busy); what hangs outside Python ends the process."""

    def late(*_: object) -> None:
        raise Late(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(4 * seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


def read_or_refuse(read: Callable[[], Any]) -> Any:
    """What is read, or the error of ours that refuses it: one line that a terminal can show."""
    try:
        return read()
    except PeftuneError as error:
        assert str(error) and error.exit_code in (2, 4)
        return error
