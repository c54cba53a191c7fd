"""A real server on a free port, in a thread: builtin:small and eight small random adapters."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch
from openai import OpenAI
from safetensors.torch import save_file

from peftune.serve.server import Server, listen, make_service
from peftune.serve.settings import ServeSettings

NAMES = [f"a{number}" for number in range(8)]


def make_adapter(directory: Path, seed: int, rank: int = 2, width: int = 256, **provenance: Any) -> Path:
    """A plain PEFT adapter of c_attn in the first two blocks, strong enough to change every text."""
    directory.mkdir(parents=True)
    chance = torch.Generator().manual_seed(seed)
    tensors = {}
    for block in (0, 1):
        at = f"base_model.model.transformer.h.{block}.attn.c_attn"
        tensors[f"{at}.lora_A.weight"] = torch.randn(rank, width, generator=chance) * 0.2
        tensors[f"{at}.lora_B.weight"] = torch.randn(3 * width, rank, generator=chance) * 0.2
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0,
        "target_modules": ["c_attn"], "layers_to_transform": [0, 1], "fan_in_fan_out": True, "bias": "none",
        "base_model_name_or_path": "builtin:small",
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config))
    if provenance:
        (directory / "peftune.json").write_text(json.dumps(provenance))
    return directory


class Running:
    """A server that answers; `client` is OpenAI's, `http` speaks plainly."""

    def __init__(self, server: Server) -> None:
        self.service = server._service
        self.engine = self.service.engine
        self.bank = self.service.bank
        self.server = server
        self.url = server.url
        self.address = server._listener.getsockname()
        key = self.service.settings.api_key
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key=key or "none", max_retries=0)
        self.http = httpx.Client(base_url=self.url, timeout=30)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def stream(self, receive_buffer: int | None = None, **fields: Any) -> socket.socket:
        """A connection on which a stream of 400 tokens has begun, unread."""
        asked = {"model": "a0", "prompt": "x", "stream": True, "max_tokens": 400, "temperature": 0} | fields
        connection = socket.socket()
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(10)
        connection.connect(self.address)
        connection.sendall(self.request(json.dumps(asked).encode()))
        assert b" 200 " in connection.recv(200)
        return connection

    def request(self, body: bytes = b"", headers: str = "") -> bytes:
        """A request for completions as bytes; without `headers` with the length of the body."""
        headers = headers or f"Content-Length: {len(body)}\r\n"
        start = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}\r\n"
        return start.encode() + body

    def metric(self, start: str) -> float:
        """The sum of all series that begin so."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(start))

    def wait(self, true: Callable[[], bool], seconds: float = 5.0) -> None:
        until = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < until, "it did not come to pass"
            time.sleep(0.01)


@contextmanager
def serving(adapters: dict[str, Path], base: str = "builtin:small", **settings: Any) -> Iterator[Running]:
    chosen = ServeSettings(port=0, **settings)
    with listen(chosen.host, chosen.port) as listener:
        server = Server(make_service(base, adapters, "fp32", chosen), listener, lambda line: None)
        thread = threading.Thread(target=server.run)
        thread.start()
        until = time.monotonic() + 20
        while not server.started and time.monotonic() < until:
            time.sleep(0.01)
        running = Running(server)
        try:
            yield running
        finally:
            running.client.close()
            running.http.close()
            server.drain()
            thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of eight adapters, one of them trained on chat as its provenance says."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(NAMES):
        make_adapter(root / name, seed, rank=2 + seed % 3, **({"chat": True} if name == "a7" else {}))
    return root


@pytest.fixture(scope="session")
def server(root: Path) -> Iterator[Running]:
    """Shared by the tests that leave it as they found it."""
    with serving({name: root / name for name in NAMES}, roots=(root,), slots=16) as running:
        yield running


@pytest.fixture(scope="session")
def start() -> Callable[..., Any]:
    """`with start(adapters, **settings) as running`: a server of one's own."""
    return serving


@pytest.fixture(scope="session")
def make() -> Callable[..., Path]:
    return make_adapter
