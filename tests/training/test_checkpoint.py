"""A checkpoint is read back as it was saved or not at all, and none vanishes in silence."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import damaged_json, deadline, fuzz
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from peftune.errors import UserError
from peftune.training import checkpoint
from peftune.training.checkpoint import Checkpoint, Damaged, State

FILES = ("adapter.safetensors", "moments.safetensors", "state.json")


def small(step: int, best_step: int | None = None) -> Checkpoint:
    torch.manual_seed(step)
    moments = {"p/step": torch.tensor(float(step)), "p/exp_avg": torch.randn(2), "p/exp_avg_sq": torch.rand(2)}
    state = State(step=step, best_step=best_step, identity={"base": "x", "optim.lr": 1e-3}, seconds=1.5)
    state.figures = {"0": {"prose": {"loss": 2.5, "perplexity": 12.2, "bits_per_byte": 1.0, "tokens": 12}}}
    return Checkpoint(state, {"p": torch.randn(2)}, moments)


def tree(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def same(found: Checkpoint | None, saved: Checkpoint) -> bool:
    tensors = [(found.values, saved.values), (found.moments, saved.moments)] if found else []
    equal = all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in tensors)
    return found is not None and equal and found.state == saved.state


def make_old(path: Path) -> dict[str, Any]:
    """Take from a checkpoint what releases before hashes did not write; what is left of its state."""
    state = json.loads((path / "state.json").read_text())
    for key in ("sha256", "figures", "records_sha256", "records_from"):
        del state[key]
    (path / "state.json").write_text(json.dumps(state))
    return dict(state)


def flip(path: Path, at: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def test_a_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, saved := small(3))
    chance, missed = random.Random(0), []
    for name in FILES:
        path = tmp_path / "step-3" / name
        whole = path.read_bytes()
        for at in range(chance.randrange(5), len(whole), 5):
            flip(path, at, bit := chance.randrange(8))
            try:
                if not same(checkpoint.read(tmp_path / "step-3"), saved):
                    missed.append((name, at, bit))
            except Damaged:
                pass
            path.write_bytes(whole)
    assert not missed


DAMAGE: dict[str, Callable[[Path], object]] = {
    "whole": lambda path: None,
    "flipped": lambda path: flip(path / "moments.safetensors", 130, 2),
    "cut": lambda path: os.truncate(path / "adapter.safetensors", 20),
    "zeros": lambda path: (path / "state.json").write_bytes(bytes(300)),
    "missing": lambda path: (path / "moments.safetensors").unlink(),
    "edited": lambda path: (path / "state.json").write_text(
        (path / "state.json").read_text().replace('"step":', '"step": 1', 1)
    ),
}
UNREADABLE = {"EACCES": errno.EACCES, "EMFILE": errno.EMFILE, "EIO": errno.EIO}


@fuzz(80)
@given(
    fates=st.lists(st.sampled_from([*DAMAGE, *UNREADABLE]), min_size=1, max_size=3),
    next_step=st.integers(1, 3),
    file=st.sampled_from(FILES),
)
def test_the_next_run_begins_where_the_last_said_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, fates: list[str], next_step: int, file: str
) -> None:
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    folder.mkdir()
    refused: dict[str, int] = {}
    for number, fate in enumerate(fates):
        step = 10 * (number + 1)
        checkpoint.save(folder.parent / "made", small(step))
        (folder.parent / "made" / f"step-{step}").rename(folder / f"step-{step}")
        if fate in UNREADABLE:
            refused[str(folder / f"step-{step}" / file)] = UNREADABLE[fate]
        else:
            DAMAGE[fate](folder / f"step-{step}")
    read, before = Path.read_bytes, tree(folder)

    def read_bytes(path: Path) -> bytes:
        if str(path) in refused:
            raise OSError(refused[str(path)], os.strerror(refused[str(path)]))
        return read(path)

    after_damage = [fate for fate in reversed(fates) if fate not in (*DAMAGE, "EIO") or fate == "whole"]
    expected = after_damage[0] if after_damage else "none"
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", read_bytes)
        if expected != "whole":
            with pytest.raises(UserError, match=r"make it readable|to start anew"):
                checkpoint.newest(folder)
        else:
            found = checkpoint.newest(folder)
            assert found is not None and fates[found.state.step // 10 - 1] == "whole"
            checkpoint.tidy(folder, found, said.append)
            assert len(said) == len(fates) - found.state.step // 10
            checkpoint.save(folder, promised := small(found.state.step + next_step))
    if expected != "whole":
        assert tree(folder) == before
        return
    assert same(checkpoint.newest(folder), promised)
    kept = sum(path.name.startswith("step-") and ".damaged" in path.name for path in folder.iterdir())
    assert kept == len(said)


def test_what_was_just_saved_stays_whatever_lies_beside_it(tmp_path: Path) -> None:
    for step in (5, 9, 10):
        checkpoint.save(tmp_path, small(step))
    checkpoint.save(tmp_path, small(7))
    assert (tmp_path / "step-7").is_dir()


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, small(1))
    (tmp_path / "step-1").rename(tmp_path / "step-10")
    with pytest.raises(Damaged, match="holds step 1"):
        checkpoint.read(tmp_path / "step-10")


def test_a_name_with_zeros_before_the_step_hides_no_checkpoint(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, saved := small(13))
    for name in ("step-013", "step-0013"):  # whichever the file system lists last
        (tmp_path / name).mkdir()
    assert same(checkpoint.newest(tmp_path), saved)


@pytest.mark.parametrize(
    ("file", "key", "value", "words"),
    [
        ("adapter.safetensors", "p", torch.tensor([1.0, torch.nan]), "p holds values that are not finite"),
        ("moments.safetensors", "p/exp_avg", torch.tensor([torch.inf, 1.0]), "p/exp_avg holds values that are not"),
        ("moments.safetensors", "p/step", torch.tensor(3.0), "is not of step 4"),
    ],
)
def test_what_no_run_saves_is_damaged_where_no_hash_tells(
    tmp_path: Path, file: str, key: str, value: torch.Tensor, words: str
) -> None:
    checkpoint.save(tmp_path, small(4))
    make_old(path := tmp_path / "step-4")
    save_file(load_file(path / file) | {key: value}, path / file)
    with pytest.raises(Damaged, match=words):
        checkpoint.read(path)


def test_a_directory_that_cannot_be_listed_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, small(1))

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        checkpoint.newest(tmp_path)


def test_an_older_checkpoint_loads_and_it_is_said_that_it_was_not_checked(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, saved := small(4))
    make_old(tmp_path / "step-4")
    found = checkpoint.newest(tmp_path)
    assert found is not None and torch.equal(found.values["p"], saved.values["p"])
    said: list[str] = []
    checkpoint.tidy(tmp_path, found, said.append)
    assert len(said) == 1 and "could not be checked" in said[0]


VALID = json.loads(json.dumps(asdict(small(4).state)))


@fuzz(60)
@given(content=damaged_json(VALID))
def test_any_state_of_an_older_release_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder = tmp_path_factory.mktemp("any")
    checkpoint.save(folder, small(4))
    (folder / "step-4" / "state.json").write_bytes(content)
    with deadline():
        try:
            found = checkpoint.read(folder / "step-4")
        except Damaged as error:
            assert len(str(error)) < 1000
        else:
            assert found.state.step == 4 and found.state.seconds >= 0 and found.state.micro_size >= 0


@pytest.mark.parametrize(
    ("values", "moments", "words"),
    [
        ({}, None, r"p has shape none, expected \(2,\)"),
        ({"p": torch.ones(3)}, None, r"p has shape \(3,\)"),
        ({"p": torch.ones(2), "q": torch.ones(2)}, None, r"q has shape \(2,\), expected none"),
        (None, {}, "p/exp_avg has shape none"),
    ],
)
def test_other_tensors_than_the_run_trains_are_refused(
    tmp_path: Path, values: dict[str, torch.Tensor] | None, moments: dict[str, torch.Tensor] | None, words: str
) -> None:
    checkpoint.save(tmp_path, small(4))
    make_old(tmp_path / "step-4")
    for name, tensors in zip(FILES, (values, moments), strict=False):
        if tensors is not None:
            save_file(tensors, tmp_path / "step-4" / name)
    parameters = {"p": torch.nn.Parameter(torch.zeros(2))}
    with pytest.raises(UserError, match=words):
        checkpoint.check_fits(checkpoint.read(tmp_path / "step-4"), parameters, tmp_path)


KILLED_AT_EACH_WRITE = """
import os, sys
from pathlib import Path
from tests.training.test_checkpoint import checkpoint, same, small

folder = Path(sys.argv[1])
calls = ("fsync", "rename")
checkpoint.save(folder, small(1))
for number in range(100):
    pid = os.fork()
    if pid == 0:
        left = [number]
        def dying(call):
            def called(*given, **named):
                if left[0] == 0:
                    os._exit(9)
                left[0] -= 1
                return call(*given, **named)
            return called
        for name in calls:
            setattr(os, name, dying(getattr(os, name)))
        checkpoint.save(folder, small(2))
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    found = checkpoint.newest(folder)
    assert same(found, small(1)) or same(found, small(2)), number
    checkpoint.tidy(folder, found, lambda _: None)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")], list(folder.iterdir())
    if status == 0:
        break
    checkpoint.save(folder, small(3))
    assert same(checkpoint.newest(folder), small(3))
    for path in checkpoint.listed(folder):
        path.rename(folder.parent / f"{path.name}-{number}")
    checkpoint.save(folder, small(1))
print(number)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills children of its own")
def test_a_kill_at_any_write_leaves_a_whole_checkpoint_and_no_litter(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "tests"), *sys.path])}
    command = [sys.executable, "-c", KILLED_AT_EACH_WRITE, str(tmp_path / "checkpoints")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 6  # three files, their directory, the renaming, the directory above
