"""An adapter finds its base wherever it is called from, for peftune and for PEFT alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM

from peftune.adapters.base_of import base_of
from peftune.adapters.directory import read_adapter, write_adapter
from peftune.cli.main import run
from peftune.errors import BaseNotFound
from peftune.model.base import Base
from peftune.model.lora import quiet_peft


@pytest.fixture
def place(tiny_base: Path, make_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `models/bases/b` and `adapters/a`, which names it by that; the current directory is another."""
    folder = tmp_path / "place"
    shutil.copytree(tiny_base, folder / "models" / "bases" / "b")
    monkeypatch.chdir(folder)
    plain = read_adapter(make_adapter())
    recorded = Base(Path("models/bases/b"), "models/bases/b").identity()
    write_adapter(Path("adapters/a"), plain.config, plain.tensors, recorded, {})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


def test_it_is_found_from_another_directory(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = place / "adapters" / "a"
    assert base_of(adapter) == str(place / "models" / "bases" / "b")
    Path("models/bases/b").mkdir(parents=True)  # another one of that name
    assert base_of(adapter) == str(place / "models" / "bases" / "b")
    (place.parent / "link").symlink_to(adapter)
    assert base_of(place.parent / "link") == str(place / "models" / "bases" / "b")
    monkeypatch.chdir(place)
    assert base_of(Path("adapters/a")) == "models/bases/b", "where it was trained it is called as it was there"


def test_both_can_be_moved_together(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = place.rename(tmp_path / "moved")
    assert run(["merge", str(moved / "adapters" / "a"), "--out", str(tmp_path / "merged")]) == 0
    assert run(["adapters", "show", str(moved / "adapters" / "a")]) == 0
    assert f"its base lies in {moved / 'models' / 'bases' / 'b'}" in capsys.readouterr().out


def test_an_adapter_that_was_moved_alone_says_what_to_do(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = shutil.copytree(place / "adapters" / "a", tmp_path / "alone")
    assert base_of(alone) == str(place / "models" / "bases" / "b"), "by the whole path, on the same machine"
    shutil.move(place / "models", tmp_path / "gone")
    with pytest.raises(BaseNotFound, match=r"its base models/bases/b is found neither from here nor from the adapter"):
        base_of(alone)
    for adapter in (alone, older(alone)):
        assert run(["generate", "--adapter", str(adapter), "--prompt", "the"]) == 2
        assert capsys.readouterr().err.rstrip().endswith("(--base DIR)")
        assert (
            run(["generate", "--adapter", str(adapter), "--prompt", "the", "--base", str(tmp_path / "gone/bases/b")])
            == 0
        )


def older(adapter: Path) -> Path:
    """The same as an earlier release wrote it: the relative name in both files, and no hashes."""
    for name, change in (("peftune.json", {}), ("adapter_config.json", {"base_model_name_or_path": "models/bases/b"})):
        kept = {k: v for k, v in json.loads((adapter / name).read_text()).items() if "sha256" not in k}
        kept.pop("base_from_adapter", None)
        (adapter / name).write_text(json.dumps(kept | change))
    return adapter


@pytest.mark.parametrize("way", [["x"], 7, "\0", "x" * 5000, "/nonexistent", ""])
def test_a_way_that_leads_nowhere_is_not_followed(place: Path, way: Any) -> None:
    adapter = older(place / "adapters" / "a")
    values = json.loads((adapter / "peftune.json").read_text())
    (adapter / "peftune.json").write_text(json.dumps(values | {"base_from_adapter": way}))
    with pytest.raises(BaseNotFound, match="base models/bases/b"):
        from peftune.model.base import open_base

        open_base(base_of(adapter))


@pytest.mark.filterwarnings("ignore")
def test_peft_alone_finds_it_too(place: Path, make_adapter: Any, tmp_path: Path) -> None:
    """The built-in base as well: the card says where it lies on another machine."""
    with quiet_peft():
        model = AutoPeftModelForCausalLM.from_pretrained(place / "adapters" / "a")
    assert model.config.n_embd == 32
    from peftune.adapters.model_card import model_card
    from peftune.model.base import BUILTIN

    small = read_adapter(make_adapter("small", BUILTIN["builtin:small"]))
    write_adapter(tmp_path / "s", small.config, small.tensors, {"base": "builtin:small"}, {})
    with quiet_peft(), torch.no_grad():
        found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "s")
        assert found(torch.tensor([[1, 2]])).logits.shape == (1, 2, 4096)
    assert base_of(tmp_path / "s") == "builtin:small"
    assert 'open_base("builtin:small").directory' in model_card("builtin:small", "s", "")
    assert "open_base" not in model_card("gpt2", "s", "")
