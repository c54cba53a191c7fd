"""Continuous batching: who joins, who leaves, who waits, and that nobody's text depends on it."""

from __future__ import annotations

import random
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from peftune.errors import UserError
from peftune.inference.bank import AdapterBank
from peftune.inference.engine import Busy, Engine, Stopping
from peftune.inference.fair_queue import FairQueue
from peftune.inference.pace import Pace
from peftune.inference.request import Request, RequestOutput
from peftune.inference.routing.route import Routing, route
from peftune.inference.running_batch import RunningBatch
from peftune.inference.settings import GenerationSettings
from peftune.model.decode.batch import DecodeBatch

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
            min_p=chance.choice([0.0, 0.1]),
            presence_penalty=chance.choice([0.0, 1.5]),
            logit_bias=chance.choice([(), ((5, 4.0), (9, -50.0))]),
            ignore_eos=chance.choice([False, True]),
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
    found = engine.route(request.ids).result(timeout=30)
    assert set(found.scores) == set(bank.names)
    with pytest.raises(UserError, match="nobody"):
        engine.route(request.ids, ("nobody",)).result(timeout=30)  # raised where it was asked, and nowhere else
    engine.stop(drain_seconds=30)
    assert ended.is_set()
    assert outputs == alone(bank, request)
    with pytest.raises(Busy):
        engine.submit(request, listen)
    with pytest.raises(Busy):
        engine.route(request.ids)


def test_routing_in_parts_finds_the_same_to_the_bit_while_others_write(bank: AdapterBank) -> None:
    prompts = [bank.encode("the cat sat on the mat " * count) for count in (1, 4, 9)]
    whole = [route(bank, ids) for ids in prompts]
    engine, outputs = Engine(bank, slots=2), list[RequestOutput]()
    for tokens in (1, 32, 70):  # at most so many in a step, at least one forward of one row
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Pace, "tokens", tokens)
            engine.submit(ask(bank, "the", "wide", max_new_tokens=40, stop=()), outputs.append)
            futures = [engine.route(ids) for ids in prompts]
            finish(engine)
        assert [future.result() for future in futures] == whole
    assert [output for output in outputs if output.finish_reason] and outputs[:40] == outputs[40:80]


def test_a_step_routes_one_forward_and_every_text_gets_its_token(
    bank: AdapterBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "tokens", 32)
    computed: list[int] = []
    prefill = DecodeBatch.prefill

    def count(self: DecodeBatch, variants: Any, slots: Any, ids: torch.Tensor, start: int) -> torch.Tensor:
        computed.append(ids.numel())
        return prefill(self, variants, slots, ids, start)

    engine, outputs = Engine(bank, slots=2), list[RequestOutput]()
    engine.submit(ask(bank, "the", "wide", max_new_tokens=50, stop=(), temperature=0), outputs.append)
    engine.step()
    monkeypatch.setattr(DecodeBatch, "prefill", count)
    futures = [engine.route(bank.encode("the cat sat on the mat " * 9)) for _ in range(3)]
    reading = list[RequestOutput]()
    engine.submit(ask(bank, "the cat sat on the mat " * 6, "attention", max_new_tokens=2), reading.append)
    for step in range(12):  # a prompt that is read takes turns with those that are routed
        computed.clear()
        engine.step()
        assert len(outputs) == step + 2 and len(computed) == 1 and computed[0] <= 32
    assert reading
    assert not any(future.done() for future in futures)
    finish(engine)
    assert all(future.done() for future in futures)


def test_prompts_that_are_routed_take_turns_and_wait_in_the_queue(
    bank: AdapterBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "tokens", 32)
    engine = Engine(bank, queue=3)
    long, short = bank.encode("the cat sat on the mat " * 9), bank.encode("the cat")
    first, second, third = (engine.route(ids) for ids in (long, long, short))
    assert (engine.load.waiting, engine.load.routing, engine.load.running) == (3, 3, 0)
    for call in (lambda: engine.route(short), lambda: engine.submit(ask(bank, "the"), lambda output: None)):
        with pytest.raises(Busy, match="3 requests are waiting"):
            call()
    while not third.done():
        engine.step()
    assert not first.done() and not second.done()  # the last to come was the first to end: it is short
    assert second.cancel()
    engine.step()
    assert engine.load.routing == 1
    finish(engine)
    assert first.done() and engine.load.waiting == 0


def test_a_prompt_that_is_not_routed_yet_is_given_up_when_the_engine_stops(bank: AdapterBank) -> None:
    engine = Engine(bank)
    futures = [engine.route(bank.encode("the cat sat on the mat " * 9)) for _ in range(50)]
    engine.start()
    began = time.monotonic()
    engine.stop(drain_seconds=60)
    assert time.monotonic() - began < 30
    assert isinstance(futures[-1].exception(timeout=0), Stopping)


def failing_engine(bank: AdapterBank, monkeypatch: pytest.MonkeyPatch) -> tuple[Engine, list[str]]:
    """An engine whose next forwards fail as a GPU's do, and the reasons for which its three requests end."""
    engine, reasons = Engine(bank, slots=1), list[str]()

    def fail(*_: object) -> None:
        monkeypatch.undo()  # the first time only
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DecodeBatch, "prefill", fail)
    for _ in range(3):
        request = ask(bank, "the cat", "wide", max_new_tokens=3, stop=())
        engine.submit(request, lambda output: reasons.append(output.finish_reason) if output.finish_reason else None)
    return engine, reasons


def test_after_an_error_the_old_cache_goes_before_the_new_one_comes(
    bank: AdapterBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, reasons = failing_engine(bank, monkeypatch)
    old = weakref.ref(engine._batch._cache.keys[0])
    left: list[object] = []
    allocate = type(bank.spec).kv_cache
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(bank.spec), "kv_cache", lambda *arguments: left.append(old()) or allocate(*arguments))
        engine.start()
        engine.stop(drain_seconds=30)
    assert left == [None]
    assert reasons == ["error", "length", "length"]
    assert not engine.failed


