"""A merge writes the right bits however the base is stored, leaves the base alone, and leaves nothing if it fails."""

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

from peftune.adapters import fold
from peftune.adapters.merge import merge as merging
from peftune.adapters.merge import shards as shard_files
from peftune.adapters.merge.merge import merge
from peftune.errors import CheckFailed, UserError
from peftune.model.lora import quiet_peft

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`:UserWarning", "ignore:Model with `tie_word_embeddings:UserWarning"
)

LINEAR = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


def stored_as(base: Path, directory: Path, dtype: torch.dtype, shards: bool = False, **config: Any) -> Path:
    """The base as Transformers saves it in this dtype, in one file or in several, with its tokenizer."""
    torch.manual_seed(2)  # an untied head is random
    model = GPT2LMHeadModel.from_pretrained(base, dtype=dtype, config=GPT2Config.from_pretrained(base, **config))
    model.save_pretrained(directory, **({"max_shard_size": "60KB"} if shards else {}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((base / name).read_bytes())
    return directory


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


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
def test_bits_do_not_depend_on_how_the_base_is_stored(
    dtype: str,
    shards: bool,
    tied: bool,
    settings: dict[str, Any],
    tiny_base: Path,
    make_adapter: Any,
    tools: Any,
    tmp_path: Path,
) -> None:
    stored = {}
    for split in (shards, not shards):
        name = "shards" if split else "one-file"
        base = stored_as(tiny_base, tmp_path / name, getattr(torch, dtype), split, tie_word_embeddings=tied)
        adapter = make_adapter(f"adapter-{name}", base=base, **settings)
        before = digests(base)
        report = merge(adapter, tmp_path / f"merged-{name}", str(base), dtype, texts=tools.texts)
        assert report.modules_applied == report.modules_in_adapter > 0 and digests(base) == before
        stored[split] = tensors_of(tmp_path / f"merged-{name}")
    found, expected = stored[shards], stored[not shards]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) and found[n].dtype == expected[n].dtype for n in expected)
    assert all(tensor.dtype == getattr(torch, dtype) for tensor in found.values())


def test_bits_are_the_same_for_every_layout_of_the_base(
    tiny_base: Path, layouts: dict[str, Path], make_adapter: Any, tools: Any, tmp_path: Path
) -> None:
    adapter = make_adapter()
    merge(adapter, tmp_path / "expected", str(tiny_base), verify=False)
    expected = tensors_of(tmp_path / "expected")
    tensors = load_file(tiny_base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    twice = stored_as(tiny_base, tmp_path / "twice", torch.float32)
    save_file(tensors, twice / "model.safetensors", metadata={"format": "pt"})
    for name in ("prefixed-bin", "bare-one", "prefixed-shards"):
        merge(adapter, tmp_path / name, str(layouts[name]), verify=False)
    merge(adapter, tmp_path / "out", str(twice), texts=tools.texts)
    for name in ("prefixed-bin", "bare-one", "prefixed-shards", "out"):
        found = tensors_of(tmp_path / name)
        assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)
    assert (tools.logits_of(tmp_path / "out") - tools.logits_with_peft(tiny_base, adapter)).abs().max() <= 1e-4
    untying = make_adapter("head", target_modules=["lm_head"])
    merge(untying, tmp_path / "untied", str(tiny_base), texts=tools.texts)
    assert "lm_head.weight" in tensors_of(tmp_path / "untied")


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


