"""Bank, engine and routing on a pretended GPU: devices, waits, and launches per token, budgets that may only go down.

`pretended_cuda` says what this cannot see. Graphs are recorded in software, and a replay counts as one launch.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from peftune.model.base import Base
from peftune.model.decode.batch import DecodeBatch, ModelVariant
from peftune.model.decode.build import MODULES, ModelSpec, build
from peftune.model.decode.captured_steps import VARIABLE
from peftune.model.decode.forward import DecodeGPT2
from peftune.model.decode.lora_stack import LoraStack, LoraWeights, lora_weights

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
    assert cuda.waits == {place: 8 * count for place, count in TOKEN.items()}


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
    assert cuda.waits.keys() == {
        *TOKEN, "inference/sequence.py:token_logprobs (tolist)", "inference/routing/route.py:advance (tolist)"
    }  # fmt: skip
    assert cuda.waits.total() <= steps + 9 + 2  # a prompt, then each of its text's tokens; routing


def test_log_probabilities_of_all_texts_are_read_at_once(base_directory: Path, cuda: PretendedCUDA) -> None:
    bank = AdapterBank(str(base_directory), "bf16")
    engine, outputs = Engine(bank, slots=4), list[RequestOutput]()
    for _ in range(4):
        engine.submit(Request((5, 6, 7), None, SAMPLED, logprobs=2), outputs.append)
    for _ in range(4):
        engine.step()
    cuda.forget()
    engine.step()
    cuda.assert_clean(torch.bfloat16, TOKEN | {"inference/sequence.py:token_logprobs (tolist)": 1})
    assert all(len(output.logprobs[0].top) == 2 for output in outputs[-4:])


A_BLOCK = 14
"""Launches of a block for one token of every text, by the base alone. May only go down."""
A_LORA_LAYER = 2
"""Launches besides for a layer that adapters change, however many. May only go down."""
A_TOKEN = 44
"""Launches beside the blocks, from ids to the sampled ids. May only go down."""
A_REPLAYED_TOKEN = 35
"""Launches of a token where the step is recorded, blocks and all. May only go down."""


def saved(layers: int, tokenizer: PreTrainedTokenizerFast, directory: Path) -> Path:
    none, size = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0), len(tokenizer)
    config = GPT2Config(vocab_size=size, n_positions=64, n_embd=32, n_layer=layers, n_head=4, **none)
    GPT2LMHeadModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def launches_of_a_token(
    cuda: PretendedCUDA, layers: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Counter[str]:
    bank = AdapterBank(str(saved(layers, tokenizer, tmp_path / str(layers))), "bf16")
    engine = Engine(bank, slots=2)
    for _ in range(2):
        engine.submit(Request((5, 6, 7), None, SAMPLED), lambda output: None)
    for _ in range(4):  # prompt and first token; then graphs are recorded, and compared twice
        engine.step()
    cuda.forget()
    engine.step()
    cuda.assert_clean(torch.bfloat16, TOKEN)
    assert not cuda.checks
    return Counter(cuda.launches)


def test_launches_of_a_token_stay_within_their_budget(
    cuda: PretendedCUDA, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    shallow, deep = (launches_of_a_token(cuda, layers, tokenizer, tmp_path) for layers in (2, 4))
    two_blocks = deep - shallow
    assert two_blocks.total() <= 2 * A_BLOCK, two_blocks
    assert (shallow - two_blocks).total() <= A_TOKEN, shallow - two_blocks


def test_a_recorded_token_is_launched_as_one_whatever_its_blocks(
    cuda: PretendedCUDA, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    shallow, deep = (launches_of_a_token(cuda, layers, tokenizer, tmp_path) for layers in (2, 4))
    assert shallow == deep and deep["graph"] == 1
    assert deep.total() <= A_REPLAYED_TOKEN, deep


@dataclass
class Computed:
    """A model of 2 blocks and adapters on its first layers, on the GPU, with 4 slots."""

    cuda: PretendedCUDA
    spec: ModelSpec
    model: DecodeGPT2

    def launches(self, adapted: Sequence[Sequence[str]], prefill: bool = False) -> Counter[str]:
        """Of a step of the texts of these adapters, each named by the layers that it changes, or of their prompts.

        Of prompts those that are read without a cache, as where they are routed, must be no more.
        """
        batch, count = DecodeBatch(4, self.spec.kv_cache(4)), len(adapted)
        variants = [ModelVariant(self.model, self.adapter(names) if names else None) for names in adapted]
        ids = torch.zeros(count, 16, dtype=torch.int64, device="cuda")
        for start in (0, 16, 32):
            self.cuda.forget()
            batch.prefill(variants, range(count), ids, start)
        for _ in range(0 if prefill else 3):
            self.cuda.forget()
            batch.decode(variants, range(count), [1] * count, [48] * count)
        self.cuda.assert_clean(torch.bfloat16, {})
        launches = Counter(self.cuda.launches)
        if prefill:
            routed = DecodeBatch(4)
            for _ in range(2):
                self.cuda.forget()
                routed.prefill(variants, range(count), ids, 0)
            assert self.cuda.launches.total() <= launches.total(), self.cuda.launches
        return launches

    def adapter(self, names: Sequence[str]) -> LoraWeights:
        widths = {"attn.c_attn": (32, 96), "attn.c_proj": (32, 32), "mlp.c_fc": (32, 128), "mlp.c_proj": (128, 32)}
        return lora_weights(
            {
                (block, name): (torch.ones(4, widths[name][0]).cuda(), torch.ones(widths[name][1], 4).cuda(), 0.5)
                for block in range(2)
                for name in names
            },
            self.spec.activations,
        )


@pytest.fixture
def computed(
    cuda: PretendedCUDA, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Computed:
    monkeypatch.setenv(VARIABLE, "0")
    base = Base(saved(2, tokenizer, tmp_path))
    spec = ModelSpec(base.config, torch.bfloat16, torch.device("cuda"))
    return Computed(cuda, spec, build(spec, base.weights.tensor, base.weights.tied))


def test_adapters_add_two_launches_a_layer_however_many_and_however_mixed(computed: Computed) -> None:
    base, two, four = computed.launches([()] * 3), ("attn.c_attn", "mlp.c_fc"), MODULES
    one = computed.launches([two] * 3)
    assert (one - base).total() <= 2 * 2 * A_LORA_LAYER, one - base
    for mixed in ([two, (), four], [four, four, two], [four, ("mlp.c_fc",), two, ()]):
        more = computed.launches(mixed) - base
        assert more.total() <= 2 * 4 * A_LORA_LAYER, more


@pytest.mark.parametrize(
    "adapted", [[()] * 3, [MODULES] * 3, [MODULES, (), ("mlp.c_fc",)]], ids=["base", "one", "mixed"]
)
def test_python_does_little_for_a_recorded_step_whatever_its_blocks_and_adapters(
    adapted: list[Sequence[str]], computed: Computed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the views of each A and B, which cost the host as much as launches."""
    monkeypatch.setenv(VARIABLE, "1")
    assert computed.launches(adapted) == {"copy_": 1, "graph": 1, "index_select": 1}
    assert computed.cuda.operations <= 10


