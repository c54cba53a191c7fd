"""Functions of tensors that stay where they are, each recorded once as a CUDA graph and then launched as one.

From Python a token of GPT-2 small is some 200 launches, each of which takes the host longer than most of them take the
GPU. What a graph may not depend on: anything the host reads, and memory that is not there any more when it is replayed.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from peftune.device import is_out_of_memory
from peftune.errors import first_line

Function = Callable[[], torch.Tensor]
Record = Callable[[Function], tuple[Callable[[], object], torch.Tensor]]
"""From a function to what repeats it, and to the tensor in which its result then lies."""

VARIABLE = "PEFTUNE_CUDA_GRAPHS"  # 0 switches them off

_MOST = 128
_CHECKED = 2  # replays of each that are compared: with the numbers of its recording, and with the next
_TOLERANCE = 0.05  # relative and absolute, of values about 1; a graph that reads other memory is off by more
_recording = threading.Lock()  # one at a time in a process, as torch documents

_log = logging.getLogger(__name__)


@dataclass
class CapturedStep:
    """A recorded function; `output` holds its result after each `replay`, until another one is replayed."""

    replay: Callable[[], object]
    output: torch.Tensor
    checked: int = 0


class CapturedSteps:
    """Recorded functions by key, the last used `_MOST` of them; without `record` nothing is recorded.

    The first replays of each are compared with the function itself. Where one differs, or cannot be recorded, all are
    given up, with one line in the log. The bound: a graph holds memory of its own for its launches and its result, and
    keys go out of use, as with a model that was removed. 128 are more than a model with 32 slots has: 6 numbers of
    rows, 6 spans, for the base, one adapter and several.
    """

    def __init__(self, record: Record | None) -> None:
        self._record = record
        self._steps: OrderedDict[Hashable, CapturedStep] = OrderedDict()

    def __len__(self) -> int:
        return len(self._steps)

    def run(self, key: Hashable, function: Function) -> torch.Tensor:
        """`function()`, recorded under `key`; the result is to be read before the next call.

        All that it reads but the contents of tensors must follow from the key, and calling it twice must be as once.
        """
        if self._record is None:
            return function()
        step = self._steps.pop(key, None) or self._recorded(function)
        if step is None:
            return function()
        self._steps[key] = step  # the last used stands last
        if len(self._steps) > _MOST:
            self._steps.popitem(last=False)
        if step.checked == _CHECKED:
            step.replay()
            return step.output
        wanted = function()
        step.replay()
        if not torch.allclose(step.output, wanted, _TOLERANCE, _TOLERANCE, equal_nan=True):
            self._give_up("a replay gives other numbers")
        step.checked += 1
        return wanted

    def _recorded(self, function: Function) -> CapturedStep | None:
        assert self._record is not None, "run has looked"
        try:
            with _recording:
                return CapturedStep(*self._record(function))
        except RuntimeError as error:  # of CUDA, for what no graph can hold, and for want of memory
            self._give_up("no memory for one" if is_out_of_memory(error) else first_line(error))
            return None

    def _give_up(self, reason: str) -> None:
        _log.warning("CUDA graphs are off: %s; each token is launched kernel by kernel", reason)
        self._record = None
        self._steps.clear()


class CUDARecorder:
    """Records on a stream of its own, all graphs in one pool of memory: only one is replayed at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._first: torch.cuda.CUDAGraph | None = None  # a pool whose last graph is gone takes no other

    def __call__(self, function: Function) -> tuple[Callable[[], object], torch.Tensor]:
        """Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs."""
        graph, pool = torch.cuda.CUDAGraph(), self._first.pool() if self._first is not None else None
        now = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):  # a recording that fails leaves its stream the current one
            function()  # libraries make their workspaces when they are first called
            with torch.cuda.graph(graph, pool, self._stream, capture_error_mode="thread_local"):
                output = function()
        now.wait_stream(self._stream)
        self._first = self._first or graph
        return graph.replay, output


def recorder(device: torch.device) -> Record | None:
    """How functions are recorded on this device; None where they are not."""
    off = device.type != "cuda" or os.environ.get(VARIABLE, "1") == "0"
    return None if off else CUDARecorder(device)
