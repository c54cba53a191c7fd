"""Base weights read the same from every layout, and a damaged checkpoint is refused in one line."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from peftune.errors import UserError
from peftune.model.base import Base
from peftune.model.weights import open_weights, row_chunks


@pytest.fixture
def sharded(tiny_base: Path, tmp_path: Path) -> Path:
    GPT2LMHeadModel.from_pretrained(tiny_base).save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    return tmp_path / "sharded"


def test_shards_hold_the_tensors_of_the_model(sharded: Path, tiny_base: Path) -> None:
    weights = Base(sharded).weights
    state = GPT2LMHeadModel.from_pretrained(tiny_base).state_dict()
    del state["lm_head.weight"]
    assert weights.tied and len(weights.files) > 1 and weights.names() == sorted(state)
    for name, tensor in state.items():
        assert weights.shape(name) == tuple(tensor.shape) and weights.dtype(name) == torch.float32
        assert torch.equal(weights.tensor(name), tensor)
        assert torch.equal(torch.cat(list(weights.chunks(name))), tensor)
    assert torch.equal(weights.rows("transformer.wte.weight", 7, 11), state["transformer.wte.weight"][7:11])


def test_bare_pickled_keys_and_mask_buffers_read_the_same(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_base / "config.json", tmp_path)
    state = {k.removeprefix("transformer."): v for k, v in load_file(tiny_base / "model.safetensors").items()}
    buffers = {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    torch.save(state | buffers | {"lm_head.weight": state["wte.weight"]}, tmp_path / "pytorch_model.bin")
    ours, theirs = Base(tmp_path).weights, Base(tiny_base).weights
    assert ours.names() == theirs.names() and ours.tied
    assert all(torch.equal(ours.tensor(name), theirs.tensor(name)) for name in ours.names())


def test_a_head_of_its_own_is_kept(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "untied")
    tensors = load_file(tiny_base / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1}, tmp_path / "untied" / "model.safetensors"
    )
    path = tmp_path / "untied" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
    weights = Base(tmp_path / "untied").weights
    assert not weights.tied and "lm_head.weight" in weights.names()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def point_elsewhere(directory: Path) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["transformer.h.9.ln_1.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing shard": (lambda d: sorted(d.glob("model-*"))[1].unlink(), "shards are missing"),
    "truncated": (lambda d: truncate(sorted(d.glob("model-*"))[0]), "not a whole safetensors file"),
    "lying index": (point_elsewhere, "no shard holds"),
    "empty index": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
    "nothing": (lambda d: [path.unlink() for path in d.glob("model*")], "no weights here"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_one_line(name: str, sharded: Path) -> None:
    damage, message = DAMAGES[name]
    damage(sharded)
    with pytest.raises(UserError, match=message) as caught:
        assert Base(sharded).weights
    assert "\n" not in str(caught.value)


def test_a_pickle_that_is_cut_short_or_holds_code_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_base / "config.json", tmp_path)
    torch.save(load_file(tiny_base / "model.safetensors"), tmp_path / "pytorch_model.bin")
    truncate(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="weights-only"):
        assert Base(tmp_path).weights
    torch.save({"x": Path("code")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="weights-only"):
        assert Base(tmp_path).weights


def test_row_chunks_cover_all_rows_once() -> None:
    chunks = row_chunks((50_257, 1600))
    assert chunks[0][0] == 0 and chunks[-1][1] == 50_257
    assert all(first[1] == second[0] for first, second in itertools.pairwise(chunks))
    assert row_chunks(()) == [] and row_chunks((5,)) == [(0, 5)]


def test_weights_that_may_not_be_read_are_not_called_missing(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # root may read anything
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        open_weights(tiny_base)