@pytest.mark.parametrize("adapted", [[()], [MODULES], [MODULES, ("attn.c_attn",)]], ids=["base", "one", "mixed"])
def test_prompts_of_many_texts_take_as_many_launches_as_those_of_few(
    computed: Computed, adapted: list[Sequence[str]]
) -> None:
    assert computed.launches(adapted * 2, prefill=True) == computed.launches(
        adapted * (4 // len(adapted)), prefill=True
    )


def test_a_text_comes_and_goes_in_few_launches_whatever_its_blocks_and_adapters(computed: Computed) -> None:
    cuda, cache, found = computed.cuda, computed.spec.kv_cache(4), []
    for names in (MODULES[:1], MODULES):
        stack, adapter = LoraStack(4), computed.adapter(names)
        stack.load([0], [adapter])
        cuda.forget()
        stack.load([1], [adapter])
        cache.move(2, 1, 5)
        cache.free(1, 5)
        found.append(cuda.launches.total())
    assert found == [5, 5], cuda.launches


@pytest.mark.parametrize("recorded", ["0", "1"])
def test_a_wait_in_a_step_is_found(
    recorded: str, computed: Computed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Launched kernel by kernel it breaks the budget; recorded, CUDA refuses it, and a line says so."""
    monkeypatch.setenv(VARIABLE, recorded)
    activated = computed.model.activation
    computed.model = replace(computed.model, activation=lambda x: activated(x) * float(x.sum() < 1e9))
    with pytest.raises(AssertionError, match=r"forward\.py:__call__|test_decoding\.py:<lambda>"):
        computed.launches([()])
    assert [line for line in caplog.messages if "CUDA graphs are off: " in line] == caplog.messages[: int(recorded)]
    assert len(caplog.messages) == int(recorded)


@pytest.mark.parametrize("recorded", ["0", "1"])
def test_texts_are_those_of_a_cpu_where_both_compute_in_float32(
    recorded: str, base_directory: Path, adapters: dict[str, Path], cuda: PretendedCUDA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixed adapters, one with weights of its own, more texts than slots: rows come, end and move."""
    monkeypatch.setenv(VARIABLE, recorded)
    names, texts, logits = ("attention", "wide", "dora"), [], []
    for device in ("cpu", "cuda"):
        bank = AdapterBank(str(base_directory), "fp32", device)
        for name in names:
            bank.add(name, adapters[name])
        prompts = [" ".join(["the cat sat on the mat"] * (1 + n % 3))[: 7 * n + 3] for n in range(7)]
        settings = GenerationSettings(max_new_tokens=16, temperature=0)
        texts.append(bank.generate(prompts, settings, [(*names, None)[n % 4] for n in range(7)], slots=3))
        logits.append(bank.logits(torch.arange(20).view(4, 5), [*names, None]).cpu())
    assert not cuda.faults and texts[0] == texts[1]
    torch.testing.assert_close(logits[0], logits[1])
    assert (cuda.launches["graph"] > 20) == (recorded == "1")


def test_after_an_error_graphs_are_recorded_anew_for_the_new_cache(
    base_directory: Path, cuda: PretendedCUDA, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, run, logits = AdapterBank(str(base_directory), "bf16"), Engine._run, DecodeGPT2.logits
    engine, first, second = Engine(bank, slots=2), list[RequestOutput](), list[RequestOutput]()
    recorded = engine._batch._batch._step
    assert recorded is not None

    def once(model: DecodeGPT2, hidden: torch.Tensor) -> torch.Tensor:
        if len(first) < 4:
            return logits(model, hidden)
        monkeypatch.setattr(DecodeGPT2, "logits", logits)
        raise RuntimeError("planted")

    def on_gpu(engine: Engine) -> None:
        with cuda:
            run(engine)

    monkeypatch.setattr(DecodeGPT2, "logits", once)
    monkeypatch.setattr(Engine, "_run", on_gpu)
    engine.submit(Request((5, 6, 7), None, SAMPLED), first.append)
    engine.start()
    try:
        until = time.monotonic() + 100
        while not (first and first[-1].finish_reason) and time.monotonic() < until:
            time.sleep(0.01)
        engine.submit(Request((5, 6, 7), None, SAMPLED), second.append)
    finally:
        engine.stop(drain_seconds=100)
    assert cuda.waits["inference/running_batch.py:check_device (_local_scalar_dense)"] == 1  # it computes
    anew = engine._batch._batch._step
    assert first[-1].finish_reason == "error" and second[-1].finish_reason == "length"
    assert anew is not None and anew._steps is not recorded._steps and len(anew._steps) == 1
    assert [output.ids for output in second[:3]] == [output.ids for output in first[:3]] and not cuda.faults


def test_a_wait_for_each_row_is_found(
    cuda: PretendedCUDA, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftune.inference.running_batch.sample", partial(_row_by_row, cuda))
    with pytest.raises(AssertionError, match="waits for the GPU"):
        launches_of_a_token(cuda, 2, tokenizer, tmp_path)


def _row_by_row(cuda: PretendedCUDA, rows: Any, logits: torch.Tensor, end: int) -> torch.Tensor:
    return torch.tensor([int(row.argmax()) for row in logits], device="cuda")
