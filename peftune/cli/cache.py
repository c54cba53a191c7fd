"""`peftune cache`: what lies in the cache, how large, how old and in use by whom; and its removal."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.table import Table

from peftune.cache import cache_directory
from peftune.cli.options import Json, save_json
from peftune.cli.output.text_output import echo, results
from peftune.errors import UserError, explained
from peftune.files import beside, parse_json, remove, writer_of

app = typer.Typer(
    name="cache",
    help="List and clear the cache ($PEFTUNE_CACHE, else ~/.cache/peftune); all of it can be made again.",
    rich_markup_mode="rich",
)

_ENTRY = re.compile(r"[0-9a-f]{40}")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_FOREIGN = 86400  # seconds after which what another machine has not finished counts as given up


@dataclass(frozen=True)
class CacheItem:
    """One thing in the cache: `age` in seconds since it was last written or read, `pids` of who has it open."""

    kind: str
    name: str
    bytes: int
    age: float
    pids: list[int]
    holds: str = ""


@app.command("list")
def list_cache(json_path: Json = None) -> None:
    """Show what lies in the cache: its kind, size, age, and which processes of this machine use it.

    Example:  peftune cache list
    """
    root = cache_directory()
    items = contents(root)
    save_json(json_path, {"cache": str(root), "items": [asdict(item) for item in items]})
    table = Table("kind", "name", "size", "age", "in use by", "holds", box=None, pad_edge=False)
    for item in items:
        name = item.name if len(item.name) <= 24 or not sys.stdout.isatty() else f"{item.name[:23]}…"
        pids = ", ".join(map(str, item.pids))
        table.add_row(item.kind, name, in_words(item.bytes), _duration(item.age), pids, item.holds)
    echo(f"{root}: {in_words(sum(item.bytes for item in items))}")
    if items:
        results().print(table)


@app.command()
def clear(
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="Only what was not used for so long: 30m, 12h, 7d, 4w.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
    json_path: Json = None,
) -> None:
    """Remove what lies in the cache, except what a running process uses; it is made again when it is needed.

    Example:  peftune cache clear --older-than 7d
    """
    root = cache_directory()
    age = 0.0 if older_than is None else _seconds(older_than)
    removed, kept = [], []
    for item in contents(root):
        if item.pids or item.age < age or not (dry_run or _remove(root / item.name)):
            kept.append(item)
        else:
            removed.append(item)
            echo(f"{'would remove' if dry_run else 'removed'} {item.name} ({item.kind}, {in_words(item.bytes)})")
    used = sum(bool(item.pids) for item in kept)
    save_json(json_path, {"removed": [asdict(item) for item in removed], "kept": [asdict(item) for item in kept]})
    echo(
        f"{root}: {in_words(sum(item.bytes for item in removed))} {'would be ' if dry_run else ''}freed, "
        f"{len(kept)} kept, of which {used} in use"
    )


def contents(root: Path) -> list[CacheItem]:
    """What lies in a cache, by kind and name; UserError for a directory that holds other things only.

    Links are never followed, except that `root` may be one.
    """
    names: set[str] = set()
    with explained(f"{root}: cannot be read", "; is PEFTUNE_CACHE right?"), suppress(FileNotFoundError):
        names = {path.name for path in root.iterdir()}
    if not names:
        return []
    if not names & {"tokens", "fingerprints.json", "torchinductor"}:
        raise UserError(f"{root}: not a cache of peftune (it holds {sorted(names)[0]!r}); is PEFTUNE_CACHE right?")
    used = _used_below(root.resolve())
    return sorted(_items(root, used), key=lambda item: (item.kind, item.name))


def _items(root: Path, used: dict[int, set[str]]) -> Iterator[CacheItem]:
    tokens = root / "tokens"
    inside = list(tokens.iterdir()) if tokens.is_dir() and not tokens.is_symlink() else []
    for path in [*root.iterdir(), *inside]:
        name = path.relative_to(root).as_posix()
        writer = writer_of(path.name)
        whole = {"fingerprints.json": "fingerprints", "torchinductor": "kernels"}.get(name)
        if path.is_symlink() or not (writer or whole or (path.parent == tokens and _ENTRY.fullmatch(path.name))):
            continue
        size, age = _size_and_age(path)
        pids = [pid for pid, names in used.items() if any(f"{n}/".startswith(f"{name}/") for n in names)]
        if writer and (psutil.pid_exists(writer[1]) if writer[0] else age < _FOREIGN):
            pids = [writer[1]]
        kind = "leftover" if writer else whole or "tokens"
        yield CacheItem(kind, name, size, age, pids, _counts(path) if kind == "tokens" else "")


def _used_below(root: Path) -> dict[int, set[str]]:
    """By process of this machine, the files in a directory that it has open or mapped, as names below it."""
    found: dict[int, set[str]] = {}
    for process in psutil.process_iter():
        paths: set[str] = set()
        with suppress(psutil.Error, OSError):  # of another user, or gone
            paths.update(file.path for file in process.open_files())
        with suppress(psutil.Error, OSError, AttributeError, NotImplementedError):  # macOS does not tell
            paths.update(region.path for region in process.memory_maps())
        below = {Path(path).relative_to(root).as_posix() for path in paths if Path(path).is_relative_to(root)}
        if below:
            found[process.pid] = below
    return found


def _size_and_age(path: Path) -> tuple[int, float]:
    """Bytes of all files, and seconds since one of them was last written or read."""
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    size, last = 0, 0.0
    for file in files:
        with suppress(OSError):  # removed meanwhile
            found = file.lstat()
            read = found.st_atime if file.is_file() and file.name != "meta.json" else 0.0  # we read that one here
            size, last = size + (0 if file.is_dir() else found.st_size), max(last, found.st_mtime, read)
    return size, max(0.0, time.time() - last)


def _counts(entry: Path) -> str:
    try:
        meta: Any = parse_json((entry / "meta.json").read_bytes()[: 1 << 22])
        return f"{int(meta['documents']):,} documents, {int(meta['tokens']):,} tokens"
    except (OSError, ValueError, KeyError, TypeError):
        return "damaged"


def _remove(path: Path) -> bool:
    """Take a name away first, so that nobody finds half of what it stood for."""
    try:
        aside = path if writer_of(path.name) else path.rename(beside(path))
    except OSError:
        return False
    remove(aside)
    return not aside.exists()


def _seconds(age: str) -> float:
    found = re.fullmatch(r"(\d{1,6})([smhdw])", age)
    if not found:
        raise UserError(f"--older-than {age!r}: expected a number with a unit, such as 30m, 12h, 7d or 4w")
    return float(int(found[1]) * _UNITS[found[2]])


def _duration(seconds: float) -> str:
    unit = next((unit for unit in "wdhm" if seconds >= 2 * _UNITS[unit]), "s")
    return f"{seconds / _UNITS[unit]:.0f} {unit}"


def in_words(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count:,} bytes"
