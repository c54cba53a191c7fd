"""Any bytes in the files of an adapter or a base are read or refused in one line, in bounded time."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import damaged_bytes, damaged_json, damaged_values, deadline, fuzz, read_or_refuse
from hypothesis import example, given
from hypothesis import strategies as st

from peftune.adapters.attach import load_with_rows
from peftune.adapters.base_of import read_for
from peftune.adapters.inspect.compare import compare
from peftune.adapters.inspect.describe import AdapterDescription, describe
from peftune.adapters.inspect.scan import scan
from peftune.cli.output.adapter_tables import print_comparison, print_description, print_scan
from peftune.errors import PeftuneError
from peftune.files import json_text
from peftune.model.base import Base
from peftune.model.load import load_model
from peftune.model.pickles import load_pickle

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SETTINGS: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": ["attn.c_attn"],
    "fan_in_fan_out": True, "bias": "none", "use_dora": False, "use_rslora": False, "lora_bias": False,
    "init_lora_weights": True, "rank_pattern": {"c_attn": 4}, "alpha_pattern": {}, "modules_to_save": None,
    "layers_to_transform": [0, 1], "layers_pattern": "h", "exclude_modules": None, "base_model_name_or_path": "gpt2",
    "inference_mode": True, "lora_dropout": 0.0, "eva_config": None, "megatron_core": "megatron.core", "revision": None,
    "layer_replication": None, "target_parameters": None, "auto_mapping": None, "runtime_config": {},
    "corda_config": {},
}  # fmt: skip
FIGURES = {"loss": 4.5, "perplexity": 90.0, "bits_per_byte": 2.0, "tokens": 10}
PROVENANCE: dict[str, Any] = {
    "peftune": "0.1.0", "base": "gpt2", "base_fingerprint": "0" * 64, "tokenizer_fingerprint": "1" * 64, "step": 30,
    "data_fingerprints": {"train": "2" * 64}, "tokens": 12, "seconds": 1.5, "precision": "fp32", "chat": False,
    "recipe": {"data": {"train": [{"path": "x.txt"}]}, "lora": {"variant": "lora"}, "quantize": "int8"},
    "identity": {"lora.rank": 4, "data.train": [{"path": "x"}]},
    "metrics": {"x": {"base": FIGURES, "adapter": FIGURES}},
    "versions": {"torch": "2"}, "combined": {"adapters": [{"adapter": "a", "weight": 1.0}], "relative_error": 0.1},
    "extracted": {"tuned": "x", "relative_error": 0.1},
}  # fmt: skip


@pytest.fixture(scope="module")
def here(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`adapter`, a plain one, and `base`, the tiny base in shards without its tokenizer."""
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("fuzz")
    (root / "adapter").mkdir()
    shapes = {"lora_A.weight": (4, 32), "lora_B.weight": (96, 4)}
    names = [f"base_model.model.transformer.h.{block}.attn.c_attn" for block in (0, 1)]
    tensors = {f"{name}.{part}": torch.randn(shape) for name in names for part, shape in shapes.items()}
    save_file(tensors, root / "adapter" / TENSORS)
    (root / "adapter" / CONFIG).write_text(json.dumps(SETTINGS))
    shutil.copytree(tiny_base, root / "base")
    return root


