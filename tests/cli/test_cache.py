"""`peftune cache`: shows what lies there, and removes it and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peftune.cli.main import run
from peftune.config.data_section import Source
from peftune.data.tokens.store import TokenStore, prepare
from peftune.files import beside
from peftune.model.base import Base

DAY = 86_400


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def store(cache: Path, tmp_path: Path, tokenizer: Any, tiny_base: Path) -> TokenStore:
    """A cache with one entry of tokens, which is in use while the store lives, and fingerprints."""
    (tmp_path / "a.txt").write_text("the cat\n\nsat")
    assert Base(tiny_base).fingerprint
    return prepare([Source(path=str(tmp_path / "a.txt"))], tokenizer, "t", " ", "auto")


def kill_while_writing(cache: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from peftune.files import staging_directory\n"
        "with staging_directory(Path(sys.argv[1])) as d: (d / 'ids.bin').write_bytes(b'x' * 99); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(cache / "tokens" / ("0" * 40))]).returncode == 9


def listed(tmp_path: Path) -> dict[str, dict[str, Any]]:
    assert run(["cache", "list", "--json", str(tmp_path / "list.json")]) == 0
    return {item["kind"]: item for item in json.loads((tmp_path / "list.json").read_text())["items"]}


def test_everything_is_listed_with_size_and_age(cache: Path, store: TokenStore, tmp_path: Path, capsys: Any) -> None:
    kill_while_writing(cache)
    (cache / "torchinductor").mkdir()
    (cache / "torchinductor" / "a.so").write_bytes(b"x" * 1000)
    os.utime(cache / "torchinductor" / "a.so", (0, 0))
    items = listed(tmp_path)
    assert set(items) == {"tokens", "fingerprints", "kernels", "leftover"}
    assert items["kernels"]["bytes"] == 1000 and items["leftover"]["bytes"] == 99
    assert items["tokens"]["holds"] == f"2 documents, {store.lengths.sum()} tokens"
    assert items["tokens"]["pids"] == [os.getpid()] and items["leftover"]["pids"] == []
    assert all(0 <= item["age"] < DAY for item in items.values())
    out = capsys.readouterr().out
    assert str(cache) in out and "1,000 bytes" in out and "2 documents" in out


def test_clear_leaves_what_is_in_use(cache: Path, store: TokenStore, capsys: Any) -> None:
    kill_while_writing(cache)
    staged = beside(cache / "tokens" / ("1" * 40))  # of this process, which is alive
    staged.mkdir()
    assert run(["cache", "clear"]) == 0
    assert "2 kept, of which 2 in use" in capsys.readouterr().out
    assert len(list((cache / "tokens").iterdir())) == 2
    assert len(store.ids(0)) and staged.exists() and not (cache / "fingerprints.json").exists()


def test_clear_removes_the_rest_and_nothing_else(
    cache: Path, tmp_path: Path, tokenizer: Any, tiny_base: Path, capsys: Any
) -> None:
    (tmp_path / "a.txt").write_text("the cat")
    prepare([Source(path=str(tmp_path / "a.txt"))], tokenizer, "t", " ", "auto")
    kill_while_writing(cache)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("mine")
    (cache / "tokens" / ("2" * 40)).symlink_to(tmp_path / "mine")
    (cache / "tokens" / "notes.txt").write_text("mine")
    (cache / "torchinductor").mkdir()
    (cache / "torchinductor" / "link").symlink_to(tmp_path / "mine")
    (cache / "letters").mkdir()
    kept = {"tokens", "letters"}
    assert run(["cache", "clear", "--dry-run"]) == 0
    assert "would remove torchinductor" in capsys.readouterr().out and (cache / "torchinductor").exists()
    assert run(["cache", "clear"]) == 0
    out = capsys.readouterr().out
    assert out.count("removed ") == 3 and "0 kept" in out
    assert {path.name for path in cache.iterdir()} == kept
    assert {path.name for path in (cache / "tokens").iterdir()} == {"2" * 40, "notes.txt"}
    assert (tmp_path / "mine" / "x").read_text() == "mine"


def test_only_what_is_old_is_removed(cache: Path, tmp_path: Path, capsys: Any) -> None:
    for name in ("3" * 40, "4" * 40):
        (cache / "tokens" / name).mkdir(parents=True)
    long_ago = (cache / "tokens" / ("4" * 40)).stat().st_mtime - 8 * DAY
    os.utime(cache / "tokens" / ("4" * 40), (long_ago, long_ago))
    assert run(["cache", "clear", "--older-than", "7d"]) == 0
    assert [path.name for path in (cache / "tokens").iterdir()] == ["3" * 40]
    for wrong in ("7", "d", "-1d", "1e9d", "99999999999d", "7y"):
        assert run(["cache", "clear", f"--older-than={wrong}"]) == 2
        assert "expected a number with a unit" in capsys.readouterr().err


def test_what_another_machine_is_writing_is_given_a_day(cache: Path) -> None:
    (cache / "tokens").mkdir(parents=True)
    fresh, old = (cache / "tokens" / f".{'0' * 40}.aaaaaaaa-1.{n}{'0' * 7}" for n in (1, 2))
    for path in (fresh, old):
        path.mkdir()
    os.utime(old, (0, 0))
    assert run(["cache", "clear"]) == 0
    assert [path.name for path in (cache / "tokens").iterdir()] == [fresh.name]


@pytest.mark.parametrize("verb", ["list", "clear"])
def test_another_directory_is_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, verb: str) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    monkeypatch.setenv("PEFTUNE_CACHE", str(tmp_path))
    assert run(["cache", verb]) == 2
    assert "not a cache of peftune (it holds 'thesis.tex')" in capsys.readouterr().err
    monkeypatch.setenv("PEFTUNE_CACHE", str(tmp_path / "thesis.tex"))
    assert run(["cache", verb]) == 2
    monkeypatch.setenv("PEFTUNE_CACHE", str(tmp_path / "none"))
    assert run(["cache", verb]) == 0
    assert (tmp_path / "thesis.tex").exists()