def test_an_engine_that_cannot_begin_anew_ends_all_requests_and_takes_no_more(
    bank: AdapterBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, reasons = failing_engine(bank, monkeypatch)
    with pytest.MonkeyPatch.context() as patch:

        def full(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        patch.setattr(type(bank.spec), "kv_cache", full)
        engine.start()
        assert engine._thread is not None
        engine._thread.join(30)
    assert not engine._thread.is_alive() and engine.failed
    assert reasons == ["error", "cancelled", "cancelled"]
    for call in (lambda: engine.submit(ask(bank, "the"), print), lambda: engine.route(bank.encode("the"))):
        with pytest.raises(Stopping, match="has failed"):
            call()


def broken_device(*_: object) -> None:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def test_a_device_that_computes_nothing_any_more_ends_the_engine_though_it_gives_memory(
    bank: AdapterBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, reasons = failing_engine(bank, monkeypatch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunningBatch, "check_device", broken_device)
        engine.start()
        assert engine._thread is not None
        engine._thread.join(30)
    assert not engine._thread.is_alive() and engine.failed
    assert reasons == ["error", "cancelled", "cancelled"]


def test_a_device_that_breaks_while_prompts_are_routed_ends_the_engine(
    bank: AdapterBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(bank)
    futures = [engine.route(bank.encode("the cat")) for _ in range(2)]
    monkeypatch.setattr(Routing, "advance", broken_device)
    monkeypatch.setattr(RunningBatch, "check_device", broken_device)
    engine.start()
    errors = [future.exception(timeout=30) for future in futures]
    assert engine._thread is not None
    engine._thread.join(30)
    assert engine.failed and isinstance(errors[0], torch.AcceleratorError)
    assert isinstance(errors[1], Stopping) and "has failed" in str(errors[1])


def test_a_listener_that_fails_takes_nobody_else_down(bank: AdapterBank) -> None:
    engine, outputs, ended = Engine(bank, slots=2), list[RequestOutput](), threading.Event()

    def broken(output: RequestOutput) -> None:
        raise RuntimeError("the event loop is closed")

    engine.submit(ask(bank, "the"), broken)
    engine.start()
    request = ask(bank, "the cat")
    until = time.monotonic() + 30
    while engine.load.running + engine.load.waiting and time.monotonic() < until:
        time.sleep(0.01)
    engine.submit(request, lambda output: (outputs.append(output), output.finish_reason and ended.set()))
    assert ended.wait(30)
    engine.stop(drain_seconds=30)
    assert outputs == alone(bank, request) and not engine.failed


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


def ids_of(outputs: list[RequestOutput]) -> list[int]:
    return [id for output in outputs for id in output.ids]


def test_a_stop_token_ends_the_text_as_endoftext_does(bank: AdapterBank) -> None:
    request = ask(bank, "the cat", temperature=0.0)
    whole = ids_of(alone(bank, request))
    third = next(i for i, id in enumerate(whole) if i >= 2 and id not in whole[:i])
    outputs = alone(bank, replace(request, settings=replace(request.settings, stop_token_ids=(whole[third],))))
    assert ids_of(outputs) == whole[:third] and outputs[-1].finish_reason == "end"


def test_endoftext_ends_a_text_not_before_its_least_length_and_never_where_it_is_ignored(bank: AdapterBank) -> None:
    likely = {"temperature": 0.0, "logit_bias": ((bank.end, 1e4),)}
    assert [output.finish_reason for output in alone(bank, ask(bank, "the", **likely))] == ["end"]
    outputs = alone(bank, ask(bank, "the", min_new_tokens=4, **likely))
    assert len(ids_of(outputs)) == 4 and outputs[-1].finish_reason == "end"
    outputs = alone(bank, ask(bank, "the", ignore_eos=True, **likely))
    assert ids_of(outputs) == [bank.end] * 10 and outputs[-1].finish_reason == "length"
    assert "".join(output.text for output in outputs) == ""


def test_a_stop_string_counts_only_after_the_least_length(bank: AdapterBank) -> None:
    request = ask(bank, "the cat", temperature=0.0, ignore_eos=True, max_new_tokens=30)
    outputs = alone(bank, request)
    first = next(number for number, output in enumerate(outputs) if output.text)
    text, early = "".join(output.text for output in outputs), outputs[first].text
    for least in (0, first + 1):
        changed = replace(request.settings, stop=(early,), min_new_tokens=least)
        again = text.find(early, len(early)) if least else 0
        written = "".join(output.text for output in alone(bank, replace(request, settings=changed)))
        assert written == (text if again < 0 else text[:again])


@pytest.mark.parametrize("wrong", [{"logit_bias": ((10**9, 1.0),)}, {"stop_token_ids": (-1,)}], ids=str)
def test_settings_that_name_no_token_are_refused(bank: AdapterBank, wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))}: token id .*, expected 0 to"):
        alone(bank, ask(bank, "the", **wrong))


def test_a_penalty_counts_the_text_and_not_the_prompt(bank: AdapterBank) -> None:
    """Presence so strong that no token comes twice, though the prompt's may come once."""
    request = ask(bank, "the cat", temperature=0.0, presence_penalty=1e4, max_new_tokens=30, ignore_eos=True)
    favoured = replace(request.settings, logit_bias=((request.ids[-1], 1e3),))
    written = ids_of(alone(bank, replace(request, settings=favoured)))
    assert len(set(written)) == len(written) == 30
    assert written[0] == request.ids[-1]
