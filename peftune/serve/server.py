"""`peftune serve`: load, listen, answer, and on SIGTERM let what runs come to its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Generator, Mapping
from pathlib import Path
from types import FrameType

import uvicorn

from peftune.console import Console
from peftune.errors import UserError
from peftune.inference.bank import AdapterBank
from peftune.inference.engine import Engine
from peftune.serve.app import build_app
from peftune.serve.http.connection import KEEP_ALIVE_SECONDS, MOST_HEAD_BYTES, Connection
from peftune.serve.service import Service
from peftune.serve.settings import ServeSettings

_LAST_WORDS = 5  # seconds for answers that are complete to reach their clients


def run(base: str, adapters: Mapping[str, Path], precision: str, settings: ServeSettings) -> None:
    """Serve until SIGTERM or SIGINT; one line on stdout says where, once it is ready.

    Raises UserError for a base, an adapter or an address that cannot be used.
    """
    listener = listen(settings.host, settings.port)
    with listener:
        service = make_service(base, adapters, precision, settings)
        Server(service, listener).run()


def make_service(base: str, adapters: Mapping[str, Path], precision: str, settings: ServeSettings) -> Service:
    """The base with its adapters and an engine that does not run yet."""
    bank = AdapterBank(base, precision)
    for name, directory in adapters.items():
        if name == bank.base.name:
            raise UserError(f"an adapter is named {name} as the base is; use --adapter OTHER=DIR")
        bank.add(name, directory)
    return Service(bank, Engine(bank, settings.slots, settings.queue), settings)


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the first address that `host` means."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(
            f"--host {host}: {error.strerror or error}; expected a name or address of this machine"
        ) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise UserError(f"{host} port {port}: {error.strerror or error}; free it, or choose another --port") from None
    return listener


class Server(uvicorn.Server):
    """uvicorn in this process, stopped in two steps: first the engine ends its texts, then the listener closes."""

    def __init__(self, service: Service, listener: socket.socket) -> None:
        super().__init__(
            uvicorn.Config(
                build_app(service),
                http=Connection,
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_config=None,
                log_level="critical",  # what clients do wrong is no news; our own failures go to our own log
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=_LAST_WORDS,
                h11_max_incomplete_event_size=MOST_HEAD_BYTES,
            )
        )
        self._service, self._listener = service, listener
        self._stopping: asyncio.Task[None] | None = None

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer until told to stop."""
        self._service.engine.start()
        super().run([self._listener])

    @property
    def url(self) -> str:
        """Where it answers."""
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Ready: say so."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        settings, bank = self._service.settings, self._service.bank
        count = len(bank.names)
        print(f"peftune serves {bank.base.name} with {count} adapter{'s' * (count != 1)} on {self.url}", flush=True)
        if settings.api_key is None and not settings.only_loopback:
            Console().say(f"anybody who reaches {self.url} may use it: no --api-key is set")

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """SIGTERM and SIGINT drain; a second one ends the process at once. Only the main thread hears any."""
        before = {}
        with contextlib.suppress(ValueError):  # in another thread
            before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self._service.draining:
            os._exit(128 + sig)
        if self.started:
            self.drain()
        else:
            self.should_exit = True

    def drain(self) -> None:
        """Refuse what comes, let end what runs, then stop; from any thread."""
        self._service.draining = True
        self._loop.call_soon_threadsafe(self._begin_to_stop)

    def _begin_to_stop(self) -> None:
        self._stopping = self._stopping or self._loop.create_task(self._stop())

    async def _stop(self) -> None:
        print("peftune ends what is being written", file=sys.stderr, flush=True)
        await asyncio.to_thread(self._service.engine.stop, self._service.settings.drain)
        self.should_exit = True
