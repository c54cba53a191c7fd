"""What is read is what was checked: links and pipes that come meanwhile, files that change under a loaded adapter."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftune.errors import UserError
from peftune.serve import private_copy as module
from peftune.serve.private_copy import private_copy

LOAD = "/v1/load_lora_adapter"


@pytest.fixture
def allowed(tmp_path: Path, root: Path) -> Path:
    shutil.copytree(root / "a1", tmp_path / "allowed" / "deep" / "a1")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "adapter_config.json").write_text("a secret")
    return tmp_path / "allowed"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_all_files_are_copied_and_go_afterwards(allowed: Path) -> None:
    adapter = allowed / "deep" / "a1"
    (adapter / "folder").mkdir()
    (allowed / "shared.json").write_text("{}")
    (adapter / "link.json").symlink_to(allowed / "shared.json")
    with private_copy(adapter, [allowed]) as copy:
        assert copy.name == "a1"
        assert names(copy) == ["adapter_config.json", "adapter_model.safetensors", "folder", "link.json"]
        assert not (copy / "link.json").is_symlink()
        for name in set(names(copy)) - {"folder"}:
            assert (copy / name).read_bytes() == (adapter / name).read_bytes()
    assert not copy.parent.exists()


@pytest.mark.parametrize("swapped", ["adapter_config.json", "a1", "deep"])
def test_a_link_that_comes_after_the_check_is_not_followed(
    swapped: str, allowed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, copied = allowed / "deep" / "a1", module._copy
    place = {"adapter_config.json": adapter / swapped, "a1": adapter, "deep": adapter.parent}[swapped]

    def swap_then_copy(path: Path, target: Path) -> None:
        if not place.is_symlink():
            place.rename(tmp_path / "moved")
            shutil.copytree(tmp_path / "outside", tmp_path / "outside" / "a1", dirs_exist_ok=True, symlinks=True)
            place.symlink_to(tmp_path / "outside" / (swapped if swapped.endswith("json") else ""))
        copied(path, target)

    monkeypatch.setattr(module, "_copy", swap_then_copy)
    with pytest.raises(UserError, match="cannot be read"), private_copy(adapter, [allowed]):
        pass


def test_a_link_outwards_and_a_pipe_are_refused(allowed: Path, tmp_path: Path) -> None:
    adapter = allowed / "deep" / "a1"
    (adapter / "peftune.json").symlink_to(tmp_path / "outside" / "adapter_config.json")
    with pytest.raises(UserError, match=r"peftune\.json lies outside"), private_copy(adapter, [allowed]):
        pass
    (adapter / "peftune.json").unlink()
    os.mkfifo(adapter / "peftune.json")
    with pytest.raises(UserError, match=r"peftune\.json is not a file"), private_copy(adapter, [allowed]):
        pass


def test_a_loaded_adapter_outlives_its_files_and_no_error_names_the_copy(
    start: Callable[..., Any], allowed: Path
) -> None:
    adapter = allowed / "deep" / "a1"
    asked = {"model": "x", "prompt": "y", "max_tokens": 4, "temperature": 0}
    with start({}, roots=(allowed,)) as server:
        assert server.post(LOAD, lora_name="x", lora_path="deep/a1").status_code == 200
        before = server.post("/v1/completions", **asked).json()["choices"]
        with (adapter / "adapter_model.safetensors").open("r+b") as file:
            file.truncate(100)  # what is mapped into memory would be gone
        assert server.post("/v1/completions", **asked).json()["choices"] == before
        (card,) = [one for one in server.http.get("/v1/models").json()["data"] if one["id"] == "x"]
        assert card["root"] == "a1"
        answer = server.post(LOAD, lora_name="z", lora_path="deep/a1")
        assert answer.status_code == 400 and "deep/a1" in answer.text and "peftune-" not in answer.text
