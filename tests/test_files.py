"""Files: strict JSON, permissions, hashes, and what killed writers leave."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzzing import deadline

from peftune import files
from peftune.errors import CheckFailed, UserError
from peftune.model.weights import save_tensors


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1, "a": 2}', "the name 'a' stands twice"),
        (b'{"a": ' + b"[" * 80 + b"]" * 80 + b"}", "nested more than 64 deep"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a": "\xff"}', "can't decode"),
        (b'{"a": 1e999}', "larger than any number"),
        (b'{"a": ' + b"1" * 5_000 + b"}", "a number of 5,000 digits"),
        (b"[1]", "holds list, expected an object"),
        (b"", "Expecting value"),
    ],
)
def test_only_strict_json_is_read(tmp_path: Path, text: bytes, words: str) -> None:
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(UserError, match=words):
        files.read_object(tmp_path / "x.json")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(UserError, match="not a file"):
        files.read_object(tmp_path / "x.json")


def test_what_is_written_can_be_read_by_any_parser(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="not a finite number"):
        files.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_only_leftovers_of_the_dead_are_removed(tmp_path: Path) -> None:
    """Of a killed process of this machine, and of this very name: not those of a name that begins alike."""
    program = (
        "import pathlib, sys; from peftune.files import beside\n"
        "for name in sys.argv[1:]: path = pathlib.Path(name); beside(path).mkdir(); beside(path).write_text('')"
    )
    names = [str(tmp_path / name) for name in ("a", "a-b", "x" * 250)]
    subprocess.run([sys.executable, "-c", program, *names], check=True)
    alive = files.beside(tmp_path / "a")
    alive.mkdir()
    assert len(list(tmp_path.iterdir())) == 7
    with files.staging_directory(tmp_path / "a"):
        assert len(list(tmp_path.iterdir())) == 6
    files.remove_leftovers(tmp_path / ("x" * 250))
    left = {path.name.split(".")[1] for path in tmp_path.iterdir()}
    assert left == {"a-b", "a"}
    assert alive.exists()


def test_a_changed_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"2")
    hashes = files.hashes_of(tmp_path, ["a", "b"])
    assert [files.read_bytes(tmp_path / name, name, hashes[name]) for name in "ab"] == [b"1", b"2"]
    (tmp_path / "b").write_bytes(b"3")
    with pytest.raises(UserError, match="here: b is not the file that was written"):
        files.read_bytes(tmp_path / "b", "here: b", hashes["b"])


def test_a_name_that_comes_again_is_found_among_many(tmp_path: Path) -> None:
    names = ",".join(f'"{number}":1' for number in range(200_000))
    (tmp_path / "x.json").write_text(f'{{{names},"last":1,"last":2}}')
    with deadline(), pytest.raises(UserError, match="the name 'last' stands twice"):
        files.read_object(tmp_path / "x.json")


def test_a_leftover_with_the_number_of_this_process_is_removed(tmp_path: Path) -> None:
    """The first process of a container has the same number in every container; what it writes now is kept."""
    mine = files.beside(tmp_path / "a")
    earlier = mine.with_name(mine.name[:-8] + "0" * 8)
    mine.mkdir()
    earlier.mkdir()
    files.remove_leftovers(tmp_path / "a")
    assert mine.exists() and not earlier.exists()


def test_half_a_character_is_written_as_json_has_it(tmp_path: Path) -> None:
    """File names of any bytes, and strings of other people's JSON, hold such."""
    for value in ({"a\udcff": "\ud800"}, {"é": "東京"}):
        files.write_json(tmp_path / "f.json", value)
        assert json.loads((tmp_path / "f.json").read_text(encoding="utf-8")) == value
