"""Several engines behind one address, as an operator runs them: each a process, here on the CPU with a thread each."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest
import torch

from peftune.errors import UserError
from peftune.inference.bank import AdapterBank
from peftune.inference.engine import Stopping
from peftune.inference.request import Request, RequestOutput
from peftune.inference.settings import GenerationSettings
from peftune.model.base import open_base
from peftune.model.decode.batch import DecodeBatch
from peftune.serve.engines.channel import Channel
from peftune.serve.engines.group import EngineGroup, gpu_of_each
from peftune.serve.engines.messages import Assignment, Call, EngineLost, Reply
from peftune.serve.engines.worker import EngineWorker
from peftune.serve.settings import ServeSettings

COMPLETIONS, LOAD, UNLOAD = "/v1/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
COMMAND = [sys.executable, "-m", "peftune", "serve", "--base", "builtin:small", "--port", "0", "--device", "cpu"]
LONG = 120.0  # seconds that nothing takes but where the machine is busy with other things
SEEDED = {"prompt": "def main(", "max_tokens": 12, "ignore_eos": True, "logprobs": 2, "echo": True}


def wait(true: Callable[[], object]) -> None:
    until = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.01)


def engines_of(process: psutil.Process) -> list[psutil.Process]:
    """The processes of its engines, the first one first."""
    found = [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]
    return sorted(found, key=lambda child: child.pid)


def are_gone(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


class Serving:
    """`peftune serve` in a process of its own, with two engines of two slots each; four texts may wait."""

    def __init__(self, root: Path, folder: Path) -> None:
        adapters = [part for name in ("a0", "a1") for part in ("--adapter", f"{name}={root / name}")]
        sizes = ["--data-parallel-size", "2", "--slots", "2", "--queue", "4", "--drain", "100", "--adapter-root"]
        self.folder, self.said = folder, folder / "stderr"
        with self.said.open("w") as err:
            self.process = subprocess.Popen(
                [*COMMAND, *adapters, *sizes, str(root), "--adapter-root", str(folder)],
                stdout=subprocess.PIPE, stderr=err, text=True,
                env=os.environ | {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
            )  # fmt: skip
        assert self.process.stdout is not None
        ready = self.process.stdout.readline()
        found = re.fullmatch(r"peftune serves builtin:small with 2 adapters on (http://127\.0\.0\.1:\d+)\n", ready)
        assert found, self.said.read_text()
        self.http = httpx.Client(base_url=found[1], timeout=LONG)
        self.engines = engines_of(psutil.Process(self.process.pid))

    def post(self, path: str = COMPLETIONS, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def at_once(self, *bodies: dict[str, Any]) -> list[httpx.Response]:
        with ThreadPoolExecutor(len(bodies)) as pool:
            return list(pool.map(lambda body: self.post(**body), bodies))

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    def stream(self, stack: ExitStack, **more: Any) -> Iterator[str]:
        """The events of a text of 300 tokens, which has begun."""
        body = {"model": "a0", "prompt": "x", "stream": True, "max_tokens": 300, "ignore_eos": True} | more
        response = stack.enter_context(self.http.stream("POST", COMPLETIONS, json=body))
        assert response.status_code == 200
        events = (line.removeprefix("data: ") for line in response.iter_lines() if line)
        next(events)
        return events


@pytest.fixture(scope="module")
def two(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    serving = Serving(root, tmp_path_factory.mktemp("two"))
    try:
        yield serving
    finally:
        serving.http.close()
        serving.process.kill()
        serving.process.communicate()


def choice_of(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def test_texts_at_once_are_shared_and_are_to_the_bit_those_of_one_engine(two: Serving, start: Any, root: Path) -> None:
    """Every request twice at once: both engines write each, and one that is alone writes the same."""
    bodies = [SEEDED | {"model": model, "seed": seed} for model, seed in (("a0", 1), ("a1", 2), ("base", 3))]
    before = [engine.cpu_times().user for engine in two.engines]
    pairs = [[choice_of(answer) for answer in two.at_once(body, body)] for body in bodies]
    assert len(two.engines) == 2
    wait(lambda: all(e.cpu_times().user > b for e, b in zip(two.engines, before, strict=True)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with start({name: root / name for name in ("a0", "a1")}) as one:
            assert pairs == [[choice_of(one.post(COMPLETIONS, **body))] * 2 for body in bodies]
            auto = {"model": "auto", "prompt": "def main(self):", "max_tokens": 4, "temperature": 0}
            routed = two.at_once(auto, auto)
            alone = one.post(COMPLETIONS, **auto).json()
    finally:
        torch.set_num_threads(threads)
    assert [answer.json()["routing"] for answer in routed] == [alone["routing"]] * 2
    assert [choice_of(answer) for answer in routed] == alone["choices"] * 2
    assert "computing in fp32 on CPU, 2 engines" in two.said.read_text()


def test_scores_settings_and_refusals_are_those_of_one_engine(two: Serving) -> None:
    scored = choice_of(two.post(model="a0", prompt="a b c", max_tokens=0, logprobs=1, echo=True))
    assert len(scored["logprobs"]["tokens"]) > 2 and scored["text"] == "a b c"
    assert two.post(model="a0", prompt="x" * 5000).json()["error"]["code"] == "context_length_exceeded"
    refused = two.post(model="a0", prompt="x", logit_bias={"999999": 1.0})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "logit_bias")
    assert two.post(model="nobody", prompt="x").status_code == 404
    cards = {card["id"]: card for card in two.http.get("/v1/models").json()["data"]}
    assert set(cards) == {"builtin:small", "a0", "a1"} and cards["a1"]["rank"] == 3


def test_the_queue_is_one_for_all_and_who_leaves_makes_room(two: Serving) -> None:
    cancelled = two.metric("peftune_cancelled_total")
    with ExitStack() as stack:
        streams = [two.stream(stack) for _ in range(4)]
        assert len(streams) == two.metric("peftune_requests_running ") == two.metric("peftune_slots ")
        short = {"model": "a1", "prompt": "x", "max_tokens": 1}
        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(two.post, **short) for _ in range(4)]
            wait(lambda: two.metric("peftune_requests_waiting ") == 4)
            refused = two.post(**short)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert int(refused.headers["retry-after"]) >= 1
            stack.close()  # the clients of the streams leave
            assert {answer.result().status_code for answer in waiting} == {200}
    wait(lambda: two.metric("peftune_cancelled_total") == cancelled + 4)
    assert two.metric("peftune_requests_running ") == two.metric("peftune_requests_waiting ") == 0
    assert two.metric("peftune_request_queue_time_seconds_sum") > 0


def test_adapters_come_and_go_in_every_engine_or_in_none(two: Serving, make: Any) -> None:
    greedy = {"prompt": "x", "max_tokens": 12, "temperature": 0}
    old, other = (choice_of(two.post(model=name, **greedy)) for name in ("a0", "a1"))
    assert old != other

    def everywhere(model: str) -> list[Any]:
        return [choice_of(answer) for answer in two.at_once(*[greedy | {"model": model}] * 4)]

    assert two.post(LOAD, lora_name="new", lora_path="a0").text.startswith("Success")
    assert everywhere("new") == [old] * 4
    assert two.post(LOAD, lora_name="new", lora_path="a1", load_inplace=True).text.startswith("Success")
    assert everywhere("new") == [other] * 4
    narrow = make(two.folder / "narrow", 9, width=32)
    refused = two.post(LOAD, lora_name="x", lora_path=str(narrow))
    assert refused.status_code == 400 and "narrow" in refused.json()["error"]["message"]
    if hasattr(psutil.Process, "rlimit"):  # Linux: the second engine alone can open no more
        last = two.engines[1]
        limit = last.rlimit(psutil.RLIMIT_NOFILE)
        last.rlimit(psutil.RLIMIT_NOFILE, (0, limit[1]))
        try:
            answers = [two.post(LOAD, lora_name=name, lora_path="a0", load_inplace=True) for name in ("x", "new")]
        finally:
            last.rlimit(psutil.RLIMIT_NOFILE, limit)
        assert not any(answer.is_success for answer in answers)
        assert everywhere("new") == [other] * 4  # nowhere replaced
    assert [answer.status_code for answer in two.at_once(*[greedy | {"model": "x"}] * 2)] == [404, 404]
    assert two.post(LOAD, lora_name="x", lora_path="a0").text.startswith("Success")
    assert everywhere("x") == [old] * 4
    for name in ("x", "new"):
        assert two.post(UNLOAD, lora_name=name).text.startswith("Success")
        assert two.post(model=name, **greedy).status_code == 404
    assert two.metric("peftune_adapters_loaded ") == 2


def test_engines_leave_signals_to_the_server_and_one_that_dies_takes_only_its_own_requests(two: Serving) -> None:
    """The last test of this server: one engine is killed, then the server drains with the other."""
    for engine in two.engines:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            engine.send_signal(number)
    with ExitStack() as stack:
        streams = [two.stream(stack, seed=number) for number in range(4)]
        two.engines[0].kill()
        endings = [[*events][-1] for events in streams]
    assert sorted(ending == "[DONE]" for ending in endings) == [False, False, True, True]
    lost = [json.loads(ending)["error"] for ending in endings if ending != "[DONE]"]
    assert {error["code"] for error in lost} == {"internal_error"}
    said = r"engine [01] was killed by SIGKILL; its requests have failed, and 1 of 2 go on"
    assert len(re.findall(said, two.said.read_text())) == 1
    assert two.http.get("/health").status_code == 200
    assert two.metric("peftune_engines ") == 1 and two.metric("peftune_slots ") == 2
    assert {answer.status_code for answer in two.at_once(*[SEEDED | {"model": "a1"}] * 4)} == {200}
    assert two.post(LOAD, lora_name="late", lora_path="a1").text.startswith("Success")

    with ExitStack() as stack:
        events = two.stream(stack, model="late")
        two.process.send_signal(signal.SIGTERM)
        wait(lambda: "draining" in two.said.read_text())
        assert two.post(model="a0", prompt="x").json()["error"]["code"] == "draining"
        assert [*events][-1] == "[DONE]"
    assert two.process.wait(LONG) == 0
    wait(lambda: are_gone(two.engines))
    assert "Traceback" not in two.said.read_text()


def test_engines_end_when_the_server_is_killed_though_they_are_still_loading() -> None:
    server = subprocess.Popen([*COMMAND, "--data-parallel-size", "2"], stdout=subprocess.DEVNULL)
    try:
        wait(lambda: len(engines_of(psutil.Process(server.pid))) == 2)
        engines = engines_of(psutil.Process(server.pid))
    finally:
        server.kill()
        server.wait()
    wait(lambda: are_gone(engines))


def settings(count: int) -> ServeSettings:
    return ServeSettings(data_parallel_size=count, slots=2, queue=4)


def test_an_adapter_that_is_broken_is_told_as_by_one_engine_and_no_process_stays(make: Any, tmp_path: Path) -> None:
    broken, base = make(tmp_path / "narrow", 1, width=32), open_base("builtin:small")
    with pytest.raises(UserError, match=r"lora_A.weight has shape .2, 32., this base needs"):
        EngineGroup(base, {"narrow": broken}, "fp32", settings(1), "cpu").loaded()
    assert engines_of(psutil.Process()) == []


def test_an_engine_that_is_killed_while_it_loads_ends_the_others() -> None:
    group = EngineGroup(open_base("builtin:small"), {}, "fp32", settings(2), "cpu")
    engines_of(psutil.Process())[1].kill()
    with pytest.raises(UserError, match=r"engine [01] was killed by SIGKILL while it loaded the model.* for 2 copies"):
        group.loaded()
    assert engines_of(psutil.Process()) == []


def test_with_no_engine_left_nothing_is_taken_any_more(capfd: pytest.CaptureFixture[str]) -> None:
    outputs: list[RequestOutput] = []
    request = Request((1, 2, 3), None, GenerationSettings(max_new_tokens=9))
    group = EngineGroup(open_base("builtin:small"), {}, "fp32", settings(1), "cpu")
    group._serving = True  # it only loads yet, and what it is asked for waits in the pipe
    group.submit(request, outputs.append)
    future = group.route((1, 2, 3), (), None)
    assert (group.load.running, group.load.waiting, group.load.routing) == (1, 1, 1)
    engines_of(psutil.Process())[0].kill()
    with pytest.raises(EngineLost, match="engine 0 was killed by SIGKILL"):
        future.result(LONG)
    (output,) = outputs
    assert output.finish_reason == "error" and "killed by SIGKILL" in output.error
    assert group.failed and group.load.engines == group.load.running == group.load.waiting == group.load.slots == 0
    for call in (lambda: group.submit(request, print), lambda: group.route((1,), (), None)):
        with pytest.raises(Stopping, match="no engine is left"):
            call()
    assert "killed by SIGKILL; its requests have failed, and none is left: start" in capfd.readouterr().err


def test_an_engine_that_has_failed_ends_its_process_and_leaves_the_rest_to_the_server(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was running ends with an error, what waited is not called cancelled: the server tells why it is not done."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    bank, ended = AdapterBank(str(tiny_base), device="cpu"), Future[int]()
    here, there = multiprocessing.Pipe()
    gone = threading.Event()
    channel = Channel(there, print, gone.set)
    assigned = Assignment((tiny_base, ""), (), "fp32", 1, 4, None, 1, "quiet")
    monkeypatch.setattr("os._exit", lambda code: ended.set_result(code))
    monkeypatch.setattr(DecodeBatch, "prefill", full)
    worker = EngineWorker(bank, assigned, channel)
    monkeypatch.setattr(type(bank.spec), "kv_cache", full)
    request = Request((1, 2), None, GenerationSettings(max_new_tokens=3))
    with worker._engine._changed:  # all are there before the first step
        for number in range(3):
            worker.answer(Call(number, "submit", (request,)))
    assert ended.result(LONG) == 1
    replies: list[Reply] = []
    while here.poll():
        replies += here.recv()
    assert [(reply.number, reply.value.finish_reason) for reply in replies] == [(0, "error")]
    here.close()
    assert gone.wait(LONG)


@pytest.mark.parametrize(
    ("visible", "count", "found"),
    [(None, 2, ["0", "1"]), ("3,GPU-8f2,1", 2, ["3", "GPU-8f2"]), ("3,GPU-8f2,1", 1, ["3"])],
)
def test_every_process_sees_a_gpu_of_its_own(
    visible: str | None, count: int, found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_of_each("auto", count) == found
    assert gpu_of_each("cpu", 5) == [None] * 5
    with pytest.raises(UserError, match="data_parallel_size is 4, and torch finds 3 GPUs here; expected at most one"):
        gpu_of_each("cuda", 4)
