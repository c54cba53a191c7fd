"""One bit flips in a file that a verb reads, its modification time stays: it is found, or it is harmless."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzzing import SECONDS, deadline, rounds
from safetensors.torch import load_file

from peftune.adapters.directory import read_adapter, write_adapter
from peftune.adapters.edit.combine import combine
from peftune.adapters.edit.extract import extract
from peftune.adapters.inspect.compare import compare
from peftune.adapters.inspect.describe import describe
from peftune.adapters.inspect.scan import scan
from peftune.adapters.merge.merge import merge
from peftune.config.data_section import Source
from peftune.errors import PeftuneError, UserError
from peftune.inference.bank import AdapterBank
from peftune.inference.generate import generate
from peftune.inference.perplexity import evaluate
from peftune.inference.settings import GenerationSettings
from peftune.model.base import Base, open_base

FLIPS = 2  # of each verb on each file, and as many more as there is time for
GREEDY = GenerationSettings(max_new_tokens=8, temperature=0)
BEAMS = GenerationSettings(max_new_tokens=8, temperature=0, beams=2)
Verb = Callable[[Path], Any]


def computed(directory: Path) -> Any:
    """The tensors of a directory that was written, by name and value."""
    file = directory / ("model.safetensors" if (directory / "config.json").exists() else "adapter_model.safetensors")
    return {name: tensor.tolist() for name, tensor in load_file(file).items()}


def written(out: Path) -> Any:
    found = computed(out)
    shutil.rmtree(out)
    return found


def combined(here: Path) -> Any:
    combine([here / "adapter"], [0.5], here / "out", base=str(here / "base"))
    return written(here / "out")


def merged(here: Path) -> Any:
    merge(here / "adapter", here / "out", str(here / "base"), verify=False)
    return written(here / "out")


def extracted(here: Path) -> Any:
    extract(str(here / "base"), str(here / "merged"), 2, here / "out")
    return written(here / "out")


def scores(here: Path, base: str, **adapters: Path) -> Any:
    return evaluate(open_base(str(here / base)), {"x": [Source(path=str(here / "x.txt"))]}, adapters)["rows"]


def texts(base: Path, adapter: Path | None) -> Any:
    bank = AdapterBank(str(base))
    if adapter is not None:
        bank.add("a", adapter)
    return [g.ids for g in bank.generate(["the cat"], GREEDY, "a" if adapter else None)]


ADAPTER_VERBS: dict[str, Verb] = {
    "show": lambda here: describe(here / "adapter", str(here / "base")).as_json(),
    "list": lambda here: (
        [(e.facts, e.problem) for e in scan(here / "adapter").entries if not e.problem] or pytest.skip("found")
    ),
    "compare": lambda here: vars(compare(here / "adapter", here / "adapter")),
    "combine": combined,
    "merge": merged,
    "eval": lambda here: scores(here, "base", a=here / "adapter")["a"],
    "serve": lambda here: texts(here / "base", here / "adapter"),
    "beams": lambda here: [g.ids for g in generate("the", open_base(str(here / "base")), here / "adapter", BEAMS)],
}
MERGED_VERBS: dict[str, Verb] = {
    "eval": lambda here: scores(here, "merged"),
    "serve": lambda here: texts(here / "merged", None),
    "extract": extracted,
}


@pytest.fixture(scope="module")
def here(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter that was delivered for it, their merge, and a text."""
    import torch

    root = tmp_path_factory.mktemp("damage")
    shutil.copytree(tiny_base, root / "base")
    generator = torch.Generator().manual_seed(0)
    prefix = "base_model.model.transformer.h.0.attn.c_attn.lora_"
    tensors = {
        f"{prefix}{part}.weight": torch.randn(shape, generator=generator)
        for part, shape in (("A", (2, 32)), ("B", (96, 2)))
    }
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3, "fan_in_fan_out": True}
    config |= {"target_modules": ["transformer.h.0.attn.c_attn"], "base_model_name_or_path": str(root / "base")}
    recorded = {**open_base(str(root / "base")).identity(), "step": 3, "metrics": {"x": {"base": {"loss": 4.5}}}}
    write_adapter(root / "adapter", config, tensors, recorded, {"README.md": "about", "loss.png": b"\x89PNG"})
    merge(root / "adapter", root / "merged", str(root / "base"))
    (root / "x.txt").write_text("the cat sat on the mat and the dog sat on the log\n")
    return root


_OF_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "peftune.json", "README.md")
_OF_BASE = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_OF_MERGED = (*_OF_BASE, "generation_config.json", "merge.json")
FILES = {
    **{f"adapter/{name}": ADAPTER_VERBS for name in _OF_ADAPTER},
    **{f"base/{name}": ADAPTER_VERBS for name in _OF_BASE},
    **{f"merged/{name}": MERGED_VERBS for name in _OF_MERGED},
}


