"""`peftune launch`: public interfaces alone, one address to listen on; `peftune configs` writes out what it reads."""

from __future__ import annotations

import ast
import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from peftune.cli import main
from peftune.cli.launcher import configuration, ranks, stop_signals
from peftune.cli.launcher.launch import configs
from peftune.config.shipped import FOLDERS, shipped
from peftune.errors import UserError

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "peftune", "launch"]


@pytest.mark.parametrize("module", [configuration, ranks, stop_signals], ids=lambda module: module.__name__)
def test_no_private_name_of_torch_or_accelerate_is_used(module: object) -> None:
    """`os._exit` is public in spite of its name; `self._…` is our own."""
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))  # type: ignore[attr-defined]
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not (
            isinstance(node.value, ast.Name) and node.value.id in ("self", "os")
        ):
            names.append(node.attr)
    assert [name for name in names if name.startswith("_")] == []
    assert "setattr(" not in ast.unparse(tree), "nothing of theirs is replaced"


@pytest.mark.slow
def test_nothing_on_one_machine_listens_beyond_loopback(start: Callable[..., subprocess.Popen[str]]) -> None:
    """Torch's own store would listen on all addresses."""
    job = start([*LAUNCH, "cpu-2", "recipe", "seconds=3"])
    assert job.stdout is not None
    for _ in range(2):
        assert job.stdout.readline().startswith("rank ")
    launcher = psutil.Process(job.pid)
    listening = {
        connection.laddr.ip
        for process in [launcher, *launcher.children(recursive=True)]
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}
    assert job.wait(60) == 0


@pytest.mark.parametrize(
    ("address", "port", "listens_on"),
    [
        ("127.0.0.1", 0, "127.0.0.1"),
        ("127.0.0.1", 45_917, "0.0.0.0"),  # several machines, whose /etc/hosts calls the first one so
        ("no-such-pod.invalid", 45_917, "0.0.0.0"),
        ("192.0.2.1", 45_917, "0.0.0.0"),  # behind a NAT
    ],
)
def test_the_store_listens_where_other_machines_can_reach_it(address: str, port: int, listens_on: str) -> None:
    with ranks.Rendezvous(address, port)._listen() as listener:
        assert listener.getsockname()[0] == listens_on


@pytest.mark.parametrize(
    ("codes", "stopped", "code", "reason"),
    [
        ({}, None, 0, ""),
        ({0: 4, 1: -9}, None, 4, ""),
        ({0: 3, 1: 3}, None, 3, ""),  # the launcher of another machine has the signal
        ({0: 3, 1: -9}, None, 1, "rank 1 on HOST was killed by SIGKILL (often for want of memory)"),
        ({0: -6, 1: -9}, None, 1, "rank 1 on HOST was killed by SIGKILL (often for want of memory)"),
        ({0: 1, 1: -6}, None, 1, "rank 0 on HOST failed, see above"),  # the other aborted when it found it gone
        ({0: -6, 1: -6}, None, 1, "ranks 0, 1 on HOST were killed by SIGABRT"),
        ({0: 3, 1: -9}, "SIGTERM", 3, ""),
        ({0: -15, 1: -15}, "SIGINT", 3, "SIGINT came before training had begun or after its end"),
        ({0: 143, 1: 143}, "SIGTERM", 3, ""),  # while they were importing; the first has said so
        ({0: 143, 1: 1}, "SIGTERM", 3, ""),  # the other found it gone
        ({0: 1, 1: 1}, None, 1, "ranks 0, 1 on HOST failed, see above"),
        ({1: 77}, None, 1, "rank 1 on HOST ended with [77]"),
    ],
)
def test_the_exit_code_is_the_one_that_says_most(
    codes: dict[int, int], stopped: str | None, code: int, reason: str
) -> None:
    stop = SimpleNamespace(first=stopped, grace=1)
    assert ranks.verdict(codes, stop) == (code, reason.replace("HOST", socket.gethostname()))  # type: ignore[arg-type]


def test_an_installed_command_starts_ranks_in_an_empty_directory(start: Callable[..., subprocess.Popen[str]]) -> None:
    job = start([*LAUNCH, "cpu-2", "recipe", "--processes", "1"])
    output, errors = job.communicate(timeout=60)
    assert (job.returncode, output) == (0, "rank 0 of 1\n"), errors


def test_configurations_are_written_out_and_nothing_is_overwritten(tmp_path: Path) -> None:
    configs(tmp_path / "my")
    for folder in FOLDERS:
        copies = {path.name: path.read_bytes() for path in (tmp_path / "my" / folder).iterdir()}
        assert copies == {path.name: path.read_bytes() for path in shipped(folder).iterdir()}
    with pytest.raises(UserError, match="already there"):
        configs(tmp_path / "my")


def test_a_configuration_of_ones_own_names_its_deepspeed_file_beside_it(tmp_path: Path) -> None:
    configs(tmp_path)
    found = configuration.read(str(tmp_path / "accelerate_configs" / "cpu-2-zero3.yaml"), None, 1)
    assert found.arguments["deepspeed_config_file"] == tmp_path / "ds_configs" / "zero3.json"


def test_reading_a_configuration_changes_nothing_and_tells_what_the_ranks_shall_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = dict(os.environ)
    found = configuration.read("cpu-2", None, 1)
    assert dict(os.environ) == before
    assert found.environment["CUDA_VISIBLE_DEVICES"] == "" and int(found.environment["OMP_NUM_THREADS"]) >= 1


@pytest.mark.slow
def test_the_wheel_holds_what_users_start(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(ROOT),
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
    ]
    subprocess.run(build, check=True, capture_output=True, timeout=180)
    (wheel,) = tmp_path.glob("peftune-*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"peftune/configs/{folder}/{path.name}" for folder in FOLDERS for path in shipped(folder).iterdir()}
    assert wanted <= inside


@pytest.mark.parametrize("option", ["--quiet", "--verbose"])
def test_ranks_say_as_much_as_their_launcher(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def become(target: list[str]) -> None:
        started.append(target)
        raise UserError("enough")

    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
        monkeypatch.setenv(name, "warning")
    monkeypatch.setattr(configuration.LaunchOptions, "apply", lambda _: None)
    monkeypatch.setattr(configuration, "become_the_rank", become)
    assert main.run(["launch", "cpu", "r.yaml", option, "optim.lr=1"]) == 2
    assert started == [["-m", "peftune", "train", option, "r.yaml", "optim.lr=1"]]
