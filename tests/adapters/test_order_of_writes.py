"""What is delivered survives a loss of power: everything is on the disk before its name is, and the name then too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftune.adapters.directory import read_adapter, write_adapter
from peftune.adapters.edit.combine import combine
from peftune.adapters.edit.extract import extract
from peftune.adapters.merge.merge import merge
from peftune.files import publish

Event = tuple[str, str]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """("flush", path) and ("rename", "from to") in the order in which the system is asked for them."""
    found: list[Event] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def flushed(handle: int) -> None:
        found.append(("flush", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def renamed(call: Callable[..., None]) -> Callable[..., None]:
        def recorded(source: Any, target: Any, **settings: Any) -> None:
            found.append(("rename", f"{source} {target}"))
            call(source, target, **settings)

        return recorded

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "rename", renamed(rename))
    monkeypatch.setattr(os, "replace", renamed(replace))
    return found


WRITERS: dict[str, Callable[[Path, Path, Path], Any]] = {
    "merge": lambda adapter, base, out: merge(adapter, out, str(base), max_shard_bytes=40_000),
    "combine": lambda adapter, base, out: combine([adapter], [2.0], out, base=str(base)),
    "extract": lambda adapter, base, out: extract(str(base), str(out.parent / "tuned"), 2, out),
}


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the names of open files")
@pytest.mark.parametrize("verb", WRITERS)
def test_everything_is_flushed_before_the_rename_and_its_directory_after(
    verb: str, make_adapter: Any, tiny_base: Path, tmp_path: Path, events: list[Event]
) -> None:
    adapter, out = make_adapter(), tmp_path / "out"
    merge(adapter, tmp_path / "tuned", str(tiny_base), verify=False)
    events.clear()
    WRITERS[verb](adapter, tiny_base, out)
    at = next(i for i, (kind, names) in enumerate(events) if kind == "rename" and names.split()[1] == str(out))
    staging = events[at][1].split()[0]
    before = [path for kind, path in events[:at] if kind == "flush"]
    last_write = max(i for i, path in enumerate(before) if path.startswith(staging))
    assert before[last_write] == staging  # the directory itself, after its files
    assert {os.path.relpath(path, staging) for path in before if path.startswith(f"{staging}/")} >= {
        str(path.relative_to(out)) for path in out.rglob("*")
    }
    assert ("flush", str(tmp_path)) in events[at:]


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the names of open files")
def test_an_adapter_is_replaced_in_an_order_that_shows_no_mixture(make_adapter: Any, events: list[Event]) -> None:
    adapter, out = read_adapter(make_adapter("adapter")), make_adapter("out")
    events.clear()
    write_adapter(out, adapter.config, adapter.tensors, {"step": 1}, {"README.md": "x"})
    commit = f"{out}/.commit"
    published = next(i for i, (kind, names) in enumerate(events) if kind == "rename" and names.endswith(f" {commit}"))
    moved = [
        names.split()[0].rpartition("/")[2]
        for kind, names in events[published + 1 :]
        if kind == "rename" and commit in names
    ]
    assert moved[-1] == "adapter_config.json" and set(moved) == {path.name for path in out.iterdir()}
    around = [
        i for i, (kind, names) in enumerate(events) if kind == "rename" and names.startswith(f"{commit}/adapter_c")
    ]
    assert events[around[0] - 1] == ("flush", str(out)) and events[around[0] + 1] == ("flush", str(out))
    assert events[published + 1] == ("flush", str(out))


class Killed(BaseException):
    """The process ends here, and cleans nothing up."""


def kill_while_writing(write: Callable[[], Any], parent: Path) -> None:
    """What a killed process leaves: all that is written before the rename, under the number of one that is dead."""
    ended = subprocess.Popen(["true"])
    ended.wait()

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peftune.adapters.directory.publish", killed)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            write()
    for path in parent.glob(f".*-{os.getpid()}.*"):
        path.rename(path.with_name(path.name.replace(f"-{os.getpid()}.", f"-{ended.pid}.")))


@pytest.mark.parametrize("verb", ["merge", "combine"])
def test_what_a_killed_writer_left_is_removed_by_the_next_of_that_name(
    verb: str, make_adapter: Any, tiny_base: Path, tmp_path: Path
) -> None:
    adapter, out = make_adapter(), tmp_path / "results" / "a"
    out.parent.mkdir()
    for target in (out, out.with_name("a-b")):
        kill_while_writing(lambda target=target: WRITERS[verb](adapter, tiny_base, target), out.parent)  # type: ignore[misc]
    left = sorted(path.name.split(".")[1] for path in out.parent.iterdir())
    assert left == ["a", "a-b"] and all(path.name.startswith(".") for path in out.parent.iterdir())
    WRITERS[verb](adapter, tiny_base, out)
    assert sorted(path.name.split(".")[path.name.startswith(".")] for path in out.parent.iterdir()) == ["a", "a-b"]
    assert out.is_dir() and not (out.parent / "a-b").exists()


def test_writers_of_names_that_begin_alike_leave_each_other_alone(
    make_adapter: Any, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is held in the middle of its write while others begin and end."""
    adapter, results = make_adapter(), tmp_path / "results"
    half, go = threading.Event(), threading.Event()

    def held(staging: Path, target: Path) -> None:
        if target.name == "a-b":
            half.set()
            assert go.wait(120)
        publish(staging, target)

    monkeypatch.setattr("peftune.adapters.directory.publish", held)
    other = threading.Thread(target=combine, args=([adapter], [2.0], results / "a-b"))
    other.start()
    assert half.wait(120)
    for name in ("a", "a-b-c"):
        combine([adapter], [1.0], results / name)
    go.set()
    other.join(120)
    assert sorted(path.name for path in results.iterdir()) == ["a", "a-b", "a-b-c"]
    read_adapter(results / "a-b")
