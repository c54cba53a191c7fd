"""Bodies and heads that nobody thought of: an error object of four hundred and something, soon, and nothing in the log.

`PEFTUNE_FUZZ_SECONDS=1200 python -m pytest -m fuzz tests/serve/test_fuzz.py` goes on for twenty minutes with each.
"""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fuzzing import SECONDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftune.serve.openai.neutral import OpenAIBaseModel
from peftune.serve.openai.schema import (
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    DetokenizeRequest,
    LoadLoRAAdapterRequest,
    TokenizeRequest,
    UnloadLoRAAdapterRequest,
)

SOON = 30.0  # on a busy machine; what hangs takes longer
SCHEMAS: dict[str, type[OpenAIBaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/v1/load_lora_adapter": LoadLoRAAdapterRequest,
    "/v1/unload_lora_adapter": UnloadLoRAAdapterRequest,
}
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "a1", "prompt": "x", "max_tokens": 1},
    "/v1/chat/completions": {"model": "a7", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
    "/v1/load_lora_adapter": {"lora_name": "fuzz", "lora_path": "nothing"},
    "/v1/unload_lora_adapter": {"lora_name": "fuzz"},
}
NASTY = [
    "",
    "\0",
    "\x1b[31m",
    "\ud800",
    "\u2028",
    "a7",
    "auto",
    "../..",
    "/",
    "<|endoftext|>",
    "\n\nAssistant:",
    "9" * 400,
]
TEXTS = st.one_of(st.sampled_from(NASTY), st.text(max_size=20))
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, -(2**63), 10**400, 1e308, -1e308, 5e-324, -0.0, float("nan"), float("inf")]),
    st.floats(-3, 3),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
NAMES = st.sampled_from([*ChatMessage.model_fields, "include_usage", "type", "text", "5", "-1", "9" * 50])
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.one_of(NAMES, TEXTS), inner, max_size=4)),
    max_leaves=12,
)


pytestmark = pytest.mark.fuzz


@pytest.fixture(scope="module")
def server(start: Callable[..., Any], root: Path) -> Iterator[Any]:
    """Of this file's own: what is sent here may unload an adapter that others need."""
    with start({path.name: path for path in root.iterdir()}, roots=(root,), slots=16) as running:
        yield running


@pytest.fixture
def silent(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], None]]:
    """Fails where the log has a word about a failure."""

    def check() -> None:
        assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []

    yield check
    check()


def fuzz(strategy: st.SearchStrategy[Any], check: Callable[[Any], None], seconds: float) -> None:
    """Examples for so long, or as long as is asked for; hypothesis shrinks the one that fails."""
    until = time.monotonic() + (SECONDS or seconds)

    @settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def one(value: Any) -> None:
        if time.monotonic() < until:
            check(value)

    while time.monotonic() < until:
        one()


@st.composite
def requests(draw: Callable[[Any], Any]) -> tuple[str, dict[str, Any]]:
    """A valid body with some fields, known or not, changed."""
    path = draw(st.sampled_from(sorted(SCHEMAS)))
    names = st.one_of(st.sampled_from(sorted(SCHEMAS[path].model_fields)), TEXTS)
    return path, VALID[path] | draw(st.dictionaries(names, VALUES, max_size=4))


def test_no_value_of_any_field_is_answered_by_a_failure(server: Any, silent: Callable[[], None]) -> None:
    def check(request: tuple[str, dict[str, Any]]) -> None:
        path, body = request
        body = {name: value for name, value in body.items() if name not in ("n", "max_tokens", "max_completion_tokens")}
        body |= {name: request[1][name] for name in ("n",) if request[1].get(name) in (True, "x", 2, -1)}
        if "completions" in path:
            body["max_tokens"] = 1
        began = time.monotonic()
        answer = server.http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        assert time.monotonic() - began < SOON
        if answer.status_code != 200:
            assert 400 <= answer.status_code < 500, answer.text
            error = answer.json()["error"]
            assert error["message"] and error["message"].isprintable() and len(error["message"]) < 3000

    fuzz(requests(), check, 2.4)
    silent()


PIECES = [b"{", b"}", b"[", b"]", b'"a"', b":", b",", b"1e999", b"NaN", b'"\\ud800"', b"null"]
FIELDS = st.tuples(st.sampled_from([b'"model"', b'"prompt"', b'"n"']), VALUES)
BODIES = st.one_of(
    st.binary(max_size=60),
    VALUES.map(lambda value: json.dumps(value).encode()),
    st.integers(1, 20_000).map(lambda depth: b'{"model":' + b"[" * depth + b"]" * (depth % 3) * (depth // 2)),
    st.lists(st.sampled_from(PIECES), max_size=30).map(b"".join),
    FIELDS.map(lambda it: b'{"model": "a1", "max_tokens": 1, ' + it[0] + b": " + json.dumps(it[1]).encode() + b"}"),
)


def test_no_bytes_as_a_body_are_answered_by_a_failure(server: Any, silent: Callable[[], None]) -> None:
    def check(request: tuple[str, bytes]) -> None:
        began = time.monotonic()
        answer = server.http.post(request[0], content=request[1], headers={"content-type": "application/json"})
        assert time.monotonic() - began < SOON
        assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text

    fuzz(st.tuples(st.sampled_from(sorted(SCHEMAS)), BODIES), check, 0.8)
    silent()


HEADS = [
    b"GET /health HTTP/1.1", b"POST /v1/completions HTTP/1.1", b"GET / HTTP/1.0", b"Host: localhost", b"Host: \xff",
    b"Host:", b"Content-Length: -1", b"Content-Length: 99999999999999999999", b"Content-Length: 3", b"", b"5", b"{}",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip", b"Content-Type: application/json", b"Connection: close",
    b"Upgrade: websocket", b"Connection: Upgrade", b"Authorization: Bearer \xe9", b"Expect: 100-continue", b"x" * 5000,
]  # fmt: skip
BEGINNINGS = st.sampled_from(
    [[], HEADS[:1] + HEADS[3:4], HEADS[1:2] + HEADS[3:4] + [b"Content-Type: application/json"]]
)
MORE = st.lists(st.one_of(st.binary(max_size=30), st.sampled_from(HEADS)), max_size=12)
LINES = st.tuples(BEGINNINGS, MORE).map(lambda parts: [*parts[0], *parts[1]])


def test_no_bytes_as_a_request_are_answered_by_a_failure(server: Any, silent: Callable[[], None]) -> None:
    def check(lines: list[bytes]) -> None:
        with socket.create_connection(server.address, timeout=SOON) as connection, suppress(ConnectionError):
            connection.sendall(b"\r\n".join([*lines, b"", b""]))
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            while chunk := connection.recv(65536):
                answer += chunk
            assert b"HTTP/1.1 500 " not in answer  # 501 is for an encoding that nobody speaks

    fuzz(LINES, check, 0.8)
    silent()
    assert server.http.get("/health").status_code == 200
