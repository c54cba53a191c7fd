"""Several engines behind one address, a process each: one a GPU, or on a CPU each with its share of the threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from peftune import console
from peftune.data.tokens.encode import begin_of_text_id
from peftune.device import count_gpus
from peftune.errors import UserError
from peftune.inference.bank import AdapterInfo, NamedAdapters
from peftune.inference.engine import EngineLoad, Stopping
from peftune.inference.request import OnOutput, Request, RequestHandle
from peftune.inference.routing.route import Route
from peftune.model.base import Base
from peftune.serve.engines.messages import Assignment, EngineLost, Loaded
from peftune.serve.engines.process import EngineProcess
from peftune.serve.settings import ServeSettings

Result = TypeVar("Result")
_PATIENCE = 30.0  # seconds for a step that has begun, after the drain


def gpu_of_each(device: str, count: int) -> list[str | None]:
    """For each of `count` processes the GPU that it may see, as `CUDA_VISIBLE_DEVICES` has it; None is the CPU.

    UserError where there are fewer GPUs. None is touched: what this process did with one would take its memory.
    """
    found = count_gpus(device)
    if not found:
        return [None] * count
    if count > found:
        raise UserError(
            f"data_parallel_size is {count}, and torch finds {found} GPU{'s' * (found > 1)} here; expected at most one "
            "engine a GPU"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [*(visible.split(",") if visible is not None else map(str, range(found)))][:count]


class EngineGroup:
    """Engines that share the requests: each goes to the one with the fewest that are not answered yet.

    When one ends, its requests end with an error and the others go on. Their processes start with the group; `loaded`
    waits for them. UserError where there are fewer GPUs than engines.
    """

    def __init__(
        self, base: Base, adapters: Mapping[str, Path], precision: str, settings: ServeSettings, device: str
    ) -> None:
        count, self._queue = settings.data_parallel_size, settings.queue
        self._vocabulary, self._positions = base.config.vocab_size, base.config.n_positions
        self._tokens = len(base.tokenizer)
        self._serving = self._stopping = False
        self._engines: list[EngineProcess] = []
        threads = max(1, torch.get_num_threads() // count)
        sizes = settings.slots, settings.slots + settings.queue  # the bound of the queue is that of all together
        try:
            for number, gpu in enumerate(gpu_of_each(device, count)):
                speaks = console.verbosity if number == 0 else "quiet"
                read = (base.directory, base.name), tuple(adapters.items())
                assigned = Assignment(*read, precision, *sizes, gpu, threads, speaks)
                self._engines.append(EngineProcess(f"engine {number}", assigned, self._lost))
        except BaseException:
            self.stop(0)
            raise

    def loaded(self) -> Loaded:
        """What each of them has loaded, once all have; raises what kept one from it, and then none is left."""
        try:
            for future in wait([engine.started for engine in self._engines], return_when=FIRST_EXCEPTION).done:
                future.result()
        except EngineLost as error:
            self.stop(0)
            advice = f"see what it wrote, and whether there is memory for {len(self._engines)} copies, one each"
            raise UserError(f"{error} while it loaded the model; {advice}") from None
        except BaseException:
            self.stop(0)
            raise
        self._serving = True
        return self._engines[0].started.result()

    @property
    def failed(self) -> bool:
        """Whether no engine is left."""
        return not (self._stopping or any(engine.alive for engine in self._engines))

    @property
    def load(self) -> EngineLoad:
        """The sum of all; the mean of what is an average."""
        loads = [engine.load for engine in self._engines]
        sums = {field.name: sum(getattr(load, field.name) for load in loads) for field in fields(EngineLoad)}
        sums["seconds_a_text"] /= len(loads)
        return EngineLoad(**sums)

    def submit(self, request: Request, on_output: OnOutput) -> RequestHandle:
        """As `Engine.submit`; `on_output` is called in a thread of the engine that has it."""
        request.check(self._vocabulary, self._tokens, self._positions)
        handle = RequestHandle(request, on_output)
        self._to_least_busy(lambda engine: engine.submit(handle))
        return handle

    def route(self, ids: Sequence[int], names: Sequence[str] | None, threshold: float | None) -> Future[Route]:
        """As `Engine.route`."""
        return self._to_least_busy(lambda engine: engine.route(ids, names, threshold))

    def start(self) -> None:
        """They answer since they were made."""

    def stop(self, drain_seconds: float) -> None:
        """As `Engine.stop`; the processes end."""
        self._stopping = True
        for engine in self._engines:
            if self._serving:
                engine.stop(drain_seconds)
            else:
                engine.kill()
        for engine in self._engines:
            engine.wait(drain_seconds + _PATIENCE)

    def on_all(self, method: str, *arguments: Any) -> list[Any]:
        """What every engine that lives answers; raises the first error once all have answered."""
        futures = [engine.call(method, *arguments) for engine in self._engines if engine.alive]
        answered = [future for future in wait(futures).done if not isinstance(future.exception(), EngineLost)]
        if not answered:
            raise EngineLost("no engine is left")
        return [future.result() for future in answered]

    def _to_least_busy(self, send: Callable[[EngineProcess], Result]) -> Result:
        while not self._stopping and (alive := [engine for engine in self._engines if engine.alive]):
            self.load.refuse_when_full(self._queue)
            with suppress(EngineLost):  # in this very moment; the next one has it
                return send(min(alive, key=lambda engine: engine.unfinished))
        raise Stopping("the engines are stopping" if self._stopping else "no engine is left", 5.0)

    def _lost(self, how: str) -> None:
        if self._serving and not self._stopping:
            left = sum(engine.alive for engine in self._engines)
            rest = f"{left} of {len(self._engines)} go on" if left else "none is left: start the server again"
            console.Console().say(f"{how}; its requests have failed, and {rest}")


class GroupBank(NamedAdapters[AdapterInfo]):
    """What the server knows of the models that are loaded in every process of a group."""

    def __init__(self, base: Base, adapters: Iterable[AdapterInfo], group: EngineGroup) -> None:
        self.base, self.config, self.tokenizer = base, base.config, base.tokenizer
        self.begin = begin_of_text_id(self.tokenizer)
        self._group = group
        self._loaded = {adapter.name: adapter for adapter in adapters}

    def add(self, name: str, directory: Path, replace: bool = False, new_tokens: bool = True) -> AdapterInfo:
        """As `AdapterBank.add`, in every process or in none: all read it before it gets its name."""
        try:
            read: list[AdapterInfo] = self._group.on_all("read", name, directory, replace, new_tokens)
        except Exception:
            self._group.on_all("drop")
            raise
        self._group.on_all("put")
        self._loaded[name] = read[0]
        return read[0]

    def remove(self, name: str) -> None:
        """As `AdapterBank.remove`."""
        del self._loaded[self.get(name).name]
        self._group.on_all("remove", name)