def put(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def use(adapter: Path, base: Path) -> None:
    """Everything that is done with an adapter's files, each on its own."""
    with deadline(120):
        shown = read_or_refuse(lambda: describe(adapter))
        if isinstance(shown, AdapterDescription):
            print_description(shown)
            read_or_refuse(lambda: print_comparison(compare(adapter, adapter)))
        print_scan(scan(adapter))
        read_or_refuse(lambda: load_with_rows(Base(base), *read_for(adapter, Base(base))))


@fuzz(16)
@pytest.mark.filterwarnings("ignore")
@given(content=damaged_json(SETTINGS))
def test_any_adapter_config(here: Path, content: bytes) -> None:
    try:
        put(here / "adapter" / CONFIG, content)
        use(here / "adapter", here / "base")
    finally:
        put(here / "adapter" / CONFIG, json.dumps(SETTINGS).encode())


@fuzz(16)
@pytest.mark.filterwarnings("ignore")
@given(content=damaged_json(PROVENANCE))
def test_any_peftune_json(here: Path, content: bytes) -> None:
    try:
        put(here / "adapter" / "peftune.json", content)
        use(here / "adapter", here / "base")
        shown = read_or_refuse(lambda: json_text(describe(here / "adapter").as_json()).encode())
        assert isinstance(shown, bytes | PeftuneError)
    finally:
        (here / "adapter" / "peftune.json").unlink()


def with_header(header: Any, values: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + values


HEADER = {
    f"base_model.model.transformer.h.{block}.attn.c_attn.lora_{part}.weight": {
        "dtype": "F32", "shape": [4, 32] if part == "A" else [96, 4],
        "data_offsets": [block * 2048 + start, end + block * 2048],
    }
    for block in (0, 1)
    for part, start, end in (("A", 0, 512), ("B", 512, 2048))
}  # fmt: skip
STORED = with_header(HEADER, bytes(range(60, 64)) * 1024)


@fuzz(15)
@pytest.mark.filterwarnings("ignore")
@given(content=damaged_values(HEADER).map(lambda h: with_header(h, bytes(4096))) | damaged_bytes(STORED))
def test_any_tensors_of_an_adapter(here: Path, content: bytes) -> None:
    whole = (here / "adapter" / TENSORS).read_bytes()
    try:
        put(here / "adapter" / TENSORS, content)
        use(here / "adapter", here / "base")
    finally:
        put(here / "adapter" / TENSORS, whole)


def pickled(zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({name: torch.ones(value["shape"]) for name, value in HEADER.items()}, buffer,
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    return buffer.getvalue()


REFERS_TO_NOTHING = b"\x80\x02r\xff\xff\xff\xff."


@pytest.mark.filterwarnings("ignore")
@fuzz(40)
@example(content=REFERS_TO_NOTHING)
@given(content=damaged_bytes(pickled(True)) | damaged_bytes(pickled(False)[:700]))
def test_any_pickle_is_read_or_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.bin"
    put(path, content)
    with deadline():
        read_or_refuse(lambda: load_pickle(path))


def open_all(base: Path) -> None:
    with deadline(120):
        read_or_refuse(lambda: Base(base).identity())
        read_or_refuse(lambda: load_model(Base(base)))


def fuzz_base(here: Path, name: str, content: bytes) -> None:
    path = here / "base" / name
    whole = path.read_bytes() if path.exists() else None
    try:
        put(path, content)
        open_all(here / "base")
    finally:
        path.unlink() if whole is None else put(path, whole)


@fuzz(25)
@pytest.mark.filterwarnings("ignore")
@given(data=st.data())
def test_any_config_of_a_base(here: Path, data: st.DataObject) -> None:
    valid = json.loads((here / "base" / "config.json").read_text())
    fuzz_base(here, "config.json", data.draw(damaged_json(valid)))


@fuzz(16)
@pytest.mark.filterwarnings("ignore")
@given(data=st.data())
def test_any_weights_of_a_base(here: Path, data: st.DataObject) -> None:
    whole = (here / "base" / "model.safetensors").read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = damaged_values(json.loads(whole[8 : 8 + size])).map(lambda h: with_header(h, whole[8 + size :]))
    fuzz_base(here, "model.safetensors", data.draw(header | damaged_bytes(whole[: size + 4096])))


@fuzz(15)
@pytest.mark.filterwarnings("ignore")
@given(data=st.data())
def test_any_index_of_a_base(here: Path, layouts: dict[str, Path], data: st.DataObject) -> None:
    base = layouts["prefixed-shards"]
    index = base / "model.safetensors.index.json"
    whole = index.read_bytes()
    try:
        put(index, data.draw(damaged_json(json.loads(whole))))
        open_all(base)
    finally:
        put(index, whole)


@fuzz(10)
@pytest.mark.filterwarnings("ignore")
@given(content=damaged_json({"sha256": {"config.json": "0" * 64, "model.safetensors": "1" * 64}, "mean_kl": 0.1}))
def test_any_merge_json(here: Path, content: bytes) -> None:
    fuzz_base(here, "merge.json", content)


def test_what_was_put_there_is_gone(here: Path) -> None:
    assert sorted(os.listdir(here / "adapter")) == [CONFIG, TENSORS]
