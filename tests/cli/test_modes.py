"""What is delivered has the permissions that the umask says; what others may not read is named as such."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peftune import files
from peftune.cli import main

WRITERS = {
    "train": "train r.yaml",
    "merge": "merge a --base BASE --out new",
    "merge in bf16": "merge a --base BASE --out new --dtype bfloat16 --no-verify",
    "export": "export BASE --to gguf --adapter a --out new",
    "combine": "adapters combine a b --weights 1,1 --out new --base BASE --json f.json",
    "extract": "adapters extract --base BASE --tuned tuned --rank 2 --out new",
    "import": "adapters import a --base BASE --out new",
    "eval": "eval --base BASE --data x=text.jsonl --json f.json",
    "configs": "configs new",
}


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """That of the process, as it is asked once when the program starts."""
    before = os.umask(request.param)
    monkeypatch.setattr(files, "_UMASK", request.param)
    yield request.param
    os.umask(before)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_what_is_delivered_has_the_modes_of_the_umask(here: Path, tiny_base: Path, umask: int) -> None:
    Path("r.yaml").write_text(
        f"base: {tiny_base}\ndata: {{train: text.jsonl, validation: 0.3, new_tokens: ['<|x|>']}}\n"
        "optim: {steps: 2}\nrun: {out: new, save_every: 1}\n"
    )
    wrong = []
    for name, call in WRITERS.items():
        if name == "export":
            pytest.importorskip("gguf")
        assert main.run(call.replace("BASE", str(tiny_base)).split()) == 0
        made = [path for path in (Path("new"), *Path("new").rglob("*"), Path("f.json")) if path.exists()]
        assert made
        for path in made:
            wanted = (0o777 if path.is_dir() else 0o666) & ~umask
            if stat.S_IMODE(path.stat().st_mode) != wanted and path.name != ".lock":
                wrong.append(f"{name}: {path} {path.stat().st_mode:o}")
        shutil.rmtree("new", ignore_errors=True)
    assert wrong == []
    cache = Path(os.environ["PEFTUNE_CACHE"])
    assert [path for path in cache.rglob("*") if path.stat().st_mode & 0o022] == []
    assert not (cache / "tokens").stat().st_mode & 0o077


@contextmanager
def forbidden(forbidden_path: Path) -> Iterator[None]:
    """A block in which something in the working directory may not be read; root may read all, so it is left."""
    forbidden_path.chmod(0)
    if os.geteuid() != 0:
        yield
        return
    for directory in (Path("."), *(path for path in Path(".").rglob("*") if path.is_dir() and path != forbidden_path)):
        directory.chmod(0o777)
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


UNREADABLE = {
    "adapter_model.safetensors": ["adapters show a", "merge a --base BASE --out new", "adapters compare a b"],
    "adapter_config.json": ["adapters show a", "adapters import a --base BASE --out new"],
    "base/model.safetensors": ["eval --base base --data x=text.jsonl", "merge a --base base --out new"],
    "old/pytorch_model.bin": ["eval --base old --data x=text.jsonl"],
    "base/tokenizer.json": ["data text.jsonl --base base"],
    "base/config.json": ["data text.jsonl --base base"],
    "text.jsonl": ["data text.jsonl --base BASE"],
    "r.yaml": ["train r.yaml"],
    "a": ["adapters show a", "merge a --base BASE --out new", "generate --adapter a --prompt x"],
    "base": ["data text.jsonl --base base"],
    "prompts.txt": ["generate --base BASE --prompts prompts.txt"],
}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_may_not_be_read_is_said_to_be_one(
    here: Path, tiny_base: Path, name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_base, "base")
    shutil.copytree(tiny_base, "other")
    if name.startswith("old"):
        shutil.copytree(tiny_base, "old")
        torch.save(load_file("old/model.safetensors"), name)
        Path("old/model.safetensors").unlink()
    monkeypatch.setenv("PEFTUNE_CACHE", "cache")
    for file in ("r.yaml", "prompts.txt"):
        Path(file).write_text("x\n")
    target = Path("a" if name.startswith("adapter") else ".") / name
    for call in UNREADABLE[name]:  # imports what is needed: another user may not read this one's Python
        main.run(call.replace("BASE", "other").split())
    for left in ("new", "cache"):
        shutil.rmtree(left, ignore_errors=True)
    capfd.readouterr()
    with forbidden(target):
        for call in UNREADABLE[name]:
            assert main.run(call.replace("BASE", "other").split()) == 2, call
            err = capfd.readouterr().err
            assert (
                re.search("Permission denied|is not readable", err) and target.name in err and err.count("\n") == 1
            ), (call, err)
