"""Tokenizers of GPT-2s other than OpenAI's, made small: each function writes the files and returns how many tokens."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

CHARACTERS = [*"abcdefghijklmnopqrstuvwxyz.,[]你好世界<>/|"]
WORDPIECE = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CHARACTERS, *(f"##{c}" for c in CHARACTERS), "the", "##at"]


def bert(directory: Path) -> int:
    (directory / "vocab.txt").write_text("\n".join(WORDPIECE) + "\n", encoding="utf-8")
    return len(WORDPIECE)


def korean(directory: Path) -> int:
    """tokenizer.json with cuts that are not GPT-2's, and nothing beside it."""
    tokens = ["<s>", "</s>", "<unk>", "▁", *CHARACTERS, "▁t", "at"]
    merges = [("▁", "t"), ("a", "t")]
    engine = Tokenizer(models.BPE({t: n for n, t in enumerate(tokens)}, merges, unk_token="<unk>"))
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    engine.add_special_tokens(["<s>", "</s>", "<unk>"])
    engine.save(str(directory / "tokenizer.json"))
    return len(tokens)


def unigram(directory: Path) -> int:
    """As rinna's after conversion: the unknown piece is 0, the end of text 2."""
    pieces = ["<unk>", "<s>", "</s>", "[PAD]", "▁", *CHARACTERS, "▁the", "▁cat"]
    engine = Tokenizer(models.Unigram([(p, -float(n > 2) * (3 + n / 50)) for n, p in enumerate(pieces)], unk_id=0))
    engine.normalizer = normalizers.Replace("  ", " ")
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    PreTrainedTokenizerFast(
        tokenizer_object=engine, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="[PAD]"
    ).save_pretrained(directory)
    return len(pieces)


def russian(directory: Path) -> int:
    """GPT-2's own kind, with <s> and </s>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<s>", "</s>", *letters]
    (directory / "vocab.json").write_text(json.dumps({t: n for n, t in enumerate(tokens)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<s>", "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **special}))
    return len(tokens)


def sentencepiece(directory: Path) -> int:
    """As rinna's: spiece.model alone, its unknown piece 0, which `T5Tokenizer` takes 2 for, the end of text."""
    (directory / "spiece.model").write_bytes(spiece())
    values = {"tokenizer_class": "T5Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "extra_ids": 0}
    (directory / "tokenizer_config.json").write_text(json.dumps(values))
    return 4 + len(CHARACTERS) + 2


KINDS: dict[str, tuple[Callable[[Path], int], dict[str, Any], tuple[str, str]]] = {
    "BertTokenizer": (bert, {"tokenizer_class": "BertTokenizer", "eos_token_id": 50256}, ("[CLS]", "[SEP]")),
    "vocab.txt alone": (bert, {}, ("[CLS]", "[SEP]")),
    "config names them": (bert, {"bos_token_id": 0, "eos_token_id": [4, 3]}, ("[PAD]", "[MASK]")),
    "tokenizer.json alone": (korean, {"bos_token_id": 0, "eos_token_id": 1}, ("<s>", "</s>")),
    "end of text alone": (korean, {"bos_token_id": None, "eos_token_id": 1}, ("</s>", "</s>")),
    "Unigram": (unigram, {}, ("<s>", "</s>")),
    "<s> and </s>": (russian, {}, ("<s>", "</s>")),
}


def reference(directory: Path) -> Any:
    if (directory / "vocab.txt").is_file():
        return BertTokenizer.from_pretrained(directory)
    if (directory / "vocab.json").is_file():
        return AutoTokenizer.from_pretrained(directory)
    return PreTrainedTokenizerFast.from_pretrained(directory)


def oracle(directory: Path) -> Callable[[str], list[int]]:
    """Ids of a text by the library that such a checkpoint was made with; special tokens in it are tokens."""
    if (directory / "spiece.model").is_file():
        processor: Any = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=spiece())
        return lambda text: list(processor.encode(text))
    tokenizer = reference(directory)
    return lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])


def spiece() -> bytes:
    """A sentencepiece model (protocol buffers): pieces with score and kind, and a trainer of unigrams."""

    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2, len(data)]) + data

    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    names = ["<unk>", "<s>", "</s>", "▁", *CHARACTERS, "▁the", "▁cat"]
    pieces = b"".join(
        field(1, field(1, name.encode()) + b"\x15" + struct.pack("<f", 0.0 if name in kinds else -3 - n / 50)
              + bytes([3 << 3, kinds.get(name, 1)]))
        for n, name in enumerate(names)
    )  # fmt: skip
    trainer = bytes([3 << 3, 1, 0xC0, 0x02, 0, 0xC8, 0x02, 1, 0xD0, 0x02, 2])  # unigrams; unk, bos and eos: 0, 1 and 2
    return pieces + field(2, trainer) + field(3, field(1, b"identity"))
