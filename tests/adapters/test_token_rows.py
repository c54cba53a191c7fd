"""Adapters with rows of single tokens (PEFT's `trainable_token_indices`), everywhere that adapters are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from peftune.adapters.attach import load_with_rows
from peftune.adapters.base_of import read_for, read_layout
from peftune.adapters.directory import read_adapter
from peftune.adapters.edit.combine import combine
from peftune.adapters.gguf.write_gguf import export_gguf
from peftune.adapters.inspect.compare import compare
from peftune.adapters.inspect.describe import describe
from peftune.adapters.inspect.scan import scan
from peftune.adapters.merge.merge import merge
from peftune.adapters.token_rows import TokenRows
from peftune.errors import CheckFailed, UserError
from peftune.inference.bank import AdapterBank
from peftune.model.base import Base, open_base
from peftune.model.lora import quiet_peft

pytestmark = pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings:UserWarning")
DELTA = "base_model.model.transformer.wte.token_adapter.trainable_tokens_delta"
TABLES = "transformer.wte.weight", "lm_head.weight"


@pytest.fixture(scope="session")
def untied_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base's shape with a head of its own."""
    directory = tmp_path_factory.mktemp("untied")
    torch.manual_seed(5)
    GPT2LMHeadModel(GPT2Config.from_pretrained(tiny_base, tie_word_embeddings=False)).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("tied", "indices", "settings"),
    [
        (True, [7, 3], {}),
        (True, {"wte": [7, 3]}, {"use_dora": True}),
        (True, {"lm_head": [5]}, {}),
        (True, {"wte": [5], "lm_head": [5]}, {}),
        (True, {"transformer.wte": [5], "lm_head": [9, 2]}, {"use_rslora": True}),
        (True, {"wpe": [4]}, {"target_modules": ["c_fc"], "modules_to_save": ["ln_f"]}),
        (False, [3], {"target_modules": ["c_attn", "lm_head"]}),
        (False, {"wte": [3], "lm_head": [9, 1]}, {}),
    ],
    ids=str,
)
def test_merge_bank_and_loading_compute_what_peft_computes(
    tied: bool,
    indices: Any,
    settings: dict[str, Any],
    make_adapter: Any,
    tools: Any,
    tiny_base: Path,
    untied_base: Path,
    tmp_path: Path,
) -> None:
    base = tiny_base if tied else untied_base
    adapter = make_adapter(base=base, trainable_token_indices=indices, **settings)
    ids = torch.arange(2, 34)[None]
    with torch.no_grad():
        expected = tools.with_peft(base, adapter)(ids).logits
        opened = Base(base)
        assert torch.equal(load_with_rows(opened, *read_for(adapter, opened)).eval()(ids).logits, expected)
        merge(adapter, tmp_path / "out", str(base), texts=tools.texts)
        merged = GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
        assert (merged(ids).logits - expected).abs().max() <= 1e-5
    bank = AdapterBank(str(base), device="cpu")
    before = bank.logits(ids, None)
    bank.add("rows", adapter)
    assert (bank.logits(ids, "rows") - expected).abs().max() <= 1e-5
    assert torch.equal(bank.logits(ids, None), before)


