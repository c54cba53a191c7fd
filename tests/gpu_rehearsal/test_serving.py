"""The server over HTTP on a pretended GPU: its endpoints add no wait to those of its engine.

The event loop runs in the test's own thread, which sees the GPU, as do the engine's and the one that reads adapters.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from pretended_cuda import PretendedCUDA

from peftune.inference.bank import AdapterBank
from peftune.inference.engine import Engine
from peftune.serve.app import build_app
from peftune.serve.server import make_service
from peftune.serve.settings import ServeSettings

COMPLETIONS = "/v1/completions"
TOKEN = "inference/running_batch.py:_choose_of (tolist)"
SCORES = "inference/sequence.py:token_logprobs (tolist)"
ROUTE = {"inference/routing/route.py:advance (tolist)"}
TEXT = {"prompt": "the cat sat on the mat", "max_tokens": 8, "seed": 1, "ignore_eos": True}
TEXTS = [
    {"model": "base", "temperature": 0},
    {"model": "attention", "temperature": 0.8, "top_p": 0.9},
    {"model": "wide", "temperature": 0.8, "top_k": 20, "min_p": 0.05},
    {"model": "dora", "temperature": 0.8, "stop": ["zzz"]},
    {"model": "head", "n": 2},
]
"""Eight tokens each, of six choices."""


@pytest.fixture
def serve(
    base_directory: Path,
    adapters: dict[str, Path],
    cuda: PretendedCUDA,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """`serve(session)`: what the coroutine `session(client)` returns, and the engine's steps; it has four adapters."""
    run, read = Engine._run, AdapterBank.read

    def run_on_gpu(engine: Engine) -> None:
        with cuda:
            run(engine)

    def read_on_gpu(bank: AdapterBank, *given: Any) -> Any:
        with cuda:
            return read(bank, *given)

    shutil.copytree(adapters["rslora"], tmp_path / "late")
    names = "attention", "wide", "dora", "head"
    settings = ServeSettings(slots=8, roots=(tmp_path,))
    service = make_service(str(base_directory), {name: adapters[name] for name in names}, "bf16", settings)
    assert service.computing == "bf16 on pretended"
    monkeypatch.setattr(Engine, "_run", run_on_gpu)
    monkeypatch.setattr(AdapterBank, "read", read_on_gpu)

    async def connected(session: Any) -> Any:
        transport = httpx.ASGITransport(build_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=100) as client:
            return await session(client)

    def with_server(session: Any) -> Any:
        cuda.forget()
        service.engine.start()
        with ExitStack() as stack:
            stack.callback(service.engine.stop, 100)
            answers = asyncio.run(connected(session))
        assert not cuda.faults
        return answers, service.engine.load.steps

    return with_server


def choices_of(answers: list[httpx.Response]) -> list[Any]:
    assert {answer.status_code for answer in answers} == {200}, [answer.text for answer in answers]
    return [choice for answer in answers for choice in answer.json()["choices"]]


def test_texts_over_http_wait_once_a_step_as_those_of_the_engine_do(serve: Any, cuda: PretendedCUDA) -> None:
    async def session(client: httpx.AsyncClient) -> list[httpx.Response]:
        ways: list[dict[str, Any]] = [{}, {"stream": True, "stream_options": {"include_usage": True}}]
        asked = [client.post(COMPLETIONS, json=TEXT | text | way) for way in ways for text in TEXTS]
        return await asyncio.gather(*asked)

    answers, steps = serve(session)
    whole, streams = answers[: len(TEXTS)], [answer.text.split("\n\n") for answer in answers[len(TEXTS) :]]
    assert [choice["finish_reason"] for choice in choices_of(whole)] == ["length"] * 6
    assert all(stream[-2:] == ["data: [DONE]", ""] for stream in streams)
    usages = [json.loads(stream[-3].removeprefix("data: "))["usage"] for stream in streams]
    assert usages == [answer.json()["usage"] for answer in whole]
    assert [usage["completion_tokens"] for usage in usages] == [8, 8, 8, 8, 16]
    assert cuda.waits.keys() == {TOKEN} and cuda.waits[TOKEN] <= steps


def test_scores_wait_once_for_a_prompt_and_once_for_a_token(serve: Any, cuda: PretendedCUDA) -> None:
    async def session(client: httpx.AsyncClient) -> list[httpx.Response]:
        echoed = {"logprobs": 3, "echo": True}
        bodies = [{"max_tokens": 0, **echoed}, {"max_tokens": 4, **echoed}, {"max_tokens": 4, "logprobs": 2}]
        bodies.append({"max_tokens": 4, "prompt_logprobs": 1})
        asked = [client.post(COMPLETIONS, json=TEXT | {"model": "wide"} | body) for body in bodies]
        return await asyncio.gather(*asked)

    answers, steps = serve(session)
    only, echoed, plain, _ = choices_of(answers)
    assert only["text"] == TEXT["prompt"] and len(only["logprobs"]["tokens"]) + 4 == len(echoed["logprobs"]["tokens"])
    assert len(plain["logprobs"]["token_logprobs"]) == 4 and None not in plain["logprobs"]["token_logprobs"]
    assert cuda.waits.keys() == {TOKEN, SCORES} and cuda.waits[TOKEN] <= steps
    assert cuda.waits[SCORES] <= 3 + 3 * 4  # three prompts are scored, and four tokens of three texts


def test_routing_and_adapters_that_come_and_go_wait_where_they_may(serve: Any, cuda: PretendedCUDA) -> None:
    async def session(client: httpx.AsyncClient) -> list[httpx.Response]:
        posts = [
            (COMPLETIONS, TEXT | {"model": "auto"}),
            ("/v1/load_lora_adapter", {"lora_name": "late", "lora_path": "late"}),
            (COMPLETIONS, TEXT | {"model": "late"}),
            ("/v1/unload_lora_adapter", {"lora_name": "late"}),
            ("/tokenize", {"model": "wide", "prompt": "the cat"}),
        ]
        found = [await client.post(path, json=body) for path, body in posts]
        return [*found, *[await client.get(path) for path in ("/v1/models", "/metrics", "/health")]]

    answers, _ = serve(session)
    assert {answer.status_code for answer in answers} == {200}, [answer.text for answer in answers]
    assert set(answers[0].json()["routing"]["scores"]) == {"attention", "wide", "dora", "head"}
    assert len(answers[2].json()["choices"][0]["text"]) > 0
    loading = {place for place in cuda.waits if place not in {TOKEN, *ROUTE}}
    assert loading <= {"inference/bank.py:<genexpr> (copy from memory that is not pinned)"}  # factors of an adapter


def test_a_wait_in_an_endpoint_is_found(serve: Any, cuda: PretendedCUDA, monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests are for: something in the way of a request asks the GPU."""
    import torch

    from peftune.serve.openai import completions

    original = completions.encode_prompts

    def asking(*given: Any, **named: Any) -> Coroutine[Any, Any, Any]:
        float(torch.ones(1, device="cuda").sum())
        return original(*given, **named)

    async def session(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.post(COMPLETIONS, json=TEXT | {"model": "wide"})]

    monkeypatch.setattr(completions, "encode_prompts", asking)
    assert choices_of(serve(session)[0])
    assert set(cuda.waits) > {TOKEN}
