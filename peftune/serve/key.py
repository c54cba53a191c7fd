"""The key that clients must send: where it comes from, and that an address which others reach has one."""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
from pathlib import Path

from peftune.console import Console
from peftune.errors import UserError, explained
from peftune.serve.settings import ServeSettings

VARIABLE = "PEFTUNE_API_KEY"
_LONGEST = 4096  # bytes of a file with a key


class NoKeyError(UserError):
    """Others than this machine would reach a server that has no key."""


def find_key(given: str | None, file: Path | None) -> str | None:
    """The key of the command line, of a file, or of PEFTUNE_API_KEY, the first that is there; None where none is set.

    Raises UserError for two of them on the command line, for an empty one, and for a file that is none.
    """
    if given is not None and file is not None:
        raise UserError("a key and a file with a key are given; keep the file, which no process list shows")
    if file is not None:
        return _read_key(file)
    found, source = (given, "the key") if given is not None else (os.environ.get(VARIABLE), VARIABLE)
    if found is not None and not found.strip():
        raise UserError(f"{source} is set and empty; expected a key, or leave it unset to ask clients for none")
    return found


def check_reach(listener: socket.socket, settings: ServeSettings) -> None:
    """NoKeyError where others than this machine reach a bound socket, no key is set and nobody said `no_auth`.

    It is the address that counts, not the name: `localhost` may mean any.
    """
    address = listener.getsockname()[0]
    if settings.api_key is None and not settings.no_auth and not ipaddress.ip_address(address).is_loopback:
        raise NoKeyError(f"{settings.host} is reached from other machines ({address}) and no API key is set")


def _read_key(path: Path) -> str:
    """The one line of a file (a pipe will do); says so where every user of this machine can read it."""
    with explained(path, "; expected a file with the API key in one line"), path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        content = file.read(_LONGEST + 1)
    key = content.decode("utf-8", "replace").removesuffix("\n").removesuffix("\r")
    if not key.strip() or "\n" in key or len(content) > _LONGEST:
        found = "nothing" if not key.strip() else "more"
        raise UserError(f"{path}: expected the API key in one line of at most {_LONGEST} bytes, found {found}")
    if stat.S_ISREG(mode) and mode & stat.S_IROTH:
        Console().say(f"{path} can be read by every user of this machine; chmod 600 keeps the key to you")
    return key