def test_old_rows_keep_their_bits_and_the_bank_shares_the_blocks(
    make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(trainable_token_indices=[7, 3])
    merge(adapter, tmp_path / "out", str(tiny_base), texts=tools.texts)
    before, after = (load_file(d / "model.safetensors")[TABLES[0]] for d in (tiny_base, tmp_path / "out"))
    assert torch.equal(after[[7, 3]], load_file(adapter / "adapter_model.safetensors")[DELTA])
    old = [row for row in range(len(before)) if row not in (7, 3)]
    assert torch.equal(after[old], before[old]) and "lm_head.weight" not in load_file(
        tmp_path / "out/model.safetensors"
    )
    bank = AdapterBank(str(tiny_base), device="cpu")
    bank.add("rows", adapter)
    assert bank.variant("rows").model.blocks[0] is bank.variant(None).model.blocks[0]


@pytest.mark.parametrize("whole", [True, False])
def test_tokens_that_are_new_to_the_base_are_merged(whole: bool, tools: Any, tiny_base: Path, tmp_path: Path) -> None:
    """With the embedding beside them, as PEFT saves it, and with the rows alone."""
    adapter, rows = tmp_path / "adapter", GPT2Config.from_pretrained(tiny_base).vocab_size
    model = GPT2LMHeadModel.from_pretrained(tiny_base)
    model.resize_token_embeddings(rows + 2, mean_resizing=False)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], trainable_token_indices=[rows, rows + 1, 4])
    with quiet_peft():
        trained = get_peft_model(model, config).eval()
        for parameter in trained.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0
        trained.save_pretrained(adapter, save_embedding_layers=whole)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.add_tokens(["<|name|>", "<|scene|>"])
    tokenizer.save_pretrained(adapter)
    ids = torch.tensor([[4, rows, 5, rows + 1, 6]])
    merge(adapter, tmp_path / "out", str(tiny_base), texts=["a <|name|> b <|scene|>", *tools.texts])
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert (merged(ids).logits - trained(ids).logits).abs().max() <= 1e-5
    old = [row for row in range(rows) if row != 4]
    assert torch.equal(
        merged.transformer.wte.weight[old], GPT2LMHeadModel.from_pretrained(tiny_base).transformer.wte.weight[old]
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<|scene|>") == rows + 1


def test_the_check_of_a_merge_sees_a_row_in_the_wrong_place(
    make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(trainable_token_indices=list(range(200)))
    put = TokenRows.put_into
    monkeypatch.setattr(TokenRows, "put_into", lambda self, *a: put(replace(self, indices=self.indices.flip(0)), *a))
    with pytest.raises(CheckFailed, match="differs from base"):
        merge(adapter, tmp_path / "out", str(tiny_base), texts=tools.texts)


def test_what_only_knows_low_rank_updates_says_that_there_are_rows(
    make_adapter: Any, tiny_base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(trainable_token_indices=[7, 3])
    plain = make_adapter("plain")
    with pytest.raises(UserError, match=r"rows of single tokens.*merge it"):
        combine([adapter, plain], [0.5, 0.5], tmp_path / "sum")
    with pytest.raises(UserError, match=r"rows of single tokens.*merge it"):
        export_gguf(open_base(str(tiny_base)), tmp_path / "gguf", [adapter])
    assert describe(adapter).rows == {TABLES[0]: 2, TABLES[1]: 2}
    assert "2 rows of transformer.wte.weight" in " ".join(compare(adapter, plain).notes)
    assert scan(adapter).entries[0].facts["targets"] == ["attn.c_attn", "wte[]"]


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([3, 3], "token 3 is named twice"),
        ([-1, 3], "trainable_token_indices.*greater than or equal to 0"),
        ("wte", "trainable_token_indices"),
        ({"wte": [True, 2]}, "trainable_token_indices"),
        ({"w(te)+$": [1, 2]}, "trainable_token_indices"),
        ([2**31 - 1, 3], "of the new ones transformer.wte.weight has 1 rows"),
        ({"wpe": [10**6, 3]}, "names row 1000000 of transformer.wpe.weight"),
        ({"ln_f": [1, 2]}, "does not fit this base"),
        ([3], r"has shape \(2, .*this base needs \(1, "),
        (None, "belongs to nothing"),
    ],
    ids=str,
)
def test_indices_that_make_no_sense_are_refused(
    indices: Any, message: str, make_adapter: Any, tools: Any, tiny_base: Path
) -> None:
    adapter = make_adapter(trainable_token_indices=[7, 3])
    if isinstance(indices, dict) and "wpe" in indices:
        stored = load_file(adapter / "adapter_model.safetensors")
        stored[DELTA.replace("wte", "wpe")] = stored.pop(DELTA)
        save_file(stored, adapter / "adapter_model.safetensors")
    tools.edit_config(adapter, trainable_token_indices=indices)
    with pytest.raises(UserError, match=message):
        read_layout(read_adapter(adapter), GPT2Config.from_pretrained(tiny_base))