@pytest.fixture(scope="module")
def undamaged(here: Path) -> dict[tuple[str, str], Any]:
    kinds = {"adapter": ADAPTER_VERBS, "base": ADAPTER_VERBS, "merged": MERGED_VERBS}
    first = {(kind, name): verb(here) for kind, verbs in list(kinds.items())[1:] for name, verb in verbs.items()}
    return first | {("adapter", name): first["base", name] for name in ADAPTER_VERBS}


@pytest.mark.fuzz
@pytest.mark.parametrize("file", FILES)
@pytest.mark.filterwarnings("ignore")
def test_a_flipped_bit_is_found_or_harmless(file: str, here: Path, undamaged: dict[tuple[str, str], Any]) -> None:
    path = here / file
    content, times = path.read_bytes(), path.stat()
    random_bits = random.Random(None if SECONDS else file)
    found = harmless = 0
    try:
        for name, verb in FILES[file].items():
            for _ in rounds(FLIPS, SECONDS / len(FILES[file])):
                bit = random_bits.randrange(8 * len(content))
                damaged = bytearray(content)
                damaged[bit // 8] ^= 1 << bit % 8
                path.write_bytes(damaged)
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
                try:
                    with deadline(120):
                        result = verb(here)
                except PeftuneError as error:
                    assert error.exit_code in (2, 4) and "\n" not in str(error)
                    found += 1
                except pytest.skip.Exception:
                    found += 1
                else:
                    assert result == undamaged[file.partition("/")[0], name], f"{name}: bit {bit} of {file}"
                    harmless += 1
    finally:
        path.write_bytes(content)
    if file.endswith(".safetensors"):
        assert harmless == 0 or file.startswith("base")  # `list` and `compare` read no base
    elif file.endswith("README.md"):
        assert found == 0


def test_edited_words_are_nobodys_damage(here: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(here / "adapter", tmp_path / "adapter")
    (adapter / "README.md").write_text("my own words")
    (adapter / "notes.txt").write_text("more")
    read_adapter(adapter)


@pytest.mark.parametrize("change", ["step", "sha256", "no sha256", "indent"])
def test_peftune_json_vouches_for_itself(here: Path, tmp_path: Path, change: str) -> None:
    adapter = shutil.copytree(here / "adapter", tmp_path / "adapter")
    recorded = json.loads((adapter / "peftune.json").read_text())
    if change == "step":
        recorded["step"] = 4
    elif change == "sha256":
        recorded["sha256"]["adapter_config.json"] = "0" * 64
    elif change == "no sha256":
        del recorded["sha256"]
    (adapter / "peftune.json").write_text(json.dumps(recorded))
    if change == "indent":
        read_adapter(adapter)
    else:
        with pytest.raises(UserError, match=r"peftune.json is not as it was written .*copy the adapter again"):
            read_adapter(adapter)


def test_an_adapter_without_hashes_is_read_as_before(here: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(here / "adapter", tmp_path / "adapter")
    recorded = json.loads((adapter / "peftune.json").read_text())
    del recorded["sha256"], recorded["sha256_of_peftune_json"]
    (adapter / "peftune.json").write_text(json.dumps(recorded))
    assert read_adapter(adapter).fingerprint == read_adapter(here / "adapter").fingerprint
    (adapter / "peftune.json").unlink()
    read_adapter(adapter)


def test_a_merge_reads_the_base_again(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotten disk changes no time at all, so here the identity of the files is frozen."""
    base, adapter = shutil.copytree(here / "base", tmp_path / "base"), here / "adapter"
    monkeypatch.setattr("peftune.model.fingerprint._identity", lambda files: [["frozen"]])
    monkeypatch.setenv("PEFTUNE_CACHE", str(tmp_path / "cache"))
    assert Base(base).fingerprint == open_base(str(here / "base")).fingerprint
    content = bytearray((base / "model.safetensors").read_bytes())
    content[-1] ^= 0x40
    (base / "model.safetensors").write_bytes(content)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="has other weights"):
        merge(adapter, tmp_path / "out", str(base))


def test_a_merged_model_that_was_changed_on_purpose_is_used_without_merge_json(here: Path, tmp_path: Path) -> None:
    model = shutil.copytree(here / "merged", tmp_path / "model")
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {"layer_norm_epsilon": 1e-4}))
    with pytest.raises(UserError, match=r"config.json is not the file that was merged .* or remove merge.json"):
        _ = Base(model).config
    (model / "merge.json").unlink()
    assert Base(model).config.layer_norm_epsilon == 1e-4
