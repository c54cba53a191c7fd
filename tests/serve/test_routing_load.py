"""`model: auto` under load: counted, dropped with its client, stopped at the drain; and an engine that has failed."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch

from peftune.inference.routing.route import Routing
from peftune.model.decode.batch import DecodeBatch

COMPLETIONS = "/v1/completions"
AUTO = {"model": "auto", "prompt": "def main(self):", "max_tokens": 4, "temperature": 0}


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routing that never comes to an end, some milliseconds at a time."""

    def advance(routing: Routing, tokens: int) -> int:
        time.sleep(0.01)
        return 1

    monkeypatch.setattr(Routing, "advance", advance)
    monkeypatch.setattr(Routing, "is_done", False)


@pytest.mark.usefixtures("endless")
@pytest.mark.parametrize("stream", [False, True])
def test_routing_is_counted_and_bounded_and_ends_with_its_client(start: Any, root: Path, stream: bool) -> None:
    with start({"a0": root / "a0"}, slots=1, queue=2) as server:
        body = json.dumps(AUTO | {"stream": stream}).encode()
        connections = [socket.create_connection(server.address) for _ in range(2)]
        for connection in connections:
            connection.sendall(server.request(body))
        server.wait(lambda: server.engine.load.routing == 2, 10)
        assert server.metric("peftune_requests_routing ") == server.metric("peftune_requests_waiting ") == 2
        assert server.metric("peftune_requests_running ") == 0
        refused = server.post(COMPLETIONS, **AUTO)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        for connection in connections:
            connection.close()
        server.wait(lambda: server.engine.load.routing == 0, 10)
        assert server.post(COMPLETIONS, **AUTO | {"model": "a0"}).status_code == 200
        server.wait(
            lambda: server.metric('peftune_requests_total{endpoint="/v1/completions",model="",status="499"}') == 2
        )


@pytest.mark.usefixtures("endless")
def test_routing_does_not_outlive_the_drain_and_texts_go_on_beside_it(start: Any, root: Path) -> None:
    with start({"a0": root / "a0"}, drain=60) as server:
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(server.post(COMPLETIONS, **AUTO)))
        asking.start()
        server.wait(lambda: server.engine.load.routing == 1, 10)
        assert server.post(COMPLETIONS, **AUTO | {"model": "a0", "max_tokens": 20}).status_code == 200
        began = time.monotonic()
        server.server.drain()
        asking.join(30)
        assert time.monotonic() - began < 20
        assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "draining")


def test_an_engine_that_has_failed_is_told_by_health_and_every_answer(
    start: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with start({"a0": root / "a0"}) as server:
        assert server.http.get("/health").status_code == 200
        monkeypatch.setattr(DecodeBatch, "prefill", full)
        monkeypatch.setattr(type(server.bank.spec), "kv_cache", full)
        assert server.post(COMPLETIONS, **AUTO | {"model": "a0"}).status_code == 500  # it was in the batch
        server.wait(lambda: server.engine.failed, 10)
        for answer in (
            server.http.get("/health"),
            server.post(COMPLETIONS, **AUTO | {"model": "a0"}),
            server.post(COMPLETIONS, **AUTO),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_failed")
        assert server.http.get("/metrics").status_code == 200
