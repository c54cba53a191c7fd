"""Every adapter below a directory is listed, and a broken one with its reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from peftune.adapters.inspect import scan as module
from peftune.adapters.inspect.scan import scan
from peftune.errors import UserError


def test_facts_come_from_the_tensors_and_from_peftune_json(make_adapter: Any, tmp_path: Path) -> None:
    make_adapter("runs/plain", use_rslora=True, target_modules=["c_attn", "mlp.c_fc"], rank_pattern={"mlp.c_fc": 2})
    trained = make_adapter("runs/deep/trained", target_modules=["attn.c_attn", "attn.c_proj"])
    recipe = {"lora": {"variant": "pissa"}}
    metrics = {"poems": {"base": {"loss": 4.0}, "adapter": {"loss": 3.5}}}
    recorded = {
        "base": "gpt2",
        "base_fingerprint": "ab",
        "recipe": recipe,
        "step": 30,
        "tokens": 999,
        "metrics": metrics,
    }
    (trained / "peftune.json").write_text(json.dumps(recorded))
    found = scan(tmp_path)
    assert [entry.name for entry in found.entries] == ["runs/deep/trained", "runs/plain"] and not found.cut
    deep, plain = (entry.facts for entry in found.entries)
    assert deep == {
        "base": "gpt2", "base_fingerprint": "ab", "variant": "pissa", "ranks": [4],
        "targets": ["attn.c_attn", "attn.c_proj"], "megabytes": deep["megabytes"], "step": 30, "tokens": 999,
        "loss": {"poems": 3.5},
    }  # fmt: skip
    assert deep["megabytes"] == 4 * 2 * 4 * (32 + 96 + 32 + 32) / 1e6
    assert plain["variant"] == "rslora" and plain["ranks"] == [2, 4] and plain["targets"] == ["attn.c_attn", "mlp.c_fc"]
    assert plain["step"] is None and plain["loss"] == {}


def test_broken_ones_are_listed_with_their_reason(make_adapter: Any, tmp_path: Path) -> None:
    make_adapter("good")
    (make_adapter("no-config") / "adapter_config.json").unlink()
    cut = make_adapter("cut") / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-10])
    (make_adapter("prompt") / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    llama = make_adapter("llama") / "adapter_model.safetensors"
    tensors = {k.replace("transformer.h", "model.layers"): v for k, v in load_file(llama).items()}
    save_file(tensors, llama)
    (make_adapter("torn") / "peftune.json").write_text("{")
    unfinished = tmp_path / "unfinished"
    (unfinished / "checkpoints").mkdir(parents=True)
    (unfinished / "metrics.jsonl").touch()
    problems = {entry.name: entry.problem for entry in scan(tmp_path).entries}
    assert problems.pop("good") == ""
    expected = {
        "cut": "not a complete safetensors file", "llama": "which no GPT-2 has", "no-config": "no adapter_config.json",
        "prompt": "peft_type is PROMPT_TUNING", "torn": "peftune.json: cannot be read",
        "unfinished": "its training has not finished",
    }  # fmt: skip
    assert problems.keys() == expected.keys()
    assert all(reason in problems[name] and "\n" not in problems[name] for name, reason in expected.items())


def test_a_search_is_bounded_and_visits_each_directory_once(
    make_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter("a/b")
    (tmp_path / "a" / "round").symlink_to(tmp_path)
    (tmp_path / "z").symlink_to(adapter)
    for hidden in (".writing-x", "checkpoints"):
        shutil.copytree(adapter, tmp_path / "a" / hidden)
    assert [entry.name for entry in scan(tmp_path).entries] == ["a/b"]
    assert [entry.name for entry in scan(adapter).entries] == ["b"]
    monkeypatch.setattr(module, "DEPTH", 1)
    found = scan(tmp_path)
    assert found.cut and [entry.name for entry in found.entries] == ["z"]  # one level down, by the link
    monkeypatch.setattr(module, "DEPTH", 8)
    monkeypatch.setattr(module, "DIRECTORIES", 2)
    found = scan(tmp_path)
    assert found.cut and found.entries == []  # only the directory itself and `a` are visited


def test_where_there_is_nothing_to_look_at_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for directory in (tmp_path / "none", tmp_path / "file", Path("x" * 5000)):
        with pytest.raises(UserError):
            scan(directory)
    assert scan(tmp_path).entries == []
