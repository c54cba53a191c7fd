"""The kernel's copy with changes holds the same bits as the merge that writes every tensor, or says why it cannot."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from peftune.adapters.directory import read_adapter
from peftune.adapters.fold import MergedTensors
from peftune.adapters.layout import layout_of
from peftune.adapters.merge import file_copy
from peftune.adapters.merge import merge as merging
from peftune.adapters.merge.merge import merge
from peftune.errors import CheckFailed, UserError
from peftune.model.base import Base
from peftune.model.lora import quiet_peft

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`:UserWarning", "ignore:Model with `tie_word_embeddings:UserWarning"
)

LINEAR = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


def stored_as(base: Path, directory: Path, dtype: torch.dtype, shards: bool = False, **config: Any) -> Path:
    """The base as Transformers saves it in this dtype, in one file or in several, with its tokenizer."""
    model = GPT2LMHeadModel.from_pretrained(base, dtype=dtype, config=GPT2Config.from_pretrained(base, **config))
    model.save_pretrained(directory, **({"max_shard_size": "60KB"} if shards else {}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((base / name).read_bytes())
    return directory


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def reason(base: Path, adapter: Path, dtype: torch.dtype = torch.float32, limit: int | None = None) -> str | None:
    read = read_adapter(adapter)
    layout = layout_of(read.config, read.tensors, Base(base).config, "adapter")
    return file_copy.why_rewritten(MergedTensors(Base(base).weights, layout), dtype, limit)


@pytest.mark.parametrize(
    ("dtype", "shards", "tied", "settings"),
    [
        ("float32", False, True, {"target_modules": LINEAR}),
        ("bfloat16", True, True, {"target_modules": LINEAR, "bias": "all"}),
        ("float16", False, True, {"lora_bias": True, "use_rslora": True}),
        ("float32", True, False, {"target_modules": ["c_attn", "lm_head", "wte"]}),
        ("bfloat16", False, True, {"use_dora": True, "modules_to_save": ["wpe", "ln_1"]}),
        ("float32", True, True, {"init_lora_weights": "pissa", "target_modules": LINEAR}),
    ],
)
def test_a_copy_with_changes_holds_the_bits_of_a_rewrite(
    dtype: str,
    shards: bool,
    tied: bool,
    settings: dict[str, Any],
    tiny_base: Path,
    make_adapter: Any,
    tools: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = stored_as(tiny_base, tmp_path / "base", getattr(torch, dtype), shards, tie_word_embeddings=tied)
    adapter = make_adapter(base=base, **settings)
    assert reason(base, adapter, getattr(torch, dtype)) is None
    before = digests(base)
    fast = merge(adapter, tmp_path / "fast", str(base), dtype, texts=tools.texts)
    monkeypatch.setattr(merging, "why_rewritten", lambda *_: "for comparison")
    slow = merge(adapter, tmp_path / "slow", str(base), dtype, texts=tools.texts)
    found, expected = tensors_of(tmp_path / "fast"), tensors_of(tmp_path / "slow")
    assert fast == slow and found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) and found[n].dtype == expected[n].dtype for n in expected)
    assert {p.name for p in (tmp_path / "fast").glob("model*")} == {p.name for p in base.glob("model*")}
    assert digests(base) == before


def test_what_no_copy_can_hold_is_rewritten_and_the_reason_said(
    tiny_base: Path, layouts: dict[str, Path], make_adapter: Any, tools: Any, tmp_path: Path
) -> None:
    adapter = make_adapter()
    assert reason(tiny_base, adapter) is None
    assert "not stored as safetensors" in str(reason(layouts["prefixed-bin"], adapter))
    assert "files hold h.0.attn.bias" in str(reason(layouts["bare-one"], adapter))
    assert "not say that their tensors are torch's" in str(reason(layouts["prefixed-shards"], adapter))
    assert "not wholly stored as bfloat16" in str(reason(tiny_base, adapter, torch.bfloat16))
    assert "larger than 1000 bytes" in str(reason(tiny_base, adapter, limit=1000))
    untying = make_adapter("head", target_modules=["lm_head"])
    assert "merged model holds lm_head.weight" in str(reason(tiny_base, untying))
    tensors = load_file(tiny_base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    twice = stored_as(tiny_base, tmp_path / "twice", torch.float32)
    save_file(tensors, twice / "model.safetensors", metadata={"format": "pt"})
    assert "files hold lm_head.weight" in str(reason(twice, adapter))
    merge(adapter, tmp_path / "out", str(twice), texts=tools.texts)
    assert (tools.logits_of(tmp_path / "out") - tools.logits_with_peft(tiny_base, adapter)).abs().max() <= 1e-4


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symlink", "hardlink"])
def test_a_linked_base_is_read_and_never_written(
    link: Any, tiny_base: Path, make_adapter: Any, tools: Any, tmp_path: Path
) -> None:
    base = stored_as(tiny_base, tmp_path / "base", torch.float32)
    blob = tmp_path / "blob"
    (base / "model.safetensors").rename(blob)
    link(blob, base / "model.safetensors")
    before = hashlib.sha256(blob.read_bytes()).hexdigest()
    merge(make_adapter(), tmp_path / "out", str(base), texts=tools.texts)
    merged = tmp_path / "out" / "model.safetensors"
    assert hashlib.sha256(blob.read_bytes()).hexdigest() == before and not merged.is_symlink()
    assert merged.stat().st_ino != blob.stat().st_ino and merged.stat().st_nlink == 1


@pytest.mark.parametrize("answer", [errno.EXDEV, 0], ids=["other-file-system", "copies-nothing"])
def test_without_the_kernels_copy_the_bits_are_the_same(
    answer: int, tiny_base: Path, make_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter()
    merge(adapter, tmp_path / "kernel", str(tiny_base), verify=False)

    def refused(*arguments: Any) -> int:
        if answer:
            raise OSError(answer, "refused")
        return 0

    monkeypatch.setattr("peftune.adapters.merge.file_copy.os.copy_file_range", refused, raising=False)
    monkeypatch.setattr("peftune.adapters.merge.file_copy._BUFFER", 1000)
    merge(adapter, tmp_path / "buffer", str(tiny_base), verify=False)
    assert digests(tmp_path / "kernel") == digests(tmp_path / "buffer")


@pytest.mark.parametrize("place", ["copy", "change"])
def test_a_failure_in_the_middle_leaves_nothing(
    place: str, tiny_base: Path, make_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter()

    def full(*arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_copy, {"copy": "_copy_piece", "change": "stored"}[place], full)
    with pytest.raises(UserError, match="No space left"):
        merge(adapter, tmp_path / "out", str(tiny_base), verify=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_change_that_is_not_finite_is_refused(tiny_base: Path, make_adapter: Any, tmp_path: Path) -> None:
    base = stored_as(tiny_base, tmp_path / "base", torch.float16)
    with pytest.raises(CheckFailed, match="do not fit"):
        merge(make_adapter(lora_alpha=10**8), tmp_path / "out", str(base), dtype="float16", verify=False)
    assert not (tmp_path / "out").exists()


def test_a_changed_byte_of_the_copy_is_found_by_the_verification(
    tiny_base: Path, make_adapter: Any, tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = file_copy._overwrite

    def shifted(header: Any, copy: Path, *rest: Any) -> None:
        right(header, copy, *rest)
        with copy.open("r+b") as file:
            file.seek(header.places["transformer.h.1.mlp.c_fc.weight"][0])
            file.write(torch.full((64,), 3.0).numpy().tobytes())

    monkeypatch.setattr(file_copy, "_overwrite", shifted)
    with pytest.raises(CheckFailed, match="logits differ"):
        merge(make_adapter(target_modules=LINEAR), tmp_path / "out", str(tiny_base), texts=tools.texts)
    assert not (tmp_path / "out").exists()


def test_the_index_of_a_copy_names_every_tensor(tiny_base: Path, make_adapter: Any, tmp_path: Path) -> None:
    base = stored_as(tiny_base, tmp_path / "base", torch.float32, shards=True)
    merge(make_adapter(), tmp_path / "out", str(base), verify=False)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in tensors_of(base).values())


def test_every_bit_is_the_one_that_peft_merges(make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path) -> None:
    """Plain LoRA on all linear layers of an fp32 base: PEFT's own order of operations, so no rounding differs."""
    adapter = make_adapter(target_modules=["c_attn", "c_proj", "c_fc"])
    merge(adapter, tmp_path / "out", str(tiny_base), texts=tools.texts)
    with quiet_peft():
        merged = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tiny_base), adapter).merge_and_unload()
    wanted, found = merged.state_dict(), load_file(tmp_path / "out" / "model.safetensors")
    assert found and all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
