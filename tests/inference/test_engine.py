"""Continuous batching: who joins, who leaves, who waits, and that nobody's text depends on it."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from peftune.errors import UserError
from peftune.inference.bank import AdapterBank
from peftune.inference.engine import Busy, Engine
from peftune.inference.fair_queue import FairQueue
from peftune.inference.request import Request, RequestOutput
from peftune.inference.settings import GenerationSettings

SETTINGS = GenerationSettings(max_new_tokens=10, temperature=1.0, seed=5)


def ask(bank: AdapterBank, prompt: str, adapter: str | None = None, **changes: object) -> Request:
    return Request(tuple(bank.encode(prompt)), adapter, replace(SETTINGS, **changes))  # type: ignore[arg-type]


def finish(engine: Engine) -> None:
    while engine.step():
        pass


def alone(bank: AdapterBank, request: Request) -> list[RequestOutput]:
    engine, outputs = Engine(bank, slots=1), list[RequestOutput]()
    engine.submit(request, outputs.append)
    finish(engine)
    return outputs


def test_a_text_does_not_depend_on_what_comes_and_goes_beside_it(bank: AdapterBank) -> None:
    """200 requests of all kinds, joining at random boundaries: every one gets what it gets alone, to the token."""
    chance = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "東京", "😀", "log", "café"]
    requests = [
        ask(
            bank,
            " ".join(chance.choices(words, k=chance.randrange(0, 9))),
            chance.choice([*bank.names, None]),
            max_new_tokens=chance.randrange(1, 20),
            seed=chance.randrange(1000),
            temperature=chance.choice([0.0, 0.7, 1.2]),
            top_k=chance.choice([0, 5]),
            top_p=chance.choice([1.0, 0.9]),
            repetition_penalty=chance.choice([1.0, 1.4]),
            stop=chance.choice([(), ("a",), ("th", "on")]),
        )
        for _ in range(200)
    ]
    engine, got = Engine(bank, slots=7), [list[RequestOutput]() for _ in requests]
    for request, outputs in zip(requests, got, strict=True):
        engine.submit(request, outputs.append)
        for _ in range(chance.randrange(3)):
            engine.step()
    finish(engine)
    for request, outputs in zip(requests, got, strict=True):
        assert outputs == alone(bank, request)
    assert engine.load.running == engine.load.waiting == 0
    assert engine.load.tokens_written >= sum(len(output.ids) for outputs in got for output in outputs)


def test_a_prompt_longer_than_a_chunk_is_prefilled_in_chunks_while_others_decode(bank: AdapterBank) -> None:
    long, short = ask(bank, "the cat sat on the mat " * 8, "wide", max_new_tokens=5), ask(bank, "a", "attention")
    complete = alone(bank, long)
    assert len(long.ids) > 40
    engine, first, second = Engine(bank, slots=2), list[RequestOutput](), list[RequestOutput]()
    engine._chunk = 16
    engine.submit(short, second.append)
    engine.step()
    engine.submit(long, first.append)
    engine.step()
    assert (len(first), len(second)) == (0, 2)  # the other text went on
    finish(engine)
    assert [u.ids for u in first] == [u.ids for u in complete]
    assert second == alone(bank, short)


def test_log_probabilities_are_those_of_the_logits(bank: AdapterBank) -> None:
    request = replace(
        ask(bank, "the cat sat", "rslora", temperature=0.0, repetition_penalty=1.5), logprobs=3, echo=True
    )
    outputs = alone(bank, request)
    prompt, written = outputs[0].prompt, [u.logprobs[0] for u in outputs if u.logprobs]
    ids = [*request.ids, *(entry.id for entry in written)]
    nats = bank.logits(torch.tensor([ids]), "rslora")[0].log_softmax(-1)
    assert [entry.id for entry in prompt] == list(request.ids)
    assert prompt[0].logprob is None
    for position, entry in enumerate([*prompt, *written][1:]):
        assert entry.logprob == pytest.approx(
            float(nats[position, entry.id]), abs=1e-5
        )  # another kernel: fp32 rounding
        best, order = nats[position].topk(3)
        assert [i for i, _ in entry.top] == order.tolist()
        assert [n for _, n in entry.top] == pytest.approx(best.tolist(), abs=1e-5)


def test_a_prompt_can_be_scored_without_writing(bank: AdapterBank) -> None:
    request = replace(ask(bank, "the cat sat on"), logprobs=0, echo=True, only_score=True)
    (output,) = alone(bank, request)
    assert (output.ids, output.finish_reason, len(output.prompt)) == ((), "length", len(request.ids))


def test_cancelling_frees_the_slot_at_the_next_boundary(bank: AdapterBank) -> None:
    engine, first, second, third = (
        Engine(bank, slots=1),
        list[RequestOutput](),
        list[RequestOutput](),
        list[RequestOutput](),
    )
    first_handle = engine.submit(ask(bank, "the"), first.append)
    waiting = engine.submit(ask(bank, "a"), second.append)
    last = ask(bank, "on")
    engine.submit(last, third.append)
    engine.step()
    assert (engine.load.running, engine.load.waiting) == (1, 2)
    first_handle.cancel()
    waiting.cancel()
    engine.step()
    assert (engine.load.running, engine.load.waiting) == (1, 0)
    assert first[-1].finish_reason == second[-1].finish_reason == "cancelled"
    finish(engine)
    assert third == alone(bank, last)


def test_adapters_take_turns_and_equals_wait_in_line() -> None:
    queue = FairQueue[str]()
    for item in ("a1", "a2", "a3", "b1", "c1", "b2"):
        queue.push(item[0], item)
    assert [queue.pop() for _ in range(len(queue))] == ["a1", "b1", "c1", "a2", "b2", "a3"]
    with pytest.raises(IndexError):
        queue.pop()


def test_a_full_queue_is_busy_and_says_for_how_long(bank: AdapterBank) -> None:
    engine = Engine(bank, slots=1, queue=2)
    for _ in range(2):
        engine.submit(ask(bank, "the"), lambda output: None)
    with pytest.raises(Busy) as busy:
        engine.submit(ask(bank, "the"), lambda output: None)
    assert busy.value.retry_after >= 1
    engine.step()  # one has a slot now
    engine.submit(ask(bank, "the"), lambda output: None)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"ids": ()}, "token ids must lie in"),
        ({"ids": (0, 10**6)}, "token ids must lie in"),
        ({"ids": (-1,)}, "token ids must lie in"),
        ({"ids": tuple(range(60))}, "60 tokens of the prompt and 10 to write exceed the model's 64 positions"),
        ({"adapter": "nobody"}, "no adapter is called 'nobody'"),
        ({"settings": GenerationSettings(beams=2)}, "beam"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused(
    bank: AdapterBank, change: dict[str, object], problem: str
) -> None:
    engine = Engine(bank)
    with pytest.raises(UserError, match=problem):
        engine.submit(replace(ask(bank, "the"), **change), lambda output: None)  # type: ignore[arg-type]
    assert engine.load.waiting == 0


def test_a_text_may_fill_the_last_position(bank: AdapterBank) -> None:
    request = Request(tuple(range(54)), None, replace(SETTINGS, temperature=0.0))
    written = [i for output in alone(bank, request) for i in output.ids]
    ids = list(request.ids)
    for _ in written:
        ids.append(int(bank.logits(torch.tensor([ids]))[0, -1, : len(bank.tokenizer)].argmax()))
    assert written == ids[54:]


def test_an_adapter_that_is_removed_goes_on_for_those_who_have_it(
    base_directory: Path, adapters: dict[str, Path], bank: AdapterBank
) -> None:
    own = AdapterBank(str(base_directory), device="cpu")
    own.add("wide", adapters["wide"])
    engine, outputs = Engine(own), list[RequestOutput]()
    request = ask(own, "the", "wide")
    engine.submit(request, outputs.append)
    engine.step()
    own.remove("wide")
    own.add("wide", adapters["attention"])
    finish(engine)
    assert outputs == alone(bank, request)


def test_an_engine_of_its_own_thread_answers_routes_drains_and_stops(bank: AdapterBank) -> None:
    engine, outputs, ended = Engine(bank, slots=2), list[RequestOutput](), threading.Event()
    request = ask(bank, "the cat", "wide")

    def listen(output: RequestOutput) -> None:
        outputs.append(output)
        if output.finish_reason:
            ended.set()

    engine.start()
    engine.submit(request, listen)
    route = engine.route(request.ids).result(timeout=30)
    assert set(route.scores) == set(bank.names)
    with pytest.raises(UserError, match="nobody"):
        engine.route(request.ids, ("nobody",)).result(timeout=30)  # raised where it was asked, and nowhere else
    engine.stop(drain_seconds=30)
    assert ended.is_set()
    assert outputs == alone(bank, request)
    with pytest.raises(Busy):
        engine.submit(request, listen)
    with pytest.raises(Busy):
        engine.route(request.ids)


def test_what_is_left_after_the_drain_is_cancelled(bank: AdapterBank) -> None:
    engine, reasons = Engine(bank, slots=1), list[str]()
    request = ask(bank, "the", stop=(), max_new_tokens=50, temperature=0.0)

    def listen(output: RequestOutput) -> None:
        if output.finish_reason:
            reasons.append(output.finish_reason)

    engine.start()
    for _ in range(40):
        engine.submit(request, listen)
    engine.stop(drain_seconds=0)
    assert len(reasons) == 40
    assert reasons.count("cancelled") >= 30


def test_logits_that_are_not_finite_end_the_text_with_an_error(
    base_directory: Path, adapters: dict[str, Path], bank: AdapterBank
) -> None:
    own = AdapterBank(str(base_directory), device="cpu")
    broken = own.add("broken", adapters["attention"])
    lora = broken.variant.lora
    assert lora is not None
    next(iter(lora.factors.values()))[1].fill_(torch.inf)
    engine, bad, good = Engine(own), list[RequestOutput](), list[RequestOutput]()
    request = ask(own, "the")
    engine.submit(replace(request, adapter="broken"), bad.append)
    engine.submit(request, good.append)
    finish(engine)
    assert bad[-1].finish_reason == "error"
    assert "not finite" in bad[-1].error
    assert good == alone(bank, request)
