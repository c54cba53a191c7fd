"""GGUF files say what the model says: read with the format's own reader, computed as llama.cpp's graph does.

Where llama-cpp-python is installed, its greedy text is compared too (tests/adapters/test_llama_cpp.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_forward import logits_of, read
from peft import PeftModel
from transformers import GPT2LMHeadModel

from peftune.adapters.gguf.write_gguf import export_gguf
from peftune.errors import CheckFailed, UserError
from peftune.model.base import Base
from peftune.model.lora import quiet_peft

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

IDS = torch.tensor([[0, 5, 17, 250, 31, 8, 90]])
OTHERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "inverse-layer": {"scale_attn_by_inverse_layer_idx": True},
    "unscaled": {"scale_attn_weights": False},
    "untied": {"tie_word_embeddings": False},
    "narrow-inner": {"n_inner": 48, "activation_function": "gelu_fast"},
}


@pytest.fixture
def base_like(base: Path, tmp_path: Path) -> Callable[..., Base]:
    """Makes a random base with other values in its configuration."""

    def make(**values: Any) -> Base:
        from transformers import GPT2Config

        torch.manual_seed(1)
        config = GPT2Config.from_pretrained(base, **values)
        directory = tmp_path / "other"
        GPT2LMHeadModel(config).save_pretrained(directory)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (directory / name).write_bytes((base / name).read_bytes())
        return Base(directory, str(directory))

    return make


def expected(base: Base, adapter: Path | None = None) -> torch.Tensor:
    model: Any = GPT2LMHeadModel.from_pretrained(base.directory, attn_implementation="eager")
    if adapter is not None:
        with quiet_peft():
            model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return model.double().eval()(IDS).logits[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("values", OTHERS.values(), ids=OTHERS.keys())
def test_a_base_in_gguf_has_the_logits_of_transformers(
    base_like: Callable[..., Base], values: dict[str, Any], tmp_path: Path
) -> None:
    base = base_like(**values)
    export_gguf(base, tmp_path / "out")
    fields, tensors = read(tmp_path / "out" / "model.gguf")
    torch.testing.assert_close(logits_of(IDS[0], fields, tensors, {}), expected(base), rtol=0, atol=1e-5)
    assert ("output.weight" in tensors) == (values.get("tie_word_embeddings") is False)


@pytest.mark.parametrize("values", [{}, {"scale_attn_by_inverse_layer_idx": True}], ids=["plain", "inverse-layer"])
@pytest.mark.parametrize("kind", ["attention", "wide", "rslora", "uneven", "one-block"])
def test_an_adapter_in_gguf_has_the_logits_of_peft(
    adapters: dict[str, Path], base_like: Callable[..., Base], kind: str, values: dict[str, Any], tmp_path: Path
) -> None:
    base = base_like(**values)
    export_gguf(base, tmp_path / "out", [adapters[kind]])
    fields, tensors = read(tmp_path / "out" / "model.gguf")
    about, lora = read(tmp_path / "out" / f"{kind}.gguf")
    found, wanted = logits_of(IDS[0], fields, tensors, lora), expected(base, adapters[kind])
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
    assert (about["general.type"], about["adapter.type"], about["adapter.lora.alpha"]) == ("adapter", "lora", 0)
    assert f"ADAPTER ./{kind}.gguf" in (tmp_path / "out" / f"Modelfile.{kind}").read_text().splitlines()


@pytest.mark.parametrize(("kind", "error"), [("f16", 5e-4), ("q8_0", 5e-3)])
def test_narrower_types_are_near(base_like: Callable[..., Base], kind: str, error: float, tmp_path: Path) -> None:
    base = base_like()
    export_gguf(base, tmp_path / "out", kind=kind)
    fields, tensors = read(tmp_path / "out" / "model.gguf")
    wanted = {name: value.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else value
              for name, value in GPT2LMHeadModel.from_pretrained(base.directory).state_dict().items()}  # fmt: skip
    found, exact = tensors["blk.0.attn_qkv.weight"], wanted["transformer.h.0.attn.c_attn.weight"].numpy()
    assert 0 < np.abs(found - exact).max() < error * np.abs(exact).max()
    assert np.array_equal(tensors["position_embd.weight"], wanted["transformer.wpe.weight"].numpy())
    assert fields["general.file_type"] == {"f16": 1, "q8_0": 7}[kind]


def test_tokens_are_those_of_the_tokenizer(base_like: Callable[..., Base], tmp_path: Path) -> None:
    base = base_like(vocab_size=320)  # more rows than tokens
    export_gguf(base, tmp_path / "out")
    fields, _ = read(tmp_path / "out" / "model.gguf")
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert {text: number for number, text in enumerate(tokens[: len(base.tokenizer)])} == base.tokenizer.get_vocab()
    assert [kinds[number] for number in (base.tokenizer.eos_token_id, 40, 319)] == [3, 1, 5]
    assert len(set(tokens)) == 320
    state = json.loads(base.tokenizer.backend_tokenizer.to_str())
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in state["model"]["merges"]]
    assert fields["tokenizer.ggml.bos_token_id"] == base.tokenizer.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"] is True


@pytest.mark.parametrize("name", ["gelu", "relu"])
def test_what_llama_cpp_computes_otherwise_is_not_written(
    base_like: Callable[..., Base], name: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"activation_function {name} cannot be written as GGUF"):
        export_gguf(base_like(activation_function=name), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "words"), [("dora", "DoRA"), ("pissa", "PiSSA"), ("head", "adapted head"), ("whole", "trained in full")]
)
def test_adapters_beyond_a_and_b_are_not_written(
    adapters: dict[str, Path], base_directory: Path, kind: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        export_gguf(Base(base_directory, "base"), tmp_path / "out", [adapters[kind]])
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_llama_cpp_does_not_know_is_not_written(
    base_like: Callable[..., Base], tmp_path: Path
) -> None:
    base = base_like()
    path = base.directory / "tokenizer.json"
    state = json.loads(path.read_text())
    state["pre_tokenizer"]["add_prefix_space"] = True
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"does not cut words as GPT-2 does, and llama\.cpp would make other tokens"):
        export_gguf(base, tmp_path / "out")


def test_a_file_that_reads_back_differently_is_not_delivered(
    base_like: Callable[..., Base], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    honest = gguf.GGUFWriter.write_tensor_data
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", lambda self, tensor: honest(self, tensor * 1.001))
    with pytest.raises(CheckFailed, match="read back differs"):
        export_gguf(base_like(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
