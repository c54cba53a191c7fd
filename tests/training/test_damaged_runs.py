"""What happens to a run's directory between two starts is named, refused or harmless; no figure or step is lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import peftune
from peftune import device
from peftune.cli import main
from peftune.config.recipe import Recipe
from peftune.errors import CheckFailed, UserError
from peftune.files import parse_json
from peftune.inference.perplexity import Score
from peftune.model import fingerprint
from peftune.training import checkpoint, loading
from peftune.training.metrics import read_metrics
from peftune.training.run import train

Make = Callable[..., Recipe]
Cut = Callable[[Recipe], Path]
SETTINGS = ("data.validation=0.2", "run.eval_every=2", "run.save_every=1", "optim.steps=4")


def delivered(out: Path) -> tuple[bytes, Any]:
    """The adapter's bytes, and the figures of peftune.json."""
    return (out / "adapter_model.safetensors").read_bytes(), json.loads((out / "peftune.json").read_text())["metrics"]


@pytest.fixture
def undisturbed(recipe: Make, tmp_path: Path) -> tuple[bytes, Any]:
    train(recipe(*SETTINGS, f"run.out={tmp_path / 'undisturbed'}"))
    return delivered(tmp_path / "undisturbed")


def test_a_damaged_checkpoint_is_named_and_kept_and_the_run_goes_on_from_the_one_before(
    recipe: Make, train_without_delivery: Cut, capsys: pytest.CaptureFixture[str], undisturbed: tuple[bytes, Any]
) -> None:
    out = train_without_delivery(made := recipe(*SETTINGS))
    os.truncate(out / "checkpoints" / "step-4" / "adapter.safetensors", 20)
    train(made)
    said = capsys.readouterr().err
    assert "step-4: adapter.safetensors is not what was saved" in said and "kept as step-4.damaged" in said
    assert "from step 3" in said and (out / "checkpoints" / "step-4.damaged").is_dir()
    assert delivered(out) == undisturbed


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_nothing_is_changed(
    recipe: Make, train_without_delivery: Cut
) -> None:
    out = train_without_delivery(made := recipe(*SETTINGS))
    for path in checkpoint.listed(out / "checkpoints"):
        os.truncate(path / "adapter.safetensors", 20)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"No checkpoint is whole.*or remove \S+checkpoints to start anew"):
        train(made)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


METRICS: dict[str, Callable[[Path], object]] = {
    "deleted": lambda path: path.unlink(),
    "zeros at the end": lambda path: path.write_bytes(path.read_bytes()[:-50] + bytes(50)),
    "cut": lambda path: os.truncate(path, 700),
    "another digit": lambda path: path.write_bytes(path.read_bytes().replace(b'"loss": 5.', b'"loss": 4.', 1)),
}


@pytest.mark.parametrize("damage", METRICS)
def test_no_figure_is_lost_with_the_metrics(
    recipe: Make, train_without_delivery: Cut, capsys: pytest.CaptureFixture[str],
    undisturbed: tuple[bytes, Any], damage: str
) -> None:  # fmt: skip
    out = train_without_delivery(made := recipe(*SETTINGS))
    METRICS[damage](out / "metrics.jsonl")
    train(made)
    assert "metrics.jsonl is not what the checkpoint of step 4 knew" in " ".join(capsys.readouterr().err.split())
    assert (out / "metrics.jsonl.damaged").exists() == (damage != "deleted")
    assert delivered(out) == undisturbed
    assert json.loads((out / "peftune.json").read_text())["metrics_begin_at_step"] == 4
    assert "since step 4 (what was before was lost)" in " ".join((out / "README.md").read_text().split())
    assert "lost" in read_metrics(out / "metrics.jsonl")[0]


