"""An adapter directory is read whole, written whole, or refused in one line."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from peftune.adapters import directory
from peftune.adapters.attach import load_with_rows
from peftune.adapters.base_of import base_of, read_for, read_layout
from peftune.adapters.directory import read_adapter, write_adapter
from peftune.errors import CheckFailed, UserError
from peftune.model.base import Base
from peftune.model.lora import quiet_peft

TENSORS = "adapter_model.safetensors"
PROVENANCE = {"base": "gpt2", "base_fingerprint": "0" * 64}


def spoil(adapter: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(adapter / TENSORS)
    change(tensors)
    save_file(tensors, adapter / TENSORS)


def loaded(adapter: Path, base: Path) -> PeftModel:
    opened = Base(base)
    return load_with_rows(opened, *read_for(adapter, opened))


def first(tensors: dict[str, torch.Tensor]) -> str:
    return min(name for name in tensors if "lora_A" in name)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no configuration": (lambda a: (a / "adapter_config.json").unlink(), "no adapter_config.json"),
    "bad JSON": (lambda a: (a / "adapter_config.json").write_text("{"), "cannot be read"),
    "a list": (lambda a: (a / "adapter_config.json").write_text("[]"), "holds list, expected an object"),
    "no tensors file": (lambda a: (a / TENSORS).unlink(), "no adapter_model.safetensors"),
    "cut short": (lambda a: truncate(a / TENSORS), "not a complete safetensors file"),
    "empty file": (lambda a: (a / TENSORS).write_bytes(b""), "not a complete safetensors file"),
    "no tensors": (lambda a: save_file({}, a / TENSORS), "holds no tensors"),
    "NaN": (lambda a: spoil(a, lambda t: t[first(t)].fill_(float("nan"))), "not finite"),
    "ZeRO-3 part": (lambda a: spoil(a, lambda t: t.update({first(t): torch.zeros(0)})), "ZeRO-3"),
    "bad provenance": (lambda a: (a / "peftune.json").write_text("no"), "peftune.json: cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_directory_is_refused_in_one_line(name: str, make_adapter: Any) -> None:
    damage, message = BROKEN[name]
    adapter = make_adapter()
    damage(adapter)
    with pytest.raises(UserError, match=message) as caught:
        read_adapter(adapter)
    assert "\n" not in str(caught.value) and str(adapter) in str(caught.value)


def test_a_whole_model_and_an_unfinished_run_get_a_hint(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="complete model"):
        read_adapter(tiny_base)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="has not finished"):
        read_adapter(tmp_path)


def test_a_pickled_adapter_is_read_and_code_in_it_is_not_run(make_adapter: Any) -> None:
    adapter = make_adapter()
    tensors = load_file(adapter / TENSORS)
    (adapter / TENSORS).unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    assert read_adapter(adapter).tensors.keys() == tensors.keys()
    torch.save({"x": Path("evil")}, adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="weights-only"):
        read_adapter(adapter)


def test_loaded_adapter_computes_what_peft_computes(make_adapter: Any, tools: Any, tiny_base: Path) -> None:
    adapter = make_adapter(use_dora=True)
    ours = loaded(adapter, tiny_base).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        theirs = tools.with_peft(tiny_base, adapter)
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize(
    ("shape", "message"),
    [({"n_layer": 1}, "h.1.attn"), ({"n_embd": 64}, "has shape"), ({"n_layer": 3}, "h.2.attn")],
    ids=["shallower", "wider", "deeper"],
)
def test_a_base_of_another_shape_is_refused(
    shape: dict[str, int], message: str, make_adapter: Any, tiny_base: Path
) -> None:
    with pytest.raises(UserError, match=message):
        read_layout(read_adapter(make_adapter()), GPT2Config.from_pretrained(tiny_base, **shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(first(t)), "is not there"),
        (lambda t: t.update(extra=torch.ones(1)), "extra belongs to nothing"),
        (lambda t: t.update({first(t).replace("c_attn", "q_proj"): torch.ones(1)}), "belongs to nothing"),
    ],
    ids=["missing", "unknown", "unknown module"],
)
def test_missing_and_left_over_tensors_are_refused(
    change: Any, message: str, make_adapter: Any, tiny_base: Path
) -> None:
    adapter = make_adapter()
    spoil(adapter, change)
    with pytest.raises(UserError, match=message):
        loaded(adapter, tiny_base)


def test_an_adapter_that_carries_another_embedding_is_refused(make_adapter: Any, tiny_base: Path) -> None:
    adapter = make_adapter(target_modules=["lm_head"])
    model = loaded(adapter, tiny_base).get_base_model()
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()  # still tied
    spoil(adapter, lambda t: t["base_model.model.lm_head.base_layer.weight"].add_(1))
    with pytest.raises(UserError, match="not the embedding of this base"):
        loaded(adapter, tiny_base)


def test_target_modules_and_layers_that_the_base_lacks_are_refused(
    make_adapter: Any, tools: Any, tiny_base: Path
) -> None:
    adapter = make_adapter()
    for settings in ({"target_modules": ["q_proj"]}, {"layers_to_transform": [7], "layers_pattern": "h"}):
        tools.edit_config(adapter, **settings)
        with pytest.raises(UserError, match="does not fit this base"):
            loaded(adapter, tiny_base)


def test_base_of_prefers_what_peftune_recorded(make_adapter: Any, tools: Any, tiny_base: Path) -> None:
    adapter = make_adapter()
    assert base_of(adapter) == str(tiny_base)
    (adapter / "peftune.json").write_text(json.dumps(PROVENANCE))
    assert base_of(adapter) == "gpt2"
    (adapter / "peftune.json").unlink()
    tools.edit_config(adapter, base_model_name_or_path=None)
    with pytest.raises(UserError, match="pass the base"):
        base_of(adapter)


def write(out: Path, adapter: directory.Adapter, scale: float = 1.0) -> None:
    tensors = {name: tensor * scale for name, tensor in adapter.tensors.items()}
    write_adapter(out, adapter.config, tensors, PROVENANCE, {"README.md": f"scale {scale}", "loss.png": b"\x89PNG"})


def scale_of(out: Path, adapter: directory.Adapter) -> float:
    name = first(adapter.tensors)
    return round(float((read_adapter(out).tensors[name] / adapter.tensors[name]).mean()), 3)


def test_written_directory_is_plain_peft_and_complete(make_adapter: Any, tiny_base: Path, tmp_path: Path) -> None:
    adapter = read_adapter(make_adapter())
    write(tmp_path / "out", adapter)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"adapter_config.json", TENSORS, "peftune.json", "README.md", "loss.png"}
    found = read_adapter(tmp_path / "out").provenance
    assert found is not None and found.pop("sha256").keys() == names - {"peftune.json"}
    assert len(found.pop("sha256_of_peftune_json")) == 64 and found == PROVENANCE
    with quiet_peft():
        PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tiny_base), str(tmp_path / "out"))
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "out"}


def test_rewriting_replaces_the_adapter_and_keeps_other_files(make_adapter: Any, tmp_path: Path) -> None:
    adapter, out = read_adapter(make_adapter()), tmp_path / "out"
    (out / "checkpoints" / "step-1").mkdir(parents=True)
    (out / "metrics.jsonl").write_text("{}")
    for scale in (1.0, 2.0):
        write(out, adapter, scale)
        assert scale_of(out, adapter) == scale
    assert (out / "metrics.jsonl").read_text() == "{}" and (out / "checkpoints" / "step-1").is_dir()
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


class Crash(BaseException):
    """The process ends here."""


def crash_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End at the n-th change of a directory entry, and let nothing be cleaned up, as a killed process would."""
    left = [calls]

    def counted(original: Any) -> Any:
        def call(*arguments: Any, **settings: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Crash
            return original(*arguments, **settings)

        return call

    for name in ("rename", "replace", "unlink", "mkdir", "rmdir", "write_bytes"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))


