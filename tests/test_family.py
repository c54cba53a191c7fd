"""Every kind of GPT-2 of the table works from loading to serving as Transformers and PEFT compute it, or is refused."""

from __future__ import annotations

import copy
import json
import logging
import random
import runpy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import foreign_tokenizers
import pytest
import torch
from family import FAMILY, Member
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from peftune.adapters.fold import MergedTensors
from peftune.adapters.merge.merge import merge
from peftune.config.recipe import recipe_from
from peftune.errors import CheckFailed, UserError
from peftune.inference.bank import AdapterBank
from peftune.inference.engine import Engine
from peftune.inference.generate import generate
from peftune.inference.perplexity import evaluate
from peftune.inference.request import Request
from peftune.inference.settings import GenerationSettings
from peftune.model.base import Base
from peftune.model.lora import quiet_peft
from peftune.training.metrics import read_metrics
from peftune.training.run import train

TEXTS = ["the cat sat on the mat and the dog sat on the log", "naïve café, 東京", "a dog"]
PROMPTS = ["the cat sat", "café"]
ENDS = {kind: ("<s>", "</s>") for kind in ("korean", "sentencepiece", "unigram", "russian")} | {
    "bert": ("[CLS]", "[SEP]")
}
GREEDY = GenerationSettings(max_new_tokens=6, temperature=0.0, ignore_eos=True)
WORKS, REFUSED = ([m for m in FAMILY if bool(m.refused) == wanted] for wanted in (False, True))


def save_shards(tensors: dict[str, torch.Tensor], directory: Path, stem: str, suffix: str) -> None:
    index = {}
    for number in range(2):
        file = f"{stem}-{number + 1:05d}-of-00002.{suffix}"
        part = {name: tensors[name] for name in sorted(tensors)[number::2]}
        torch.save(part, directory / file) if suffix == "bin" else save_file(part, directory / file)
        index.update(dict.fromkeys(part, file))
    content = {"metadata": {"total_size": 0}, "weight_map": index}
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(content))