def test_a_flipped_bit_in_any_file_of_a_run_is_found_or_harmless(
    recipe: Make, train_without_delivery: Cut, undisturbed: tuple[bytes, Any], tmp_path: Path
) -> None:
    out = train_without_delivery(made := recipe(*SETTINGS))
    shutil.copytree(out, tmp_path / "copy")
    chance = random.Random(1)
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.stat().st_size]
    assert len(files) >= 7
    for path in files:
        content, times = bytearray(path.read_bytes()), path.stat()
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        train(made)
        assert delivered(out) == undisturbed, path
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "copy", out)


def test_a_run_of_an_older_release_goes_on_with_figures_from_its_metrics(
    recipe: Make, train_without_delivery: Cut, capsys: pytest.CaptureFixture[str], undisturbed: tuple[bytes, Any]
) -> None:
    out = train_without_delivery(made := recipe(*SETTINGS))
    for path in checkpoint.listed(out / "checkpoints"):
        state = json.loads((path / "state.json").read_text())
        for key in ("sha256", "figures", "records_sha256", "records_from"):
            del state[key]
        del state["identity"]["fingerprint of config"]
        (path / "state.json").write_text(json.dumps(state))
    train(made)
    assert "could not be checked" in " ".join(capsys.readouterr().err.split())
    assert delivered(out) == undisturbed


def test_a_checkpoint_that_lacks_a_tensor_is_one_clear_error(recipe: Make, train_without_delivery: Cut) -> None:
    out = train_without_delivery(made := recipe(*SETTINGS))
    path = out / "checkpoints" / "step-4"
    state = json.loads((path / "state.json").read_text())
    del state["sha256"]
    (path / "state.json").write_text(json.dumps({k: v for k, v in state.items() if not k.startswith("records_")}))
    tensors = load_file(path / "adapter.safetensors")
    name = min(tensors)
    save_file({k: v.clone() for k, v in tensors.items() if k != name}, path / "adapter.safetensors")
    with pytest.raises(UserError, match=f"{name} has shape none, expected .*the checkpoint before"):
        train(made)


