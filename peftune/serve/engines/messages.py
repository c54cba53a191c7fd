"""What the server and the process of an engine send each other: plain values. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftune.errors import PeftuneError

if TYPE_CHECKING:
    from peftune.console import Verbosity
    from peftune.inference.bank import AdapterInfo
    from peftune.inference.engine import EngineLoad


class EngineLost(PeftuneError):
    """The process that was to answer has ended."""


@dataclass(frozen=True)
class Assignment:
    """What an engine's process computes with.

    `base` is its directory and its name. `gpu` is what `CUDA_VISIBLE_DEVICES` shall be; None computes on the CPU, with
    so many `threads`. `verbosity` is the server's for one of its engines.
    """

    base: tuple[Path, str]
    adapters: tuple[tuple[str, Path], ...]
    precision: str
    slots: int
    queue: int
    gpu: str | None
    threads: int
    verbosity: Verbosity


@dataclass(frozen=True)
class Loaded:
    """What the server is told of it."""

    adapters: tuple[AdapterInfo, ...]
    precision: str
    device: str


@dataclass(frozen=True)
class Call:
    """What the server asks for: a method of `EngineWorker`. `number` is that of its replies."""

    number: int
    method: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Reply:
    """What comes back: of a text every output, of other calls one value or error.

    `started` is when a text that has ended got its slot, on the monotonic clock, which all processes share. `load`
    comes with all but the outputs of a text that goes on.
    """

    number: int
    value: Any = None
    error: Exception | None = None
    started: float | None = None
    load: EngineLoad | None = None