@pytest.mark.parametrize("moment", range(16))
def test_a_crash_at_any_moment_leaves_the_old_adapter_or_the_new_one_to_be_completed(
    moment: int, make_adapter: Any, tmp_path: Path
) -> None:
    adapter, out = read_adapter(make_adapter()), tmp_path / "out"
    write(out, adapter, 1.0)
    with pytest.MonkeyPatch.context() as patch:
        crash_after(moment, patch)
        with contextlib.suppress(Crash):
            write(out, adapter, 2.0)
    seen_by_plain_peft = (out / "adapter_config.json").is_file()
    new_tensors = not torch.equal(
        load_file(out / TENSORS)[first(adapter.tensors)], adapter.tensors[first(adapter.tensors)]
    )
    readme = (out / "README.md").read_text()
    assert not seen_by_plain_peft or (readme == "scale 2.0") == new_tensors
    if seen_by_plain_peft:
        assert readme == f"scale {scale_of(out, adapter)}"
    else:
        with pytest.raises(UserError, match="its last write was interrupted; start the same training again"):
            read_adapter(out)
        directory._finish_commit(out)
        assert scale_of(out, adapter) == 2.0
    write(out, adapter, 3.0)
    assert scale_of(out, adapter) == 3.0


def test_a_write_that_reads_back_differently_is_not_delivered(
    make_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = read_adapter(make_adapter())
    honest = directory.save_tensors

    def corrupt(tensors: dict[str, torch.Tensor], path: Path) -> None:
        honest({name: tensor + 1e-3 for name, tensor in tensors.items()}, path)

    monkeypatch.setattr(directory, "save_tensors", corrupt)
    with pytest.raises(CheckFailed, match="read back differs"):
        write(tmp_path / "out", adapter)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_a_directory_that_cannot_be_written_is_one_line(make_adapter: Any, tmp_path: Path) -> None:
    adapter = read_adapter(make_adapter())
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError):
            write(out, adapter)