def test_bits_do_not_depend_on_how_much_is_written_at_a_time(
    tiny_base: Path, make_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter()
    merge(adapter, tmp_path / "large", str(tiny_base), verify=False)
    monkeypatch.setattr(merging, "_COPIED_VALUES", 1000)
    monkeypatch.setattr(fold, "_CHUNK_VALUES", 1000)
    merge(adapter, tmp_path / "small", str(tiny_base), verify=False)
    assert digests(tmp_path / "large") == digests(tmp_path / "small")


@pytest.mark.parametrize("chunks", [0, 3])
def test_a_failure_in_the_middle_leaves_nothing(
    chunks: int, tiny_base: Path, make_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter()
    written, right = [0], shard_files.stored

    def full(*arguments: Any) -> Any:
        if written[0] == chunks:
            raise OSError(errno.ENOSPC, "No space left on device")
        written[0] += 1
        return right(*arguments)

    monkeypatch.setattr(shard_files, "stored", full)
    with pytest.raises(UserError, match="No space left"):
        merge(adapter, tmp_path / "out", str(tiny_base), verify=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_change_that_is_not_finite_is_refused(tiny_base: Path, make_adapter: Any, tmp_path: Path) -> None:
    base = stored_as(tiny_base, tmp_path / "base", torch.float16)
    with pytest.raises(CheckFailed, match="do not fit"):
        merge(make_adapter(lora_alpha=10**8), tmp_path / "out", str(base), dtype="float16", verify=False)
    assert not (tmp_path / "out").exists()


def test_a_changed_byte_of_the_file_is_found_by_the_verification(
    tiny_base: Path, make_adapter: Any, tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = merging.write_weights

    def shifted(directory: Path, *rest: Any) -> None:
        right(directory, *rest)
        path = directory / "model.safetensors"
        tensors = load_file(path)
        tensors["transformer.h.1.mlp.c_fc.weight"].view(-1)[:64] = 3.0
        save_file(tensors, path, metadata={"format": "pt"})

    monkeypatch.setattr(merging, "write_weights", shifted)
    with pytest.raises(CheckFailed, match="differs from base"):
        merge(make_adapter(target_modules=LINEAR), tmp_path / "out", str(tiny_base), texts=tools.texts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "name", ["wte.weight", "wpe.weight", "h.1.mlp.c_fc.weight", "h.0.attn.c_attn.bias", "ln_f.weight"]
)
def test_one_element_that_is_off_by_its_last_bit_is_found_in_half_precision(
    dtype: str, name: str, tiny_base: Path, make_adapter: Any, tools: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    right, target = merging.write_weights, f"transformer.{name}"

    def planted(directory: Path, *rest: Any) -> None:
        right(directory, *rest)
        tensors = load_file(directory / "model.safetensors")
        tensors[target].view(torch.int16).view(-1)[-1] ^= 1
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    adapter = make_adapter(target_modules=[*LINEAR, "wte"])
    merge(adapter, tmp_path / "right", str(tiny_base), dtype=dtype, texts=tools.texts)
    monkeypatch.setattr(merging, "write_weights", planted)
    with pytest.raises(CheckFailed, match=rf"{target} differs from base \+ adapter rounded to {dtype} in 1 of"):
        merge(adapter, tmp_path / "out", str(tiny_base), dtype=dtype, texts=tools.texts)


def test_the_index_names_every_tensor(tiny_base: Path, make_adapter: Any, tmp_path: Path) -> None:
    base = stored_as(tiny_base, tmp_path / "base", torch.float32, shards=True)
    merge(make_adapter(), tmp_path / "out", str(base), verify=False, max_shard_bytes=60_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {name: file.name for file in (tmp_path / "out").glob("*.safetensors") for name in load_file(file)}
    assert len(set(files.values())) > 1 and index["weight_map"] == files
    assert files.keys() == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in tensors_of(base).values())


def test_every_bit_is_the_one_that_peft_merges(make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path) -> None:
    """Plain LoRA on all linear layers of an fp32 base: PEFT's own order of operations, so no rounding differs."""
    adapter = make_adapter(target_modules=["c_attn", "c_proj", "c_fc"])
    merge(adapter, tmp_path / "out", str(tiny_base), texts=tools.texts)
    with quiet_peft():
        merged = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tiny_base), adapter).merge_and_unload()
    wanted, found = merged.state_dict(), load_file(tmp_path / "out" / "model.safetensors")
    assert found and all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
