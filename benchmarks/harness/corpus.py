"""What contestants work on: documents cut from real text, bases and adapters of random weights.

A document is text whose tokens were counted after it was cut, so that whoever tokenises it again finds as many.
peftune adds `<|endoftext|>` at both ends and scores all but the first; the peers add one at the end. A document of n
tokens is therefore n + 1 real tokens to everyone.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
from bisect import bisect
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from benchmarks.harness.shapes import POSITIONS, Shape
from peftune.config.data_section import Source
from peftune.data.sources.read import read_documents
from peftune.model.base import BUILTIN

CORPORA = ("builtin:docs/train", "builtin:code/train")
SPREAD = 0.75
"""Standard deviation of the logarithm of lengths, before they are cut at the longest."""


def write_documents(
    out: Path, tokenizer: Any, count: int, mean: float, longest: int, data: str = "", seed: int = 0, prompted: float = 0
) -> list[int]:
    """Write `count` documents as JSON lines; returns real tokens of each (at most `longest` - 1).

    Lengths are log-normal with this mean, cut at `longest`, the tokens of a block that the document takes with both its
    `<|endoftext|>`. Where the mean is not below the longest, all are exactly that long. Text repeats only when the
    source is used up. `prompted` is the share of a document's tokens that become a prompt, unsupervised.
    """
    chance = random.Random(seed)
    texts = corpus_texts(data)
    text, at, lengths = "\n\n".join(chance.sample(texts, len(texts))), 0, list[int]()
    wanted = _lengths(count, mean, longest, chance)
    with open(out, "w", encoding="utf-8") as file:
        while len(lengths) < count:
            tokens = wanted[len(lengths)] - 2
            ahead = text[at : at + 8 * tokens + 64]
            offsets = tokenizer(ahead, return_offsets_mapping=True, verbose=False)["offset_mapping"]
            if len(offsets) <= tokens:  # the end of the text, or tokens of unusual length
                text, at = (text, at + len(ahead)) if at + len(ahead) < len(text) else (text + text, 0)
                continue
            first, end = round(prompted * tokens), offsets[tokens - 1][1]
            split, at = offsets[first][0], at + end
            row = {"prompt": ahead[:split], "completion": ahead[split:end]} if first else {"text": ahead[:end]}
            sizes = [len(ids) for ids in tokenizer(list(row.values()), verbose=False)["input_ids"]]
            if sizes in ([tokens], [first, tokens - first]) and all(part.strip() for part in row.values()):
                file.write(json.dumps(row) + "\n")  # else cutting moved the border of a token
                lengths.append(tokens + 1)
    return lengths


def _lengths(count: int, mean: float, longest: int, chance: random.Random) -> list[int]:
    """Tokens of each document in a block, at least four: scaled until their mean, after the cut, is the wanted one."""
    drawn = [chance.lognormvariate(0, SPREAD) for _ in range(count)]

    def scaled(median: int) -> list[int]:
        return [max(4, round(min(longest, median * factor))) for factor in drawn]

    if mean >= longest:
        return [longest] * count
    return scaled(bisect(range(100 * longest), mean, key=lambda median: fmean(scaled(median))))


def supervised_share(longest: int, prompted: float) -> float:
    """Of the real tokens of a document of this length, those that are supervised."""
    return 1 - round(prompted * (longest - 2)) / (longest - 1)


def statistics_of(lengths: list[int], path: Path) -> dict[str, Any]:
    """What a reader needs to know of these documents; the hash says whether two runs had the same."""
    batches = (lengths[i : i + 8] for i in range(0, len(lengths), 8))
    padded = sum(max(batch) * len(batch) for batch in batches)
    return {
        "documents": len(lengths), "real_tokens": sum(lengths), "mean": round(fmean(lengths), 1),
        "longest": max(lengths), "padded_in_batches_of_8": round(1 - sum(lengths) / padded, 3),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:12],
    }  # fmt: skip


def write_corpus(path: Path, megabytes: float, characters: int = 0, data: str = "") -> int:
    """Write JSON lines until their text is this large, repeating the corpus if need be; the number of documents.

    Documents are those of the corpus, or of so many characters each. Each ends with its number, so that no two are
    alike and no tokenizer's cache of whole texts helps anyone.
    """
    texts, written, documents = corpus_texts(data), 0, 0
    if characters:
        text = "\n".join(texts)
        texts = [text[start : start + characters] for start in range(0, len(text) - characters, characters)]
    with open(path, "w", encoding="utf-8") as file:
        for documents, text in enumerate(cycle(texts), 1):
            line = f"{text}\n{documents}"
            file.write(json.dumps({"text": line}) + "\n")
            written += len(line.encode())
            if written >= megabytes * 1e6:
                break
    return documents


def corpus_texts(data: str = "") -> list[str]:
    """All documents of a file, or of the built-in corpora."""
    sources = (data,) if data else CORPORA
    return [document.text for name in sources for document in read_documents(Source(path=name), "auto")]


def base_of_shape(root: Path, shape: Shape, tokenizer: str, seed: int) -> Path:
    """A checkpoint of random weights (float32) with this tokenizer, made unless it is there."""
    source = BUILTIN.get(tokenizer, Path(tokenizer))
    directory = root / f"base-{shape.layers}-{shape.width}-{shape.heads}-{shape.vocabulary}-{source.name}-{seed}"
    if (directory / "tokenizer.json").is_file():  # written last
        return directory
    loaded = AutoTokenizer.from_pretrained(source)
    if len(loaded) > shape.vocabulary:
        raise SystemExit(f"the tokenizer has {len(loaded):,} tokens, the shape only {shape.vocabulary:,} rows")
    print(f"making a base: {shape}", file=sys.stderr)
    torch.manual_seed(seed)
    loaded.model_max_length = POSITIONS
    GPT2LMHeadModel(shape.config(loaded.eos_token_id)).save_pretrained(directory)
    loaded.save_pretrained(directory)
    return directory


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
