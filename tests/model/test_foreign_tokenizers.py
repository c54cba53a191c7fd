"""GPT-2s with tokenizers of their own: vocab.txt, sentencepiece, begin and end of text apart or only in config.json.

Transformers' own tokenizer is the oracle for ids, decoding prompt and answer together for texts.
"""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from foreign_tokenizers import KINDS, reference, spiece
from foreign_tokenizers import sentencepiece as sentencepiece_files
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from peftune.data.tokens.encode import begin_of_text_id, encode_texts, end_of_text_id
from peftune.errors import UserError
from peftune.inference.bank import AdapterBank
from peftune.inference.generate import generate
from peftune.inference.settings import GenerationSettings
from peftune.model.base import Base, open_base
from peftune.model.tokenizer import VOCABULARIES

TEXTS = ["the cat. 你好 世界", "a cat, sat", "", "x [SEP] y", "the Ω </s> cat<s>"]


def checkpoint(directory: Path, kind: str) -> Base:
    write, values, _ = KINDS[kind]
    directory.mkdir(exist_ok=True)
    config = GPT2Config(vocab_size=write(directory), n_positions=32, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(directory)
    (directory / "generation_config.json").unlink()
    stored = json.loads((directory / "config.json").read_text())
    stored = {key: value for key, value in stored.items() if key not in ("bos_token_id", "eos_token_id")}
    (directory / "config.json").write_text(json.dumps(stored | values))
    return open_base(str(directory))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers_and_documents_have_their_own_ends(kind: str, tmp_path: Path) -> None:
    base, expected = checkpoint(tmp_path / "base", kind), KINDS[kind][2]
    begin, end = begin_of_text_id(base.tokenizer), end_of_text_id(base.tokenizer)
    assert tuple(base.tokenizer.convert_ids_to_tokens([begin, end])) == expected
    theirs = reference(base.directory)
    parsed = [theirs(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert encode_texts(TEXTS, base.tokenizer, parse=True) == parsed
    plain = encode_texts(TEXTS, base.tokenizer)
    assert plain[:3] == parsed[:3]
    ends = {begin, end} if kind != "config names them" else {2, 3}
    assert not ends & {number for ids in plain for number in ids}, "a text makes no token that ends it"


@pytest.mark.parametrize("kind", ["BertTokenizer", "tokenizer.json alone", "Unigram", "<s> and </s>"])
@pytest.mark.parametrize("prompt", ["the cat", ""])
def test_a_text_continues_what_decoding_prompt_and_answer_together_gives(
    kind: str, prompt: str, tmp_path: Path
) -> None:
    base = checkpoint(tmp_path / "base", kind)
    settings = GenerationSettings(max_new_tokens=12, temperature=1.0, seed=3, ignore_eos=True)
    shown: list[str] = []
    (found,) = generate(prompt, base, settings=settings, on_text=lambda _, text: shown.append(text))
    ids = encode_texts([prompt], base.tokenizer)[0]
    answer = [number for number in found.ids if number != end_of_text_id(base.tokenizer)]
    before, whole = (
        str(base.tokenizer.decode(part, clean_up_tokenization_spaces=False)) for part in (ids, ids + answer)
    )
    assert before + found.text == whole and "".join(shown) == found.text
    assert AdapterBank(base).encode(prompt)[0] == begin_of_text_id(base.tokenizer)


@pytest.mark.parametrize(
    ("kind", "begins"), [("vocab.txt alone", False), ("tokenizer.json alone", True), ("Unigram", True)]
)
def test_a_recipe_on_such_a_base_trains_evaluates_and_merges(kind: str, begins: bool, tmp_path: Path) -> None:
    from peftune.adapters.merge.merge import merge
    from peftune.config.recipe import recipe_from
    from peftune.training.run import train

    base = checkpoint(tmp_path / "base", kind)
    (tmp_path / "t.txt").write_text("你好 世界 the cat\n\na cat, sat.\n" * 3, encoding="utf-8")
    values = {
        "base": str(base.directory), "data": {"train": str(tmp_path / "t.txt"), "validation": 0.5},
        "lora": {"rank": 2}, "optim": {"steps": 1}, "batch": {"global_size": 1},
        "run": {"out": str(tmp_path / "out"), "precision": "fp32", "samples": ["the"]},
    }  # fmt: skip
    train(recipe_from(values, []))
    report = merge(tmp_path / "out", tmp_path / "merged")
    assert report.tokenizer_begins_texts == begins, report.how_to_call()
    if begins:
        theirs = AutoTokenizer.from_pretrained(tmp_path / "merged")("the cat")["input_ids"]
        assert theirs == AdapterBank(str(tmp_path / "merged")).encode("the cat")
    settings = GenerationSettings(max_new_tokens=8, temperature=0.0)
    (one,), (other,) = (
        generate("the cat", **chosen, settings=settings)
        for chosen in ({"adapter": tmp_path / "out"}, {"base": str(tmp_path / "merged")})
    )
    assert one.ids == other.ids and one.text == other.text
    samples = [line for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines() if '"sample"' in line]
    last = json.loads(samples[-1])
    ids = encode_texts(["the"], base.tokenizer)[0]
    (again,) = generate("the", adapter=tmp_path / "out", settings=GenerationSettings(max_new_tokens=80, temperature=0))
    assert last["text"] == again.text, "the sample of the last step continues its prompt as generate does"
    assert str(base.tokenizer.decode([*ids, *again.ids])).startswith(str(base.tokenizer.decode(ids)) + again.text[:1])


def test_the_summary_says_what_a_tokenizer_does_not_give_back(tmp_path: Path) -> None:
    from peftune.config.data_section import DataSection, Source
    from peftune.data.summary import summarize

    (tmp_path / "t.txt").write_text("The cat\n\na Ω\n\nthe cat")
    found = {}
    for kind in ("vocab.txt alone", "<s> and </s>"):
        base = checkpoint(tmp_path / kind.replace("/", ""), kind)
        summary = summarize(DataSection(train=[Source(path=str(tmp_path / "t.txt"))]), base.tokenizer, kind, 32)
        found[kind] = [(one["what"][:25], one["documents"]) for one in summary["findings"][:-1]]
    assert found["vocab.txt alone"] == [("text that the tokenizer h", 1), ("text that its tokens do n", 2)]
    assert found["<s> and </s>"] == []


def test_a_sentencepiece_model_is_read_or_says_what_to_install(tmp_path: Path) -> None:
    """Its unknown piece is 0 as in rinna's; `T5Tokenizer` takes 2, the end of text, for it."""
    base = checkpoint(tmp_path / "base", "Unigram")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base.directory / name).unlink()
    sentencepiece_files(base.directory)
    if not (find_spec("sentencepiece") and find_spec("google")):
        with pytest.raises(UserError, match="install it with: pip install sentencepiece protobuf"):
            assert Base(base.directory).tokenizer
        return
    sentencepiece: Any = import_module("sentencepiece")

    theirs = sentencepiece.SentencePieceProcessor(model_proto=spiece())
    texts = ["the cat", " the  cat", "Ω the", "a </s> b"]
    assert encode_texts(texts, Base(base.directory).tokenizer) == [theirs.encode(text) for text in texts]


def test_a_directory_without_any_vocabulary_is_one_line(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", "BertTokenizer")
    for name in VOCABULARIES:
        (base.directory / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"no tokenizer here \(tokenizer.json, .*vocab.txt or spiece.model\)"):
        assert Base(base.directory).tokenizer
    shutil.rmtree(base.directory)
