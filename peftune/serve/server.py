"""The server: loads, listens, answers, and on SIGTERM drains the requests in flight before it stops."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import uvicorn

from peftune.console import Console
from peftune.device import device_name
from peftune.errors import UserError, explained
from peftune.inference.bank import AdapterBank
from peftune.inference.engine import Engine
from peftune.model.base import open_base
from peftune.serve.app import build_app
from peftune.serve.engines.group import EngineGroup, GroupBank
from peftune.serve.http.connection import KEEP_ALIVE_SECONDS, MAX_HEAD_BYTES, TimeoutProtocol
from peftune.serve.key import check_reach
from peftune.serve.service import Service
from peftune.serve.settings import ServeSettings, check_adapter_name

_SHUTDOWN_SECONDS = 5  # for complete responses to reach their clients


def run(
    base: str,
    adapters: Mapping[str, Path],
    precision: str,
    settings: ServeSettings,
    on_ready: Callable[[str], object],
    device: str = "auto",
) -> None:
    """Serve until SIGTERM or SIGINT; `on_ready` gets one line that says where, once requests are accepted.

    Raises UserError for a base, an adapter or an address that cannot be used, and for an address that other machines
    reach where no key is set.
    """
    with listen(settings.host, settings.port) as listener:
        check_reach(listener, settings)
        Server(make_service(base, adapters, precision, settings, device), listener, on_ready).run()


def make_service(
    base: str, adapters: Mapping[str, Path], precision: str, settings: ServeSettings, device: str = "auto"
) -> Service:
    """The base with its adapters, and an engine that was not started yet, or several that were.

    Raises UserError for adapter names that no model can have.
    """
    for name in adapters:
        try:
            check_adapter_name(name)
        except ValueError as error:
            raise UserError(f"adapter name {name!a}: {error}") from None
    opened = open_base(base)
    if opened.name in adapters:
        raise UserError(f"an adapter is named {opened.name} as the base is; name the adapter otherwise")
    if settings.data_parallel_size > 1:
        group = EngineGroup(opened, adapters, precision, settings, device)
        loaded = group.loaded()
        computing = f"{loaded.precision} on {loaded.device}, {settings.data_parallel_size} engines"
        return Service(GroupBank(opened, loaded.adapters, group), group, settings, computing)
    bank = AdapterBank(opened, precision, device)
    for name, directory in adapters.items():
        bank.add(name, directory, new_tokens=False)
    computing = f"{bank.precision} on {device_name(bank.spec.device)}"
    return Service(bank, Engine(bank, settings.slots, settings.queue), settings, computing)


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the first address that `host` means."""
    with explained(f"{host} port {port}", "; expected a name or address of this machine and a free port"):
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with ExitStack() as on_error:
            listener = on_error.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            on_error.pop_all()
    return listener


class Server(uvicorn.Server):
    """uvicorn in this process, stopped in two steps: the engine finishes its requests, then the listener closes."""

    def __init__(self, service: Service, listener: socket.socket, on_ready: Callable[[str], object]) -> None:
        super().__init__(
            uvicorn.Config(
                build_app(service),
                http=TimeoutProtocol,
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_config=None,
                log_level="critical",  # not the errors of clients; our own go to our own log
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            )
        )
        self._service, self._listener, self._on_ready = service, listener, on_ready

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer until `drain` or a signal.

        All that was loaded is exempt from garbage collection meanwhile: a full collection of half a million objects, as
        one body of a megabyte starts it, stops every thread for 0.3 s.
        """
        self._service.engine.start()
        gc.collect()
        gc.freeze()
        try:
            super().run([self._listener])
        finally:
            self._service.engine.stop(0)  # also where it did not come to draining
            gc.unfreeze()

    @property
    def url(self) -> str:
        """Where it answers."""
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        settings, bank = self._service.settings, self._service.bank
        count = len(bank.names)
        self._on_ready(f"peftune serves {bank.base.name} with {count} adapter{'s' * (count != 1)} on {self.url}")
        Console().say(f"computing in {self._service.computing}")
        if settings.no_auth:
            Console().say(f"anybody who reaches {self.url} may use it: no API key is set")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM and SIGINT drain; a second one ends the process at once.

        Signals are not remembered for uvicorn to raise them again: the process ends with code 0.
        """
        if self._service.draining:
            os._exit(128 + sig)
        if self.started:
            self.drain()
        else:
            self.should_exit = True

    def drain(self) -> None:
        """Refuse new requests, let those in flight finish, then stop; from any thread."""
        if not self._service.draining:
            self._service.draining = True
            asyncio.run_coroutine_threadsafe(self._stop(), self._loop)

    async def _stop(self) -> None:
        Console().say("draining requests in flight")
        await asyncio.to_thread(self._service.engine.stop, self._service.settings.drain)
        self.should_exit = True