def test_a_base_that_rotted_meanwhile_is_refused_although_its_times_stand(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, train_without_delivery: Cut, tiny_base: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    monkeypatch.setattr(fingerprint, "_identity", lambda files: [[str(file)] for file in files])  # no time tells
    train_without_delivery(made := recipe(*SETTINGS, f"base={tmp_path / 'base'}"))
    weights = tmp_path / "base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-9] ^= 4
    weights.write_bytes(content)
    with pytest.raises(UserError, match="fingerprint of base was"):
        train(made)


def test_another_number_of_heads_is_another_run(
    recipe: Make, train_without_delivery: Cut, tiny_base: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    train_without_delivery(made := recipe(*SETTINGS, f"base={tmp_path / 'base'}"))
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace('"n_head": 4', '"n_head": 2'))
    with pytest.raises(UserError, match="fingerprint of config was"):
        train(made)


def test_all_that_a_run_leaves_parses_strictly_and_may_be_read_by_whom_the_umask_lets(
    recipe: Make, tmp_path: Path
) -> None:
    out = Path(train(recipe(*SETTINGS, 'run.samples=["the cat"]')).out)
    (tmp_path / "plain").touch()
    wanted = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    for path in out.rglob("*"):
        if path.is_file() and path.name != ".lock":
            assert stat.S_IMODE(path.stat().st_mode) == wanted, path
        if path.suffix == ".json":
            parse_json(path.read_bytes())
        elif path.suffix == ".jsonl":
            assert [parse_json(line) for line in path.read_bytes().splitlines()]


KILLED_AT_WRITES = """
import os, sys
from peftune.config.recipe import load_recipe
from peftune.training.run import train

def start(out, last_call):
    pid = os.fork()
    if pid == 0:
        left = [last_call]
        def dying(call):
            def called(*given, **named):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)
                return call(*given, **named)
            return called
        for name in ("fsync", "rename", "replace", "unlink"):
            setattr(os, name, dying(getattr(os, name)))
        train(load_recipe(sys.argv[1], [f"run.out={out}"]))
        os._exit(0)
    return os.waitpid(pid, 0)[1]

assert start("whole", -1) == 0
for last_call in range(2, 200, 13):
    killed = start(f"killed-{last_call}", last_call)
    assert start(f"killed-{last_call}", -1) == 0
    if killed == 0:
        break
print(last_call)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills children of its own")
def test_a_run_killed_at_its_writes_ends_alike_and_leaves_nothing_hidden(recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(*SETTINGS).model_dump(mode="json")))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(peftune.__file__).parents[1]), *sys.path])}
    command = [sys.executable, "-c", KILLED_AT_WRITES, "recipe.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 30
    for out in tmp_path.glob("killed-*"):
        assert delivered(out) == delivered(tmp_path / "whole")
        assert {path.name for path in out.rglob(".*")} <= {".lock"}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks the system what a file descriptor is of")
def test_all_is_on_the_disk_before_it_gets_its_name(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple[str, Path]] = []
    fsync, rename = os.fsync, os.rename

    def flushed(descriptor: int) -> None:
        calls.append(("flush", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        made = [source, *source.iterdir()] if source.is_dir() else [source]
        if source.name.startswith(".") and "adapter" in map(str, source.parts[-3:]):  # not the cache, checked when read
            before = {path for call, path in calls if call == "flush"}
            assert before.issuperset(made), f"{set(made) - before} not flushed before {target}"
            calls.append(("rename", Path(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "rename", renamed)
    out = Path(train(recipe(*SETTINGS)).out)
    names = [path for call, path in calls if call == "rename" and path.parent == out / "checkpoints"]
    assert [path.name for path in names] == [f"step-{step}" for step in range(5)]
    for path in names:
        at = calls.index(("rename", path))
        assert calls[at + 1] == ("flush", path.parent)
        earlier = max((i for i in range(at) if calls[i][0] == "rename"), default=-1)
        assert ("flush", out / "metrics.jsonl") in calls[earlier + 1 : at]
    delivery = calls.index(("rename", out / ".commit"))
    assert ("flush", out / "metrics.jsonl") in calls[calls.index(("rename", names[-1])) : delivery]


def test_metrics_that_are_a_link_are_not_written_through(recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    out = Path((made := recipe(*SETTINGS)).run.out)
    out.mkdir()
    (out / "metrics.jsonl").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written: it is not a file"):
        train(made)
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("name", ["README.md", "loss.png", "adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_file_that_no_run_wrote_is_not_replaced(
    recipe: Make, train_without_delivery: Cut, name: str, begun: bool
) -> None:
    out = Path((made := recipe(*SETTINGS, "data.validation=0")).run.out)
    if begun:
        train_without_delivery(made)
    out.mkdir(exist_ok=True)
    (out / name).write_text("precious")
    before = {path.name for path in out.iterdir()}
    with pytest.raises(UserError, match=f"holds {name}, which no run of peftune wrote there"):
        train(made)
    assert (out / name).read_text() == "precious" and {path.name for path in out.iterdir()} <= before | {".lock"}


@pytest.mark.parametrize("there", ["a link that leads nowhere", "a file", "not to be written to"])
def test_checkpoints_that_cannot_be_written_are_refused_before_the_first_step(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    out = Path((made := recipe(*SETTINGS)).run.out)
    out.mkdir()
    folder = out / "checkpoints"
    if there == "a link that leads nowhere":
        folder.symlink_to("nowhere")
    elif there == "a file":
        folder.write_text("")
    else:
        folder.mkdir()
        access = os.access  # root may write anywhere
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and access(path, mode))
    with pytest.raises(UserError, match="checkpoints is not a directory that may be written to"):
        train(made)
    assert not (out / "metrics.jsonl").exists()


def test_metrics_of_another_program_are_kept(recipe: Make) -> None:
    out = Path((made := recipe(*SETTINGS)).run.out)
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"precious": 1}\n')
    train(made)
    assert (out / "metrics.jsonl.damaged").read_text() == '{"precious": 1}\n'
    assert read_metrics(out / "metrics.jsonl")[0]["event"] == "start"


def test_what_lies_where_the_adapter_is_completed_is_refused_before_the_first_step(recipe: Make) -> None:
    out = Path((made := recipe(*SETTINGS)).run.out)
    (out / ".commit").mkdir(parents=True)
    (out / ".commit" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"\.commit: is not what an interrupted write"):
        train(made)
    assert not (out / "metrics.jsonl").exists() and (out / ".commit" / "notes.txt").exists()


def test_an_adapter_that_was_damaged_after_the_run_is_not_called_trained(recipe: Make) -> None:
    out = Path(train(made := recipe(*SETTINGS)).out)
    os.truncate(out / "adapter_model.safetensors", 100)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        train(made)


@pytest.mark.parametrize("value", ["[]", '"x"', '{"prose": 3}'])
def test_a_peftune_json_of_other_types_is_one_clear_error(recipe: Make, value: str) -> None:
    out = Path(train(made := recipe(*SETTINGS)).out)
    written = json.loads((out / "peftune.json").read_text())
    written = {key: value for key, value in written.items() if key not in ("sha256", "hashes")}
    (out / "peftune.json").write_text(json.dumps(written | {"metrics": json.loads(value)}))
    with pytest.raises(UserError, match=r"peftune\.json"):
        train(made)


def test_a_name_of_250_characters_works(recipe: Make, tmp_path: Path) -> None:
    out = Path(train(recipe(*SETTINGS, f"run.out={tmp_path / ('n' * 250)}")).out)
    assert len(out.name) == 250 and (out / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("a #b", "a #b"), ("a  b", "a  b"), (" a", " a"), ("'a b'", "a b"), ("007", None), ("a\nb", None), ("a\tb", None)],
)
def test_a_directory_on_the_command_line_is_the_one_that_was_typed(recipe: Make, text: str, wanted: str | None) -> None:
    if wanted is None:
        with pytest.raises(UserError, match=r"run\.out"):
            recipe(f"run.out={text}")
    else:
        assert recipe(f"run.out={text}").run.out == wanted


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_no_memory_is_one_line(recipe: Make, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(loading, "load_adapted", refuse)
    with pytest.raises(UserError, match="out of memory"):
        train(recipe(*SETTINGS))
    with pytest.raises(ValueError), device.report_out_of_memory():
        raise ValueError


def test_no_memory_outside_of_training_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(main, "app", refuse)
    assert main.run(["adapters", "list"]) == 2
    assert capsys.readouterr().err == "peftune: out of memory; free some, or use a machine with more\n"


@pytest.fixture
def broken_base(tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny base with a NaN in its final norm."""
    shutil.copytree(tiny_base, tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    weights["transformer.ln_f.weight"][0] = torch.nan
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "broken"


@pytest.mark.parametrize("validation", ["0", "0.2"])
def test_training_on_a_base_that_is_not_finite_is_a_failed_check(
    recipe: Make, broken_base: Path, validation: str
) -> None:
    with pytest.raises(CheckFailed):
        train(recipe(f"base={broken_base}", f"data.validation={validation}"))


def test_evaluating_a_base_that_is_not_finite_is_a_failed_check(
    broken_base: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    command = ["eval", "--base", str(broken_base), "--data", f"prose={corpus}", "--json", str(figures)]
    assert main.run(command) == 4
    assert "holds values that are not finite: the weights are broken" in capsys.readouterr().err
    assert not figures.exists()


def test_a_perplexity_that_no_number_holds_is_a_failed_check() -> None:
    assert Score(699.0, 1, 1).figures()["perplexity"] < float("inf")
    for nats in (701.0, float("-inf"), float("nan")):
        with pytest.raises(CheckFailed, match="not a finite result"):
            Score(nats, 1, 1).figures()