def store(tensors: dict[str, torch.Tensor], directory: Path, files: str) -> None:
    """Write weights as this kind of upload has them."""
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    if files == "dialogpt":
        masks = {"h.0.attn.bias": torch.ones(1, 1, 64, 64).tril().bool(), "h.0.attn.masked_bias": torch.tensor(-1e4)}
        named = {f"transformer.{name}": tensor for name, tensor in masks.items()} | tensors
        named["lm_head.weight"] = tensors["transformer.wte.weight"]
        torch.save(named, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif files == "bin-shards":
        save_shards(tensors, directory, "pytorch_model", "bin")
    elif files == "shards":
        save_shards(tensors, directory, "model", "safetensors")
    elif files == "tf":
        (directory / "tf_model.h5").write_bytes(b"\x89HDF")
    else:
        written = bare | {"h.0.attn.bias": torch.ones(1, 1, 64, 64).tril()} if files == "bare" else dict(tensors)
        if "." in files:  # one tensor more
            written[files] = torch.ones(3, 32) if files.endswith("weight") else torch.ones(300)
        save_file(written, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def build(tiny_base: Path, tmp_path: Path) -> Callable[[Member], tuple[Path, GPT2LMHeadModel]]:
    """Makes the checkpoint of a row, and the same model in float32 as Transformers computes it without shortcuts."""

    def make(member: Member) -> tuple[Path, GPT2LMHeadModel]:
        torch.manual_seed(0)
        sizes = {"vocab_size": 300, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
        end = {"bos_token_id": 299, "eos_token_id": 299, "attn_implementation": "eager"}
        base = tmp_path / "base"
        if member.tokenizer in vars(foreign_tokenizers):
            base.mkdir()
            sizes["vocab_size"] = getattr(foreign_tokenizers, member.tokenizer)(base)
        else:
            shutil.copytree(tiny_base, base, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        config = GPT2Config(**{**sizes, "initializer_range": 0.3, **end, **member.config})
        model = GPT2LMHeadModel(config).eval()
        if member.files == "padded":
            model.transformer.wte.weight.data[-20:] = 0
        dtype = {"dialogpt": torch.float16, "float16": torch.float16, "bfloat16": torch.bfloat16}.get(member.files)
        model = model.to(dtype or torch.float32).float()
        tensors = {name: t.to(dtype or t.dtype).clone() for name, t in model.state_dict().items()}
        if config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        if member.tokenizer == "control":
            tokenizer = AutoTokenizer.from_pretrained(base)
            tokenizer.add_special_tokens({"additional_special_tokens": ["<|title|>"]})
            tokenizer.save_pretrained(base)
        values = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **sizes, **end, **member.config}
        del values["attn_implementation"]
        stored = dict(member.stored)
        for old, new in stored.pop("rename", {}).items():
            values[new] = values.pop(old)
        values |= stored
        if values["model_type"] is None:
            del values["model_type"]
        (base / "config.json").write_text(json.dumps(values))
        store(tensors, base, member.files)
        return base, model

    return make


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What Transformers logs."""
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    yield texts
    logging.getLogger("transformers").removeHandler(handler)


@torch.no_grad()
def nats_per_token(model: Any, windows: list[list[int]]) -> float:
    """Mean over all tokens but the first of each window, from plain logits."""
    total = 0.0
    for ids in windows:
        scores = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].double(), dim=-1)
        total -= scores.gather(1, torch.tensor(ids[1:])[:, None]).sum().item()
    return total / sum(len(ids) - 1 for ids in windows)


@torch.no_grad()
def greedy(model: Any, ids: list[int], known: int) -> list[int]:
    """The likeliest tokens that the tokenizer knows, one after the other, every time from the beginning."""
    written = list(ids)
    for _ in range(GREEDY.max_new_tokens):
        written.append(int(model(torch.tensor([written])).logits[0, -1, :known].argmax()))
    return written[len(ids) :]


def served(base: Path, adapter: Path, prompts: list[list[int]]) -> list[list[int]]:
    bank = AdapterBank(str(base), device="cpu")
    bank.add("one", adapter)
    engine, outputs = Engine(bank), [list[int]() for _ in prompts]
    for ids, written in zip(prompts, outputs, strict=True):
        engine.submit(Request(tuple(ids), "one", GREEDY), lambda output, to=written: to.extend(output.ids))
    while engine.step():
        pass
    return outputs


def check_that_an_error_is_found(adapter: Path, base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The merge is refused where one of its tensors is off by a thousandth of its norm."""
    right = MergedTensors.chunks
    names = [name for name, t in load_file(folder / "merged" / "model.safetensors").items() if t.count_nonzero()]
    planted = random.Random(base.as_posix()).choice(sorted(names))

    def wrong(self: MergedTensors, name: str, *rest: Any, **named: Any) -> Iterator[torch.Tensor]:
        for chunk in right(self, name, *rest, **named):
            noise = torch.randn(chunk.shape, generator=torch.Generator().manual_seed(0))
            yield chunk + 1e-3 * chunk.norm() * noise / noise.norm() if name == planted else chunk

    with monkeypatch.context() as patched, pytest.raises(CheckFailed, match=r"differs from base \+ adapter by"):
        patched.setattr(MergedTensors, "chunks", wrong)
        merge(adapter, folder / "wrong", str(base), texts=TEXTS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("member", WORKS, ids=lambda member: member.name)
def test_it_is_right_from_loading_to_serving(
    member: Member, build: Any, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if member.tokenizer == "sentencepiece":
        pytest.importorskip("sentencepiece")
        pytest.importorskip("google.protobuf")
    base, model = build(member)
    corpus, adapter = tmp_path / "text.jsonl", tmp_path / "adapter"
    control = member.tokenizer == "control"
    texts = [*TEXTS, "<|title|> a log"] if control else TEXTS
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    plain = copy.deepcopy(model)
    values = {
        "base": str(base), "data": {"train": str(corpus), "validation": 0}, "lora": {"rank": 4, "alpha": 8},
        "optim": {"lr": 1e-2, "schedule": "constant", "warmup": 0, "steps": 3}, "batch": {"global_size": 100},
        "run": {"out": str(adapter), "precision": "fp32", "base_dropout": 0, "eval_every": 0, "save_every": 0},
    }  # fmt: skip
    train(recipe_from(values, ["data.special_tokens=parse"] if control else []))
    tokenizer, ids_of = Base(base).tokenizer, foreign_tokenizers.oracle(base)
    begin, end = tokenizer.convert_tokens_to_ids(list(ENDS.get(member.tokenizer, ["<|endoftext|>"] * 2)))
    windows = [[begin, *ids_of(text), end] for text in texts]
    assert not control or 300 in windows[-1]
    losses = [event["loss"] for event in read_metrics(adapter / "metrics.jsonl") if event["event"] == "train"]
    assert losses[0] == pytest.approx(nats_per_token(plain, windows), rel=1e-5) and losses[-1] < losses[0]

    with quiet_peft():
        reference = PeftModel.from_pretrained(model, adapter).eval()
    rows = evaluate(str(base), {"text": corpus}, {"one": adapter}, block_size=min(64, model.config.n_positions))["rows"]
    assert rows["one"]["text"]["loss"] == pytest.approx(nats_per_token(reference, windows), rel=1e-5)

    report = merge(adapter, tmp_path / "merged", str(base), texts=TEXTS)
    check_that_an_error_is_found(adapter, base, tmp_path, monkeypatch)
    ids = torch.tensor(windows[:1])
    merged, info = GPT2LMHeadModel.from_pretrained(
        tmp_path / "merged", attn_implementation="eager", output_loading_info=True
    )
    with torch.no_grad():
        wanted = reference(ids).logits
        assert (merged.eval()(ids).logits - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    extra = {member.files} if "." in member.files else set()
    assert set(report.left_out) == extra
    assert extra.isdisjoint(load_file(tmp_path / "merged" / "model.safetensors"))

    prompts = [[begin, *ids_of(prompt)] for prompt in PROMPTS]
    expected = [greedy(reference, ids, len(tokenizer)) for ids in prompts]
    generations = generate(PROMPTS, str(base), adapter, GREEDY)
    assert [list(one.ids) for one in generations] == expected
    for ids, one in zip(prompts, generations, strict=True):
        before, whole = (
            str(tokenizer.decode(part, clean_up_tokenization_spaces=False))
            for part in (ids[1:], [*ids[1:], *(i for i in one.ids if i != end)])
        )
        assert before + one.text == whole
    assert served(base, adapter, prompts) == expected
    assert not [text for text in said if "LOAD REPORT" in text]


@pytest.mark.parametrize("member", REFUSED, ids=lambda member: member.name)
def test_it_is_refused_with_the_true_reason(member: Member, build: Any) -> None:
    base, _ = build(member)
    with pytest.raises(UserError, match=member.refused) as caught:
        assert Base(base).weights
    assert "\n" not in str(caught.value)


def test_the_page_is_what_the_table_says() -> None:
    builder = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "build_models_page.py"))
    assert builder["PAGE"].read_text(encoding="utf-8") == builder["page"](FAMILY), (
        "run python docs/build_models_page.py"
    )
