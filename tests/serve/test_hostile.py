"""What nobody should send: refused with the right code, one line and nothing of ours in it; the server goes on."""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress
from typing import Any

import pytest

JSON = {"content-type": "application/json"}
PATH = "/v1/completions"


def asked(**fields: Any) -> bytes:
    return json.dumps({"model": "a1", "prompt": "x", "max_tokens": 2} | fields).encode()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "holds list"),
        (b"null", "holds NoneType"),
        (
            b'{"model": "a1", "prompt": "\xff"}',
            "not JSON in UTF-8: 'utf-8' codec can't decode byte 0xff in position 27",
        ),
        (b"\xef\xbb\xbf" + asked(), "not JSON"),
        (asked(prompt="\ud800"), "surrogates not allowed"),
        (b'{"\\ud800": 1}', "surrogates not allowed"),
        (b'{"model": "a1", "temperature": NaN}', "NaN is not JSON"),
        (b'{"model": "a1", "temperature": -Infinity}', "-Infinity is not JSON"),
        (b'{"model": "a1", "temperature": 1e999}', "1e999 is larger than any number"),
        (b'{"model": "a1", "model": "a2"}', "'model' stands twice"),
        (b'{"model": ' + b"[" * 50_000, "nested too deep"),
        (b'{"model": ' + b'{"a":' * 50_000, "nested too deep"),
        (b'{"model": "a1", "n": ' + b"9" * 5000 + b"}", "a number of 5,000 digits"),
        (asked(n=10**400), "a number of 401 digits"),
        (asked(n=10**30), "n: expected a number less than or equal to 16"),
        (asked(max_tokens=True), "max_tokens: expected a whole number, found True"),
        (asked(max_tokens=2.5), "max_tokens: expected a whole number"),
        (asked(max_tokens="2"), "max_tokens: expected a whole number"),
        (asked(max_tokens=-1), "max_tokens: expected a number greater"),
        (asked(min_tokens=3), "min_tokens is 3, expected 0 to 2"),
        (asked(min_p=1.5), "min_p: expected"),
        (asked(prompt_logprobs=21), "prompt_logprobs: expected"),
        (asked(prompt_logprobs=1, stream=True), "prompt_logprobs goes without stream"),
        (asked(stop_token_ids=[4096]), "stop_token_ids: token id 4096, expected 0 to 4095"),
        (asked(stop_token_ids=[1.0]), "stop_token_ids.0: expected a whole number"),
        (asked(stop_token_ids=[1] * 65), "stop_token_ids: list should have at most 64 items"),
        (asked(temperature=True), "temperature: expected a number, found True"),
        (asked(temperature=-1), "temperature"),
        (asked(top_p=0), "top_p"),
        (asked(n=0), "n: expected"),
        (asked(seed=2**63), "seed: expected"),
        (asked(logprobs=21), "logprobs: expected"),
        (asked(stop=""), "stop.0: expected some text"),
        (asked(stop=["a"] * 65), "stop: list should have at most 64 items"),
        (asked(stop=[1]), "stop.0: expected text"),
        (asked(prompt=[]), "prompt: expected"),
        (asked(prompt=[[]]), "prompt: expected"),
        (asked(prompt=["x", 1]), "prompt: expected"),
        (asked(prompt=[1, True]), "prompt: expected"),
        (asked(prompt=[1, -1]), "token id -1"),
        (asked(prompt=[4096]), "the model knows ids 0 to 4095"),
        (asked(prompt=[[1], [10**30]]), "token id 1000"),
        (asked(prompt="x " * 600), "512 positions: "),
        (asked(prompt="x" * 200_000), "512 positions: "),
        (asked(max_tokens=511), "512 positions: 2 for the prompt (a context token stands before it) and 511"),
        (asked(prompt=["x"] * 100, n=2), "100 prompts with n 2"),
        (asked(best_of=2), "best_of is 2 with n 1"),
        (asked(logit_bias={"5": 101}), "expected a number less than or equal to 100"),
        (asked(logit_bias={"x": 1}), "logit_bias: expected token ids as names, found 'x'"),
        (asked(logit_bias={"-1": 1}), "logit_bias: expected token ids"),
        (asked(logit_bias={"4096": 1}), "logit_bias: token id 4096, expected 0 to 4095"),
        (asked(logit_bias=[]), "logit_bias: expected an object"),
        (asked(logit_bias={str(n): 1 for n in range(1025)}), "of at most 1024 tokens"),
        (asked(suffix="y"), "suffix: is not supported"),
        (asked(presence_penalty=2.1), "presence_penalty: expected a number less than or equal to 2"),
        (asked(frequency_penalty=-2.1), "frequency_penalty: expected"),
        (asked(messages=[]), "messages: belongs to /v1/chat/completions"),
        (asked(stream_options=[]), "stream_options: expected an object"),
        (asked(stream=True, stream_options={"x": 1}), "unknown key stream_options.x, known here: include_usage"),
        (asked(**{"(": 1}), "unknown key (, known here: model, "),
        (asked(**{"": 1}), "unknown key"),
        (asked(**{"\x1b[31m": 1}), "unknown key \\x1b[31m, known here"),
        (asked(max_token=1), "unknown key max_token, did you mean max_tokens?"),
        (asked(stream_options={"include_usage": True}), "stream_options goes with stream"),
        (asked(stream=True, stream_options={"include_usage": 1}), "stream_options.include_usage"),
        (asked(model=""), "model"),
        (asked(model=None), "model is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_body_that_makes_no_sense_is_refused_with_400(server: Any, body: bytes, message: str) -> None:
    answer = server.http.post(PATH, content=body, headers=JSON)
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert "\n" not in error["message"] and len(error["message"]) < 600


@pytest.mark.parametrize(
    "part",
    [None, "x", [], {}, {"type": "text"}, {"text": "x"}, {"type": "text", "text": 1}, {"type": "text", "text": None},
     {"type": "image_url", "text": "x"}, {"type": "text", "text": "x", "more": 1}],
    ids=str,
)  # fmt: skip
def test_a_turn_that_is_not_of_text_parts_is_refused(server: Any, part: Any) -> None:
    content = [{"type": "text", "text": "x"}, part]
    answer = server.post("/v1/chat/completions", model="a7", messages=[{"role": "user", "content": content}])
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("messages.0.content: expected text, or parts such as")


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "a1", "prompt": "' + b"x" * 1_000_000 + b'"}',
        b'{"model": "a1", "messages": [' + b",".join([b"{}"] * 340_000) + b"]}",
        b"{" + b",".join(b'"%x": 1' % number for number in range(90_000)) + b"}",
        b'{"model": "a1", "prompt": [' + b",".join([b"[1]"] * 250_000) + b"]}",
        b'{"model": "a1", "prompt": [' + b",".join([b"1"] * 500_000) + b"]}",
        b'{"model": "a1", "stop": [' + b",".join([b'"a"'] * 250_000) + b"]}",
    ],
    ids=["text", "messages", "fields", "prompts", "tokens", "stops"],
)
def test_no_body_within_the_limit_keeps_the_server_busy_for_long(server: Any, body: bytes) -> None:
    assert len(body) <= 1 << 20
    path = "/v1/chat/completions" if b"messages" in body else PATH
    began = time.monotonic()
    answer = server.http.post(path, content=body, headers=JSON)
    assert answer.status_code == 400 and len(answer.content) < 2000
    assert time.monotonic() - began < 2  # a tenth of it on an idle core; it grew with the square, it would be minutes


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", PATH, {"content-type": "text/plain"}, 415),
        ("POST", PATH, {"content-type": "application/x-www-form-urlencoded"}, 415),
        ("GET", PATH, {}, 405),
        ("DELETE", "/v1/models", {}, 405),
        ("GET", "/v1/nothing", {}, 404),
        ("GET", "/docs", {}, 404),
        ("GET", "/openapi.json", {}, 404),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", {}, 404),
        ("GET", "/v1/models/%ff%00", {}, 404),
        ("POST", PATH, JSON | {"host": "evil.example"}, 403),
        ("GET", "/v1/models", {"host": "localhost.evil.example:80"}, 403),
        ("GET", "/v1/models", {"host": "localhost:1"}, 200),
        ("GET", "/v1/models", {"host": "[::1]"}, 200),
    ],
)
def test_a_request_that_goes_nowhere_gets_an_error_object(
    server: Any, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    answer = server.http.request(method, path, headers=headers, content=asked() if method == "POST" else None)
    assert answer.status_code == status
    if status != 200:
        assert answer.json()["error"]["message"]
    assert "access-control-allow-origin" not in answer.headers
    assert (status == 405) == ("allow" in answer.headers)


def raw(server: Any, request: bytes, seconds: float = 5.0) -> bytes:
    """What comes back until the server closes, orderly or not."""
    answer = b""
    with socket.create_connection(server.address, timeout=seconds) as connection, suppress(ConnectionResetError):
        connection.sendall(request)
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


def test_an_unknown_field_of_a_message_names_the_fields_of_messages(server: Any) -> None:
    messages = [{"role": "user", "content": "x", "weight": 1}]
    error = server.post("/v1/chat/completions", model="a7", messages=messages).json()["error"]
    assert (
        error["message"] == "unknown key messages.0.weight, known here: role, content, name, tool_call_id, tool_calls"
    )
    error = server.post("/v1/chat/completions", model="a7", messages=messages[:1], prompt="x").json()["error"]
    assert "prompt: belongs to /v1/completions" in error["message"]


def test_a_head_is_bounded_however_it_arrives(server: Any) -> None:
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20_000 + b"\r\n"
    path = b"GET /health?" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n"
    for request in (head + b"\r\n", path + b"\r\n", head, path, b"GET /" + b"x" * 20_000):
        answer = raw(server, request)
        assert answer.startswith(b"HTTP/1.1 431 "), answer[:100]
        assert json.loads(answer.rpartition(b"\r\n\r\n")[2])["error"]["message"].startswith("the request line and head")
    below = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX: " + b"x" * 15_000 + b"\r\n\r\n"
    assert raw(server, below).startswith(b"HTTP/1.1 200 ")


def test_only_http_1_1_needs_a_host(server: Any) -> None:
    assert raw(server, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    assert raw(server, b"GET /health HTTP/1.0\r\nHost: evil.example\r\n\r\n").startswith(b"HTTP/1.1 403 ")
    missing = raw(server, b"GET /health HTTP/1.1\r\n\r\n")
    assert missing.startswith(b"HTTP/1.1 400 ") and b"Missing mandatory Host: header" in missing
    streamed = json.dumps({"model": "a1", "prompt": "x", "max_tokens": 2, "stream": True}).encode()
    head = f"POST {PATH} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(streamed)}\r\n\r\n"
    assert raw(server, head.encode() + streamed).endswith(b"data: [DONE]\n\n")


def test_a_body_that_is_too_large_is_refused_with_and_without_its_length(start: Any) -> None:
    with start({}, max_body=2000) as server:
        large = asked(model="base", prompt="x" * 3000)
        answer = server.http.post(PATH, content=large, headers=JSON)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        answer = server.http.post(PATH, content=iter([large[:1500], large[1500:]]), headers=JSON)
        assert answer.status_code == 413
        waits = raw(server, server.request(headers=f"Content-Length: {10**12}\r\nExpect: 100-continue\r\n"))
        assert waits.startswith(b"HTTP/1.1 413")  # and was not asked to go on
        assert server.http.post(PATH, content=asked(model="base"), headers=JSON).status_code == 200


def test_clients_that_dribble_are_let_go(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftune.serve.http import connection

    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(connection, "KEEP_ALIVE_SECONDS", 0.3)
    with start({}, body_seconds=0.3) as server:
        began = time.monotonic()
        assert raw(server, b"POST /v1/completions HTTP/1.1\r\nHost: loc") == b""
        assert raw(server, b"") == b""
        assert raw(server, server.request(b"{", headers="Content-Length: 100\r\n")).startswith(b"HTTP/1.1 408")
        kept = raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health HTTP/1.1\r\n")
        assert kept.startswith(b"HTTP/1.1 200") and kept.count(b"HTTP/1.1") == 1
        assert raw(server, b"\x16\x03\x01 no http\r\n\r\n").startswith(b"HTTP/1.1 400")
        assert time.monotonic() - began < 5
        assert server.http.get("/health").status_code == 200


def test_a_client_that_leaves_frees_its_slot_at_once(server: Any) -> None:
    before = server.metric("peftune_cancelled_total")
    written = server.engine.load.tokens_written
    server.stream().close()
    with socket.create_connection(server.address) as waiting:  # for an answer as a whole
        waiting.sendall(server.request(asked(model="a0", max_tokens=400, temperature=0, n=3)))
        server.wait(lambda: server.engine.load.running >= 3)
    server.wait(lambda: server.engine.load.running == 0)
    assert server.metric("peftune_cancelled_total") == before + 4
    assert server.metric('peftune_requests_total{endpoint="/v1/completions",model="a0",status="499"}') >= 1
    assert server.engine.load.tokens_written - written < 400


def test_a_reader_that_reads_no_more_stalls_nobody_and_is_let_go(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftune.serve.http import connection

    monkeypatch.setattr(connection, "STALL_SECONDS", 0.5)
    with start({}, slots=16) as server:
        server.server._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        stalled = server.stream(receive_buffer=4096, model="base", logprobs=20, n=8, temperature=1, seed=1)
        (open_connection,) = server.server.server_state.connections
        server.wait(lambda: bool(open_connection.flow.write_paused))
        assert open_connection.transport.get_write_buffer_size() < 128 << 10
        assert server.http.post(PATH, content=asked(model="base"), headers=JSON).status_code == 200
        assert not open_connection.transport.is_closing()
        server.wait(lambda: bool(open_connection.transport.is_closing()))
        server.wait(lambda: server.engine.load.running == 0)
        stalled.close()
