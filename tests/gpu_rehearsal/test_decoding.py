"""Bank, engine and routing on a pretended GPU: devices, waits, and launches per token, budgets that may only go down.

`pretended_cuda` says what this cannot see. LoRA is multiplied in float32 here, whatever the dtype of the base.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended_cuda import PretendedCUDA
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from peftune.inference.bank import AdapterBank
from peftune.inference.engine import Engine
from peftune.inference.request import Request, RequestOutput
from peftune.inference.settings import GenerationSettings

TOKEN = {"inference/running_batch.py:_choose_of (tolist)": 1}
"""Where one token of every text may wait, and how often."""
SAMPLED = GenerationSettings(max_new_tokens=8, temperature=0.8, top_p=0.9, seed=1)
SETTINGS = {
    "greedy": GenerationSettings(max_new_tokens=8, temperature=0),
    "top-p": SAMPLED,
    "top-k and min-p": GenerationSettings(max_new_tokens=8, temperature=0.8, top_k=20, min_p=0.05, seed=1),
    "penalties": GenerationSettings(
        max_new_tokens=8, temperature=0.8, seed=1, min_new_tokens=3, presence_penalty=0.5, frequency_penalty=0.1,
        no_repeat_ngram_size=2, logit_bias=((5, -1.0),), repetition_penalty=1.2,
    ),
}  # fmt: skip


def waits_of(cuda: PretendedCUDA) -> dict[str, int]:
    """How often the host waited, without what is needed once: of a text's penalties, and of each graph's check."""
    once = "penalties.py", "captured_steps.py:run"
    return {place: count for place, count in cuda.waits.items() if not any(each in place for each in once)}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_batch_waits_once_for_each_token(
    name: str, base_directory: Path, adapters: dict[str, Path], cuda: PretendedCUDA
) -> None:
    bank = AdapterBank(str(base_directory), "bf16")
    for adapter in ("attention", "wide", "dora", "head"):
        bank.add(adapter, adapters[adapter])
    cuda.forget()
    texts = bank.generate(["the cat", "", "on the log and", "dog", "mat"], SETTINGS[name], [*bank.names, None])
    assert not cuda.faults and all(text.ids for text in texts)
    assert waits_of(cuda) == {place: 8 * count for place, count in TOKEN.items()}


def test_the_engines_thread_scores_routes_and_writes(
    base_directory: Path, adapters: dict[str, Path], cuda: PretendedCUDA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the server runs it: a thread of its own, texts with different settings, log-probabilities, routing."""
    run = Engine._run

    def on_gpu(engine: Engine) -> None:
        with cuda:
            run(engine)

    bank = AdapterBank(str(base_directory), "bf16")
    for adapter in ("attention", "wide"):
        bank.add(adapter, adapters[adapter])
    monkeypatch.setattr(Engine, "_run", on_gpu)
    cuda.forget()
    engine, outputs = Engine(bank, slots=3), [list[RequestOutput]() for _ in SETTINGS]
    engine.start()
    try:
        for number, settings in enumerate(SETTINGS.values()):
            asked: Any = {"logprobs": 3, "echo": True} if number == 0 else {}
            ids = tuple(bank.encode("the cat sat on the mat", None))
            engine.submit(Request(ids, [None, "wide"][number % 2], settings, **asked), outputs[number].append)
        route = engine.route(ids).result(timeout=100)
    finally:
        engine.stop(drain_seconds=100)
    assert not cuda.faults and set(route.scores) == {"attention", "wide"}
    assert all(found[-1].finish_reason == "length" for found in outputs)
    assert len(outputs[0][0].prompt) == len(ids) and outputs[0][0].prompt[1].rank is not None
    steps = engine.load.steps
    assert waits_of(cuda).keys() == {
        *TOKEN, "inference/sequence.py:token_logprobs (tolist)", "inference/routing/route.py:advance (tolist)",
        "inference/routing/route.py:__init__ (tensor of numbers)",
    }  # fmt: skip
    assert sum(waits_of(cuda).values()) <= steps + 9 + 3  # a prompt, then each of its text's tokens; routing


A_BLOCK = 32
"""Launches of a block for one token of every text, by the base alone. May only go down."""
A_TOKEN = 44
"""Launches beside the blocks, from ids to the sampled ids. May only go down."""


def launches_of_a_token(
    cuda: PretendedCUDA, layers: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Counter[str]:
    none, size = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0), len(tokenizer)
    config = GPT2Config(vocab_size=size, n_positions=64, n_embd=32, n_layer=layers, n_head=4, **none)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / str(layers))
    tokenizer.save_pretrained(tmp_path / str(layers))
    bank = AdapterBank(str(tmp_path / str(layers)), "bf16")
    engine = Engine(bank, slots=2)
    for _ in range(2):
        engine.submit(Request((5, 6, 7), None, SAMPLED), lambda output: None)
    for _ in range(3):  # prompt, first token, and the second
        engine.step()
    cuda.forget()
    engine.step()
    cuda.assert_clean(torch.bfloat16, TOKEN)
    return Counter(cuda.launches)


def test_launches_of_a_token_stay_within_their_budget(
    cuda: PretendedCUDA, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    shallow, deep = (launches_of_a_token(cuda, layers, tokenizer, tmp_path) for layers in (2, 4))
    two_blocks = deep - shallow
    assert two_blocks.total() <= 2 * A_BLOCK, two_blocks
    assert (shallow - two_blocks).total() <= A_TOKEN, shallow - two_blocks


def test_a_wait_for_each_row_is_found(
    cuda: PretendedCUDA, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftune.inference.running_batch.sample", partial(_row_by_row, cuda))
    with pytest.raises(AssertionError, match="waits for the GPU"):
        launches_of_a_token(cuda, 2, tokenizer, tmp_path)


def _row_by_row(cuda: PretendedCUDA, rows: Any, logits: torch.Tensor, end: int) -> torch.Tensor:
    return torch.tensor([int(row.argmax()) for row in logits], device="cuda")
