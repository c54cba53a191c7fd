"""A server's settings: typed; validation lists every problem at once."""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from peftune.errors import UserError

_LARGEST = sys.float_info.max
_BOUNDS: dict[str, tuple[float, float, str]] = {
    "port": (0, 65535, "0 (a free one) to 65535"),
    "slots": (1, _LARGEST, "1 or more"),
    "queue": (1, _LARGEST, "1 or more"),
    "max_body": (1024, _LARGEST, "1024 bytes or more"),
    "max_adapters": (1, _LARGEST, "1 or more"),
    "drain": (0, _LARGEST, "a finite number of seconds, 0 or more"),
    "routing_threshold": (-_LARGEST, _LARGEST, "a finite number of nats per token"),
}


@dataclass(frozen=True)
class ServeSettings:
    """Where and how to serve. Raises UserError that names every problem.

    `host`, `port`        where to listen; port 0 takes a free one
    `api_key`             what a client must send as `Authorization: Bearer KEY`; None asks for none
    `roots`               directories from which clients may load adapters; none: they may not
    `allowed_hosts`       names under which the server may be addressed without a key, besides IP addresses
    `slots`, `queue`      sequences in the running batch; sequences that may wait for it
    `max_body`            bytes of a request's body
    `max_adapters`        adapters in memory at a time
    `drain`               seconds that requests in flight get to finish once the server stops
    `routing_threshold`   nats per token by which an adapter must beat the base before `auto` takes it
    `body_seconds`        in which a whole body must arrive
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    roots: tuple[Path, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    slots: int = 8
    queue: int = 256
    max_body: int = 1 << 20
    max_adapters: int = 256
    drain: float = 30.0
    routing_threshold: float = 0.0
    body_seconds: float = 30.0

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise UserError("serve: " + "; ".join(problems))

    @property
    def max_choices(self) -> int:
        """Choices that one request may ask for: more might not fit even into an empty queue."""
        return min(128, self.queue)

    @property
    def only_loopback(self) -> bool:
        """Whether nothing but this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def _problems(self) -> Iterator[str]:
        if not self.host:
            yield "host is empty, expected a name or an address"
        if self.api_key is not None and (not self.api_key.isascii() or not self.api_key.isprintable()):
            yield "the API key holds characters that no header can carry, expected printable ASCII"
        if self.api_key is not None and not self.api_key.strip():
            yield "the API key is empty, expected some characters, or none at all"
        for name, (least, most, expected) in _BOUNDS.items():
            if not least <= getattr(self, name) <= most:
                yield f"{name} is {getattr(self, name)}, expected {expected}"
        yield from (f"root {root} is no directory" for root in self.roots if not root.is_dir())
