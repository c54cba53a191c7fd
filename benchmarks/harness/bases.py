"""Bases and adapters of random weights."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from benchmarks.harness.shapes import POSITIONS, Shape
from peftune.model.base import open_base


def base_of_shape(root: Path, shape: Shape, tokenizer: str, seed: int) -> Path:
    """A checkpoint of random weights (float32) with this tokenizer, made unless it is there."""
    source = open_base(tokenizer).directory if tokenizer.startswith("builtin:") else Path(tokenizer)
    name = f"base-{shape.layers}-{shape.width}-{shape.heads}-{shape.vocabulary}-{source.name}-{seed}"
    if (root / name / "config.json").is_file():
        return root / name
    vocabulary = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    if max(vocabulary.values()) >= shape.vocabulary:
        raise SystemExit(f"the tokenizer has {len(vocabulary):,} tokens, the shape only {shape.vocabulary:,} rows")
    print(f"making a base: {shape}", file=sys.stderr)
    unfinished = root / f".{name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    torch.manual_seed(seed)
    loaded = AutoTokenizer.from_pretrained(source)
    loaded.model_max_length = POSITIONS
    config = shape.config()
    config.bos_token_id = config.eos_token_id = loaded.eos_token_id
    make_base(unfinished, config, loaded)
    return unfinished.rename(root / name)


def make_base(directory: Path, config: GPT2Config, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
    """A random checkpoint; without a tokenizer it gets one of single bytes, which fits any vocabulary."""
    GPT2LMHeadModel(config).save_pretrained(directory)
    (tokenizer or _byte_tokenizer()).save_pretrained(directory)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    symbols = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=symbols, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end, bos_token=end)


def make_adapter(directory: Path, base: Path, rank: int, targets: Sequence[str]) -> None:
    """A random adapter of a base, made anew."""
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), fan_in_fan_out=True)
    with torch.device("meta"):
        model = inject_adapter_in_model(lora, GPT2LMHeadModel(GPT2Config.from_pretrained(base)))
        shapes = get_peft_model_state_dict(model, save_embedding_layers=False)
    shutil.rmtree(directory, ignore_errors=True)
    lora.save_pretrained(directory)
    tensors = {f"base_model.model.{name}": torch.randn(tensor.shape) * 0.01 for name, tensor in shapes.items()}
    save_file(tensors, directory / "adapter_model.safetensors")
