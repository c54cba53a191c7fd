"""What an operator relies on: keys, back-pressure, adapters from allowed directories, metrics, an orderly end."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import psutil
import pytest

from peftune.errors import UserError
from peftune.serve.http.static import FOLDER
from peftune.serve.openai.models import without_paths
from peftune.serve.server import listen, make_service
from peftune.serve.settings import ServeSettings

COMPLETIONS, LOAD, UNLOAD = "/v1/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
SHORT = {"model": "base", "prompt": "x", "max_tokens": 2}


def test_a_key_is_needed_for_all_but_health(start: Any) -> None:
    with start({}, api_key="s3cret") as server:
        assert server.client.completions.create(**SHORT).usage.completion_tokens <= 2
        for header in (
            {},
            {"authorization": "Bearer s3cre"},
            {"authorization": "Basic s3cret"},
            {"authorization": "é"},
        ):
            encoded = {name: value.encode() for name, value in header.items()}
            for method, path in (("POST", COMPLETIONS), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/x")):
                answer = server.http.request(method, path, headers=encoded)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert server.http.get("/health", headers={"host": "any.name"}).json() == {"status": "ok"}


def test_a_full_queue_is_told_with_429_and_when_to_come_back(start: Any, root: Path) -> None:
    with start({"a0": root / "a0"}, slots=1, queue=2) as server:
        streams = []
        for number in range(3):
            streams.append(server.stream())
            server.wait(lambda: server.engine.load.running == 1)
            assert server.engine.load.waiting == number
        refused = [server.post(COMPLETIONS, **SHORT), server.post(COMPLETIONS, stream=True, **SHORT)]
        for stream in streams:
            stream.close()
        for answer in refused:
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
            assert int(answer.headers["retry-after"]) >= 1
        server.wait(lambda: server.engine.load.running + server.engine.load.waiting == 0)
        assert server.post(COMPLETIONS, n=2, **SHORT).status_code == 200  # all of them fit
        assert server.post(COMPLETIONS, n=3, **SHORT).status_code == 400  # never could for sure
        assert server.post(COMPLETIONS, **SHORT).status_code == 200


def test_adapters_come_and_go_while_texts_are_written(server: Any, root: Path) -> None:
    def told(path: str, **body: Any) -> tuple[int, str]:
        answer = server.post(path, **body)
        return answer.status_code, answer.text if answer.is_success else answer.json()["error"]["message"]

    events = server.client.completions.create(model="a1", prompt="x", max_tokens=60, temperature=0, stream=True)
    next(events)
    assert told(LOAD, lora_name="new", lora_path="a1") == (200, "Success: LoRA adapter 'new' added successfully.")
    assert told(LOAD, lora_name="new", lora_path=str(root / "a2"))[0] == 400
    streamed = server.client.completions.create(model="new", prompt="x", max_tokens=60, temperature=0, stream=True)
    first = next(streamed).choices[0].text
    assert told(UNLOAD, lora_name="new") == (200, "Success: LoRA adapter 'new' removed successfully.")
    assert (
        first + "".join(event.choices[0].text for event in streamed)
        == server.client.completions.create(model="a1", prompt="x", max_tokens=60, temperature=0).choices[0].text
    )
    assert list(events)[-1].choices[0].finish_reason == "length"
    with pytest.raises(openai.NotFoundError):
        server.client.completions.create(model="new", prompt="x")
    assert told(UNLOAD, lora_name="new")[0] == 404
    assert told(UNLOAD, lora_name="builtin:small")[0] == 404
    assert 'model="new"' not in server.http.get("/metrics").text


def test_only_what_lies_under_a_root_is_loaded_and_nothing_tells_what_lies_elsewhere(
    start: Any, root: Path, tmp_path: Path
) -> None:
    allowed, outside = tmp_path / "allowed", tmp_path / "allowed-not"
    shutil.copytree(root / "a1", outside / "a1")
    shutil.copytree(root / "a1", allowed / "deep" / "a1")
    (allowed / "link").symlink_to(outside / "a1")
    (allowed / "inner").symlink_to(allowed / "deep" / "a1")
    (allowed / "loop").symlink_to(allowed / "loop")
    (allowed / "broken").mkdir()
    shutil.copytree(root / "a1", allowed / "half")
    (allowed / "half" / "adapter_model.safetensors").unlink()
    (allowed / "half" / "adapter_model.safetensors").symlink_to(outside / "a1" / "adapter_model.safetensors")
    with start({}, roots=(allowed,), max_adapters=3) as server:

        def load(path: str, name: str = "x", **headers: str) -> tuple[int, str]:
            answer = server.http.post(LOAD, json={"lora_name": name, "lora_path": path}, headers=headers)
            return answer.status_code, answer.text

        escapes = ["../allowed-not/a1", "../allowed-not/nothing", str(outside / "a1"), "/etc", "/nothing", "..", "/",
                   "link", "deep/../../allowed-not/a1", "half"]  # fmt: skip
        answers = {load(path) for path in escapes}
        assert {status for status, _ in answers} == {403} and len(answers) == 1  # all the same, there or not
        assert load("nothing")[0] == load("loop")[0] == load("a" * 4000)[0] == 404
        assert load("a\0b")[0] == load("")[0] == 400
        status, text = load("broken")
        assert status == 400 and "broken" in text and str(tmp_path) not in text
        for name in ("a/b", "../x", "", ".hidden", "a b", "é", "auto", "base", "x" * 65, "a\n"):
            assert load("deep/a1", name)[0] == 400, name
        assert load("deep/a1", origin="http://evil.example")[0] == load("deep/a1", origin="null")[0] == 403
        assert load("deep/a1", "one", origin=server.url)[0] == load("inner", "two")[0] == 200
        assert load(str(allowed / "deep" / "a1"), "three")[0] == 200
        status, text = load("deep/a1", "four")
        assert status == 400 and "3 adapters are loaded already" in text
        assert server.bank.names == ("one", "two", "three")
    with start({}) as server:
        assert server.post(LOAD, lora_name="x", lora_path="a1").status_code == 403
        assert server.post(UNLOAD, lora_name="x").status_code == 403


def test_an_adapter_is_replaced_in_place_without_a_gap(server: Any, root: Path) -> None:
    """Requests without a pause while the name changes hands: each is the old adapter's or the new one's, none fails."""
    asked = {"prompt": "def main(", "max_tokens": 8, "temperature": 0}
    old, new = (server.post(COMPLETIONS, model=name, **asked).json()["choices"][0]["text"] for name in ("a1", "a2"))
    assert old != new
    assert server.post(LOAD, lora_name="live", lora_path="a1", load_inplace=True).is_success  # nothing to replace yet
    stream = server.client.completions.create(model="live", prompt="x", max_tokens=100, temperature=0, stream=True)
    first = next(stream).choices[0].text
    answers, done = [], threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            while not done.is_set():
                answers.append(client.post(COMPLETIONS, json={"model": "live"} | asked))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        server.wait(lambda: len(answers) > 1, 30)
        assert server.post(LOAD, lora_name="live", lora_path="a2").status_code == 400  # not without being told
        answer = server.post(LOAD, lora_name="live", lora_path="a2", load_inplace=True)
        assert answer.text == "Success: LoRA adapter 'live' replaced successfully."
        so_far = len(answers)
        server.wait(lambda: len(answers) > so_far + 2, 30)
    finally:
        done.set()
        asking.join(30)
    assert {answer.status_code for answer in answers} == {200}
    texts = [answer.json()["choices"][0]["text"] for answer in answers]
    assert texts == sorted(texts, key=(old, new).index) and texts[0] == old and texts[-1] == new
    whole = server.client.completions.create(model="a1", prompt="x", max_tokens=100, temperature=0).choices[0].text
    assert first + "".join(event.choices[0].text for event in stream) == whole  # written to its end with the old one
    assert server.post(LOAD, lora_name="live", lora_path="a9", load_inplace=True).status_code == 404
    assert server.post(COMPLETIONS, model="live", **asked).json()["choices"][0]["text"] == new  # it stays
    assert server.post(UNLOAD, lora_name="live").is_success


def test_no_error_of_loading_shows_a_path_of_this_machine(start: Any, make: Any, tmp_path: Path) -> None:
    root = tmp_path / "some where"
    good = make(root / "good", 1)
    for name, file, content in (
        ("no-weights", "adapter_model.safetensors", None), ("no-config", "adapter_config.json", None),
        ("bad-weights", "adapter_model.safetensors", b"x"), ("bad-config", "adapter_config.json", b"{"),
        ("bad-base", "adapter_config.json", b'{"peft_type": "LORA", "r": 2, "base_model_name_or_path": "/srv/x"}'),
        ("bad-provenance", "peftune.json", b"["), ("folder", "peftune.json", "folder"),
    ):  # fmt: skip
        shutil.copytree(good, root / name)
        (root / name / file).unlink(missing_ok=True)
        if content == "folder":
            (root / name / file).mkdir()
        elif content is not None:
            (root / name / file).write_bytes(content)
    with start({"live": good}, roots=(root,)) as server:
        for name in sorted(path.name for path in root.iterdir() if path.name != "good"):
            for given in (name, str(root / name)):
                answer = server.post(LOAD, lora_name="x", lora_path=given)
                message = answer.json()["error"]["message"]
                assert answer.status_code == 400, (name, message)
                assert str(tmp_path) not in message.replace(given, ""), message
        answer = server.post(LOAD, lora_name="live", lora_path="good")
        assert "/" not in answer.json()["error"]["message"]


def test_paths_become_what_the_client_knows_or_their_last_part() -> None:
    told = {"/srv/adapters/a b": "a b", "/srv/base": "gpt2"}
    message = "/srv/adapters/a b/x.json: as in /srv/base, not /home/me/.cache/y.bin (see https://a.b/c, and 1/2)"
    shown = "a b/x.json: as in gpt2, not …/y.bin (see https://a.b/c, and 1/2)"
    assert without_paths(message, told) == shown


@pytest.mark.parametrize(
    "name", ["auto", "base", "a/b", "a\nb", "a\n", "", ".", "-x", "é", "a" * 65, "a b", "\x1b[31m"]
)
def test_a_name_that_no_model_can_have_is_refused_before_anything_is_loaded(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="adapter name") as caught:
        make_service("no/such/base", {name: tmp_path}, "fp32", ServeSettings())
    assert str(caught.value).isprintable()


def test_every_problem_of_the_settings_is_listed_and_no_key_is_shown(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        ServeSettings(port=70000, slots=0, drain=math.inf, routing_threshold=math.nan, api_key="sécret", host="",
                      roots=(tmp_path / "nothing",), max_body=1)  # fmt: skip
    message = str(caught.value)
    for name in ("port", "slots", "drain", "routing_threshold", "api_key", "host", "roots.0", "max_body"):
        assert f"{name}: " in message
    assert "sécret" not in message and "\n" not in message


def test_an_address_that_cannot_be_bound_is_named() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        taken.listen()
        for host in ("127.0.0.1", "no.such.host.invalid"):
            with pytest.raises(UserError, match=f"{host} port {port}: .*; expected a name or address of this machine"):
                listen(host, port)


def test_what_was_loaded_is_not_collected_while_serving(start: Any) -> None:
    with start({}):
        assert gc.get_freeze_count() > 100_000
    assert gc.get_freeze_count() == 0


@pytest.mark.slow
def test_memory_is_flat_over_a_thousand_loads_and_unloads(
    start: Any, make: Any, tiny_base: Path, tmp_path: Path
) -> None:
    make(tmp_path / "large", 0, rank=64, width=32)
    process = psutil.Process()

    def cycles(count: int) -> int:
        for _ in range(count):
            assert server.post(LOAD, lora_name="passing", lora_path="large").status_code == 200
            assert server.post(UNLOAD, lora_name="passing").status_code == 200
        gc.collect()
        return int(process.memory_info().rss)

    with start({}, base=str(tiny_base), roots=(tmp_path,)) as server:
        before = cycles(100)
        assert cycles(1000) - before < 16 << 20  # adapters that stayed would take 66 MB
        assert server.bank.names == ()


def test_metrics_are_in_the_text_format_and_count(server: Any) -> None:
    series = 'peftune_requests_total{endpoint="/v1/completions",model="a5",status="200"}'
    before = server.metric(series), server.metric('peftune_generation_tokens_total{model="a5"}')
    answer = server.client.completions.create(model="a5", prompt="x y", max_tokens=7, temperature=0)
    server.wait(lambda: server.metric(series) == before[0] + 1)
    assert server.metric('peftune_generation_tokens_total{model="a5"}') == before[1] + answer.usage.completion_tokens
    answer_tokens = answer.usage.completion_tokens
    answer = server.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    line = re.compile(r'# (HELP|TYPE) \w+ .+|\w+(\{\w+="[^"\n]*"(,\w+="[^"\n]*")*\})? [0-9.e+-]+')
    assert [text for text in answer.text.splitlines() if not line.fullmatch(text)] == []
    assert server.metric("peftune_adapters_loaded") == 8 and server.metric("peftune_requests_running") == 0
    for name, labels, count in (
        ("peftune_time_to_first_token_seconds", 'endpoint="/v1/completions",model="a5"', 1),
        ("peftune_request_queue_time_seconds", 'model="a5"', 1),
        ("peftune_inter_token_latency_seconds", 'model="a5"', answer_tokens - 1),
    ):
        assert server.metric(f"{name}_count{{{labels}}}") >= count > 0, name
        assert 0 <= server.metric(f"{name}_sum{{{labels}}}") < 3600  # seconds of all requests so far


def test_the_series_of_an_adapter_go_with_it(server: Any) -> None:
    assert server.post(LOAD, lora_name="passing", lora_path="a1").is_success
    assert server.post(COMPLETIONS, **(SHORT | {"model": "passing", "max_tokens": 5, "ignore_eos": True})).is_success
    server.wait(lambda: server.metric('peftune_requests_total{endpoint="/v1/completions",model="passing"') == 1)
    named = {line.partition("{")[0] for line in server.http.get("/metrics").text.splitlines() if '"passing"' in line}
    assert {"peftune_inter_token_latency_seconds_sum", "peftune_request_queue_time_seconds_sum"} <= named
    assert server.post(UNLOAD, lora_name="passing").is_success
    assert '"passing"' not in server.http.get("/metrics").text


def test_what_fails_in_the_server_tells_the_client_nothing_of_it(
    server: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("a secret of ours")

    with monkeypatch.context() as patched:
        patched.setattr("peftune.serve.openai.prompts.encode_texts", fail)
        answer = server.post(COMPLETIONS, **SHORT)
    assert answer.status_code == 500 and "secret" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"
    assert "a secret of ours" in caplog.text
    assert server.post(COMPLETIONS, **SHORT).status_code == 200


def test_the_page_may_load_its_own_files_and_nothing_else(server: Any) -> None:
    for path, kind in (
        ("/", "text/html"),
        ("/playground/main.js", "text/javascript"),
        ("/playground/style.css", "text/css"),
    ):
        answer = server.http.get(path)
        assert (answer.status_code, answer.headers["content-type"]) == (200, f"{kind}; charset=utf-8")
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    for path in ("/playground/page.py", "/playground/", "/playground/%2e%2e/page.py", "/playground/..%2fpage.py"):
        assert server.http.get(path).status_code == 404
    page = " ".join(file.read_text(encoding="utf-8") for file in FOLDER.iterdir())
    assert set(re.findall(r"https?://[^'\" ]+", page)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(", page)


def test_sigterm_lets_a_stream_end_and_leaves_with_zero(root: Path) -> None:
    command = [sys.executable, "-m", "peftune", "serve", "--base", "builtin:small", "--adapter", f"p={root / 'a0'}"]
    server = subprocess.Popen(
        [*command, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        assert server.stdout is not None
        ready = server.stdout.readline()
        found = re.fullmatch(r"peftune serves builtin:small with 1 adapter on (http://127\.0\.0\.1:\d+)\n", ready)
        assert found, ready
        body = {"model": "p", "prompt": "x", "max_tokens": 200, "temperature": 0, "stream": True}
        with httpx.stream("POST", found[1] + COMPLETIONS, json=body, timeout=30) as stream:
            lines = stream.iter_lines()
            events = [next(lines)]
            server.send_signal(signal.SIGTERM)
            done = threading.Event()
            threading.Thread(target=lambda: (events.extend(lines), done.set())).start()
            refused = httpx.post(found[1] + COMPLETIONS, json=body)
            health = httpx.get(found[1] + "/health")
            assert done.wait(30)
        assert (refused.status_code, health.status_code) == (503, 503)
        assert int(refused.headers["retry-after"]) >= 1 and refused.json()["error"]["code"] == "draining"
        told = [line.removeprefix("data: ") for line in events if line]
        assert told[-1] == "[DONE]"
        choices = [json.loads(event)["choices"][0] for event in told[:-1]]
        assert choices[-1]["finish_reason"] in ("length", "stop") and len(choices) > 100
        assert server.wait(60) == 0
        assert server.stderr is not None and "Traceback" not in server.stderr.read()
    finally:
        server.kill()
        server.communicate()
