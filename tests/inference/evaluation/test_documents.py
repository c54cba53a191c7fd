"""Losses of single documents, and windows that are known by heart, against plain loops and real greedy decoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from peftune.cli import main
from peftune.config.data_section import Source
from peftune.data.tokens.store import TokenStore, prepare
from peftune.errors import UserError
from peftune.inference.evaluation.documents import loss_intervals, nats_by_document
from peftune.inference.evaluation.memorisation import Window, share_reproduced, windows_of
from peftune.inference.perplexity import read_blocks
from peftune.model.base import Base
from peftune.model.loss import LossModel

TEXTS = ["the cat sat on the mat", "a dog", "the cat and the dog and the cat sat on the log " * 12, "x", "naïve 東京"]
CPU = torch.device("cpu")


def rows(path: Path, values: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def store_of(path: Path, base: Path) -> TokenStore:
    opened = Base(base)
    return prepare([Source(path=str(path))], opened.tokenizer, opened.tokenizer_fingerprint, " ", "auto")


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_each_document_s_loss_is_that_of_a_plain_loop(tiny_base: Path, tmp_path: Path, batch: int) -> None:
    blocks = read_blocks(Base(tiny_base), rows(tmp_path / "t.jsonl", [{"text": text} for text in TEXTS]), 16)
    assert len(blocks) < len(TEXTS) * 4  # some are packed together, one is cut
    model = GPT2LMHeadModel.from_pretrained(tiny_base).eval()
    found = nats_by_document(LossModel(model), blocks, batch, CPU)
    for text, (nats, tokens) in zip(TEXTS, found, strict=True):
        end, ids = model.config.eos_token_id, Base(tiny_base).tokenizer.encode(text)
        wanted, ids = 0.0, [end, *ids, end]
        for start in range(0, len(ids) - 1, 15):
            window = torch.tensor([ids[start : start + 16]])
            with torch.no_grad():
                wanted -= float(model(window).logits[0, :-1].log_softmax(-1).gather(1, window[0, 1:, None]).sum())
        assert tokens == len(ids) - 1
        np.testing.assert_allclose(nats, wanted, rtol=1e-5)


def test_a_single_document_has_no_interval_and_unscored_ones_do_not_count() -> None:
    one = {"base": {"d": np.array([[30.0, 10.0], [0.0, 0.0]])}, "a": {"d": np.array([[20.0, 10.0], [0.0, 0.0]])}}
    found = loss_intervals(one)
    assert found["base"]["d"] == {"perplexity": None}
    assert found["a"]["d"]["against_base"] == {"loss": -1.0, "interval": None}


def test_a_window_is_known_by_heart_where_greedy_decoding_writes_it(model: GPT2LMHeadModel) -> None:
    window, random = Window(prompt=5, continued=7), torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 250, (12, 5), generator=random)
    known = model.generate(  # type: ignore[operator]
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=7, min_new_tokens=7, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    for changed in range(5, 10):  # of windows 0 … 4 one token is another, each time at another place
        known[changed - 5, changed] = (known[changed - 5, changed] + 1) % 250
    known[5, 11] = (known[5, 11] + 1) % 250
    found = share_reproduced(LossModel(model), known, window, 5, CPU)
    assert (found["windows"], found["reproduced"], found["share"]) == (12, 6, 0.5)
    assert found["interval"][0] < 0.5 < found["interval"][1]


def test_windows_hold_what_was_learnt_one_a_document_and_always_the_same(tiny_base: Path, tmp_path: Path) -> None:
    long = [f"{number} cats sat on the mat and {number} dogs on the log and so on" for number in range(30)]
    learnt = [{"prompt": f"say {number}", "completion": text} for number, text in enumerate(long)]
    store = store_of(rows(tmp_path / "t.jsonl", [*learnt, {"prompt": "a", "completion": "b"}]), tiny_base)
    window = Window(prompt=4, continued=6)
    found = windows_of(store, "t", window, 64)
    assert found.shape == (30, 10) and (windows_of(store, "t", window, 64) == found).all()
    assert windows_of(store, "t", Window(4, 6, most=7), 64).shape == (7, 10)
    documents = [store.window(i, 0, int(store.lengths[i])) for i in range(len(store))]
    for row in found.numpy():
        places = [
            scored[at + 4 : at + 10].all()
            for ids, scored in documents
            for at in range(len(ids) - 9)
            if (ids[at : at + 10] == row).all()
        ]
        assert any(places)
    with pytest.raises(UserError, match="no document has 40 scored tokens after 20 others; take fewer"):
        windows_of(store, "t", Window(20, 40), 64)
    with pytest.raises(UserError, match=r"windows of 40 \+ 32 tokens, the base has 64 positions; take fewer"):
        windows_of(store, "t", Window(40, 32), 64)


def test_eval_tells_intervals_and_what_is_known_by_heart(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rows(tmp_path / "t.jsonl", [{"text": text} for text in TEXTS])
    call = ["eval", "--base", str(tiny_base), "--data", str(path), "--trained-on", f"mine={path}"]
    call += ["--prompt-tokens", "8", "--continued-tokens", "4", "--json", str(tmp_path / "f.json")]
    assert main.run(call) == 0
    found = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    low, high = found["intervals"]["base"]["t"]["perplexity"]
    assert low < found["rows"]["base"]["t"]["perplexity"] < high
    assert found["memorised"]["base"]["mine"]["windows"] == 1
    assert found["window"] == {"prompt": 8, "continued": 4, "most": 1000}
    shown = capsys.readouterr().out
    assert f"[{low:,.2f}, {high:,.2f}]" in shown and "4 tokens reproduced after 8 of training text" in " ".join(
        shown.split()
    )
