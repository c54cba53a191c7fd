"""A fingerprint is of content, and an adapter is refused on anything but its own base."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from peftune.adapters.base_of import check_base
from peftune.adapters.directory import read_adapter
from peftune.errors import UserError
from peftune.model.base import Base


def copy(base: Path, to: Path) -> Path:
    shutil.copytree(base, to)
    return to


def change_one_weight(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 5] += 1e-3
    save_file(tensors, base / "model.safetensors")


@pytest.mark.parametrize(
    ("bos", "data", "told"),
    [("<s>", {"join": " "}, True), ("<s>", {"special_tokens": "text"}, False), (None, {"join": " "}, False)],
)
def test_it_is_said_that_an_older_adapter_saw_texts_begin_otherwise(
    bos: str | None, data: dict[str, str], told: bool, tiny_base: Path, tmp_path: Path, make_adapter: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    base, adapter = copy(tiny_base, tmp_path / "base"), make_adapter()
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.bos_token = bos and tokenizer.convert_ids_to_tokens(5)
    tokenizer.save_pretrained(base)
    (adapter / "peftune.json").write_text(json.dumps({"peftune": "0.1.0", "recipe": {"data": data}}))
    check_base(read_adapter(adapter), Base(base))
    assert ("began with <|endoftext|>; now they begin with" in " ".join(capsys.readouterr().err.split())) is told


def test_fingerprint_is_the_same_for_every_layout(layouts: dict[str, Path], tiny_base: Path) -> None:
    assert {Base(directory).fingerprint for directory in layouts.values()} == {Base(tiny_base).fingerprint}


def test_one_changed_weight_changes_the_fingerprint(tiny_base: Path, tmp_path: Path) -> None:
    other = copy(tiny_base, tmp_path / "other")
    assert Base(other).fingerprint == Base(tiny_base).fingerprint
    change_one_weight(other)
    assert Base(other).fingerprint != Base(tiny_base).fingerprint


def test_fingerprint_is_read_from_the_cache_the_second_time(tiny_base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PEFTUNE_CACHE", str(tmp_path / "cache"))
    value = Base(tiny_base).fingerprint
    monkeypatch.setattr("peftune.model.weights.bytes_of", lambda tensor: pytest.fail("hashed again"))
    assert Base(tiny_base).fingerprint == value


def flip_a_bit(path: Path) -> None:
    """In the last byte, with the modification time set back, as no program but a careful one would do it."""
    times = path.stat()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 0x40]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_bit_that_changed_is_seen_although_the_time_did_not(tiny_base: Path, tmp_path: Path) -> None:
    base = copy(tiny_base, tmp_path / "base")
    value = Base(base).fingerprint
    flip_a_bit(base / "model.safetensors")
    assert Base(base).fingerprint != value


def test_a_fresh_fingerprint_is_of_the_bytes_on_the_disk(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rotten disk changes no time at all, so here the identity of the files is frozen."""
    base = copy(tiny_base, tmp_path / "base")
    monkeypatch.setattr("peftune.model.fingerprint._identity", lambda files: [["frozen"]])
    value = Base(base).fingerprint
    flip_a_bit(base / "model.safetensors")
    assert Base(base).fingerprint == value
    assert Base(base, fresh=True).fingerprint != value
    assert Base(base).fingerprint != value  # remembered since


def test_a_damaged_entry_of_the_cache_is_computed_again(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFTUNE_CACHE", str(tmp_path))
    value = Base(tiny_base).fingerprint
    cache = tmp_path / "fingerprints.json"
    cache.write_text(cache.read_text().replace(value[:8], "01234567"))
    assert Base(tiny_base).fingerprint == value


def test_fingerprint_does_not_depend_on_how_much_is_read_at_a_time(
    tiny_base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    value = Base(tiny_base).fingerprint
    monkeypatch.setenv("PEFTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("peftune.model.weights._HASHED", 1000)
    assert Base(tiny_base).fingerprint == value


@pytest.mark.parametrize("damage", ["broken", "list", "unwritable", "a file"])
def test_a_broken_cache_is_no_error(damage: str, tiny_base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    value = Base(tiny_base).fingerprint
    cache = tmp_path / "cache"
    if damage == "a file":
        cache.write_text("")
    else:
        cache.mkdir()
        (cache / "fingerprints.json").write_text("[1]" if damage == "list" else "{broken")
    if damage == "unwritable":
        os.chmod(cache, 0o500)
    monkeypatch.setenv("PEFTUNE_CACHE", str(cache))
    assert Base(tiny_base).fingerprint == value


def test_tokenizer_files_of_either_format_give_the_same_fingerprint(tiny_base: Path, tmp_path: Path) -> None:
    other = copy(tiny_base, tmp_path / "other")
    model = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(model, indent=7))  # formatting
    assert Base(other).tokenizer_fingerprint == Base(tiny_base).tokenizer_fingerprint
    (other / "tokenizer.json").unlink()
    (other / "tokenizer_config.json").unlink()
    (other / "special_tokens_map.json").unlink(missing_ok=True)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["model"]["merges"]]
    (other / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    end = {token["content"]: token["id"] for token in model["added_tokens"]}
    (other / "vocab.json").write_text(json.dumps(model["model"]["vocab"] | end))
    assert Base(other).tokenizer_fingerprint == Base(tiny_base).tokenizer_fingerprint


def test_another_token_changes_the_tokenizer_fingerprint(tiny_base: Path, tmp_path: Path) -> None:
    other = copy(tiny_base, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<new>"], special_tokens=True)
    tokenizer.save_pretrained(other)
    assert Base(other).tokenizer_fingerprint != Base(tiny_base).tokenizer_fingerprint


def test_adapter_is_refused_on_another_base_and_on_another_tokenizer(
    tiny_base: Path, make_adapter: Any, tmp_path: Path
) -> None:
    adapter = make_adapter()
    recorded = Base(tiny_base, "poet").identity()
    (adapter / "peftune.json").write_text(json.dumps(recorded))
    check_base(read_adapter(adapter), Base(tiny_base))
    weights, tokens = copy(tiny_base, tmp_path / "weights"), copy(tiny_base, tmp_path / "tokens")
    heads = copy(tiny_base, tmp_path / "heads")
    config = json.loads((heads / "config.json").read_text())
    (heads / "config.json").write_text(json.dumps(config | {"n_head": 8}))
    change_one_weight(weights)
    tokenizer = AutoTokenizer.from_pretrained(tokens)
    tokenizer.add_tokens(["<new>"], special_tokens=True)
    tokenizer.save_pretrained(tokens)
    for other, key, found in (
        (weights, "base_fingerprint", Base(weights).fingerprint),
        (tokens, "tokenizer_fingerprint", Base(tokens).tokenizer_fingerprint),
        (heads, "config_fingerprint", Base(heads).config_fingerprint),
    ):
        with pytest.raises(UserError, match="was trained on poet") as caught:
            check_base(read_adapter(adapter), Base(other))
        message = str(caught.value)
        assert recorded[key][:12] in message and found[:12] in message and found not in message and "\n" not in message


def test_plain_peft_adapters_pass(tiny_base: Path, make_adapter: Any) -> None:
    check_base(read_adapter(make_adapter()), Base(tiny_base))
