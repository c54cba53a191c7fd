"""The verbs `launch` and `configs`: start the ranks of a run, and write out the files that say how.

`peftune launch` calls Accelerate's launcher in its own process, which calls torch's. Only their public interfaces are
used: `launch_command`, torchrun's options (PET_* in the environment for those that Accelerate does not have) and
`ChildFailedError`. What is added, because neither has it:

- the exit code of the ranks (plain: 1 for every failure, under a traceback), and one line that names a killed rank;
- a signal to the launcher gives the ranks PEFTUNE_GRACE seconds to save, and a second one does not orphan them;
- a restart only where it can help: after a crash, not after 2, 3 or 4, where the next attempt would end in the same way;
- the number of ranks from the number of GPUs, a share of the cores for each rank, and a wait for a slow first machine.

The rendezvous is torch's `static` one: machines have fixed numbers, and nothing that comes over the network is unpickled
(with `c10d` the rendezvous state is).
"""

from __future__ import annotations

import errno
import gc
import ipaddress
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import yaml

from peftune.config.shipped import FOLDERS, shipped
from peftune.errors import CheckFailed, Interrupted, PeftuneError, RankLost, UserError, first_line

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # PyTorch lists it nowhere

AGAIN = "start the same command again, it goes on from the last checkpoint"
# Codes whose reason a rank has printed; where several occur, the first of these is the launcher's own.
EXPLAINED = (UserError.exit_code, CheckFailed.exit_code, Interrupted.exit_code)
STOP_SIGNALS = [signal.Signals[n] for n in ("SIGTERM", "SIGINT", "SIGHUP") if n in signal.Signals.__members__]


def configs(directory: Annotated[Path, typer.Argument(help="Directory to write them to; made where missing.")]) -> None:
    """Write out the configurations and recipes that come with peftune, to read and to change.

    Example:  peftune configs my
    """
    targets = {name: directory / name for name in FOLDERS}
    if found := [str(path) for path in targets.values() if path.exists()]:
        raise UserError(f"{', '.join(found)}: already there; name another directory")
    for name, path in targets.items():
        shutil.copytree(shipped(name), path)
        typer.echo(f"{path}: {', '.join(sorted(file.name for file in path.iterdir()))}")


def launch(
    config: Annotated[str, typer.Argument(help="A name, such as ddp or zero2, or your own Accelerate YAML file.")],
    recipe: Annotated[str, typer.Argument(help="YAML file; docs/recipe.md lists every key.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Win over the recipe.")] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Ranks on each machine. Default: what CONFIG says, or one for each GPU.")
    ] = None,
    max_restarts: Annotated[int, typer.Option(min=0, help="Starts after a crash, from the last checkpoint.")] = 0,
    nodes: Annotated[int, typer.Option(min=1, help="Machines; start the same command on each.")] = 1,
    node_rank: Annotated[int | None, typer.Option(min=0, help="Which of them this is; 0 writes the adapter.")] = None,
    master_addr: Annotated[str | None, typer.Option(help="Name or address of machine 0.")] = None,
    master_port: Annotated[int, typer.Option(min=1, help="A free port of machine 0.")] = 29400,
    program: Annotated[
        Path | None,
        typer.Option(envvar="PEFTUNE_RANK_PROGRAM", show_default=False, help="Python file to run instead of `train`."),
    ] = None,
) -> int:
    """Train on several ranks, on one machine or many; the exit code is that of the ranks.

    Example:  peftune launch ddp recipe.yaml --processes 4

    docs/many-ranks.md says which configuration to take, and how to start ranks with plain torchrun or accelerate.
    """
    stop = StopSignals(_seconds("PEFTUNE_GRACE", 110))
    if "LOGLEVEL" not in os.environ:
        # What the libraries say about a failed rank, or a peer that has gone, is said here in one line.
        logging.disable(logging.ERROR)
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    path = _find_config(config, nodes)
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    ranks = _ranks_per_node(path.name, settings, processes, nodes)
    if nodes > 1 and (node_rank is None or master_addr is None or node_rank >= nodes):
        raise UserError(f"{nodes} machines need --master-addr, and a --node-rank from 0 to {nodes - 1} on each")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // ranks)))
    target = [*([str(program)] if program else ["-m", "peftune", "train"]), recipe, *(overrides or [])]
    if _starts_one_process(settings):
        _become_the_rank(settings, target)
    if nodes == 1:
        node_rank, master_addr, master_port = 0, "127.0.0.1", 0  # 0: a free port, since runs may share a machine
    address, join = str(master_addr), _seconds("PEFTUNE_JOIN", 900)
    _use_interface_towards(address)
    options = {"config_file": path, "num_processes": ranks * nodes, "num_machines": nodes, "machine_rank": node_rank}
    options |= {"rdzv_backend": "static", "rdzv_conf": f"timeout={join}", "main_process_ip": address}
    options |= {"main_process_port": 0}  # unused, since `--same_network` leaves the endpoint to PET_RDZV_ENDPOINT
    if file := (settings.get("deepspeed_config") or {}).get("deepspeed_config_file"):
        options |= {"deepspeed_config_file": _find_deepspeed_file(file, path)}
        options |= {"deepspeed_multinode_launcher": "standard"}  # else DeepSpeed starts the other machines over ssh
    argv = ["--same_network", *(part for name, value in options.items() for part in (f"--{name}", str(value))), *target]
    for attempt in range(max_restarts + 1):
        store = _await_store(address, master_port, join) if node_rank else _open_store(address, master_port, nodes > 1)
        code, reason = verdict(_run_ranks(argv), stop)
        if code != PeftuneError.exit_code or stop.name or attempt == max_restarts:
            break
        _say(f"{reason}; restart {attempt + 1} of {max_restarts}")
        if isinstance(store, socket.socket):
            _wait_for_end_of(store)
        del store
        gc.collect()  # torch's agent, which is part of a cycle of references, holds the store as well
    if reason:
        _say(f"{reason}; {AGAIN}")
    return code


class StopSignals:
    """Passes SIGTERM, SIGINT and SIGHUP on to the ranks, and kills those that have not ended `grace` seconds later.

    A thread does it, because torch waits for other machines in C++ code, during which Python runs no signal handler.
    Torch's own handling, which is switched off, would lose the exit codes and orphan the ranks at a second signal.
    """

    def __init__(self, grace: int) -> None:
        self.grace = grace
        self.name: str | None = None  # of the first signal
        os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # torchrun's --signals-to-handle
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(writer.fileno())
        self._sockets = reader, writer  # kept open
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            number = signal.Signals(self._sockets[0].recv(1)[0])
            if number not in STOP_SIGNALS:
                continue
            ranks = _ranks()
            if self.name is None and not ranks:
                _say(f"{number.name} before any rank had started; {AGAIN}")
                os._exit(Interrupted.exit_code)
            if self.name is None:
                self.name, number = number.name, signal.SIGTERM  # a rank that still imports ends by it in silence
                timer = threading.Timer(self.grace, lambda: [_send(rank, signal.SIGKILL) for rank in _ranks()])
                timer.daemon = True
                timer.start()
            for rank in ranks:
                _send(rank, number)


def verdict(codes: dict[int, int], stop: StopSignals) -> tuple[int, str]:
    """The exit code that says most about ranks that ended with `codes`, and the reason where no rank has printed it."""
    killed = {rank: -code for rank, code in codes.items() if code < 0 and -code not in STOP_SIGNALS}
    failed = [rank for rank, code in codes.items() if code == PeftuneError.exit_code]
    for code in EXPLAINED:
        # Without a signal to the launcher, a rank that stopped may have done so because of another one's failure.
        alone = stop.name or not (killed or failed)
        if code in codes.values() and (code != Interrupted.exit_code or alone):
            return code, ""
    host = socket.gethostname()
    if killed and stop.name:
        late = f"had not ended {stop.grace} s after {stop.name} (PEFTUNE_GRACE=SECONDS gives more time)"
        return RankLost.exit_code, f"{_named(killed)} on {host} {late}"
    if killed:
        name = signal.Signals(min(killed.values())).name
        hint = " (often for want of memory)" if name == "SIGKILL" else ""
        return RankLost.exit_code, f"{_named(killed)} on {host} was killed by {name}{hint}"
    if failed:
        return PeftuneError.exit_code, f"{_named(failed)} on {host} failed, see above"
    if codes and stop.name:
        return Interrupted.exit_code, f"{stop.name} came before training had begun or after its end"
    if codes:
        return PeftuneError.exit_code, f"{_named(codes)} on {host} ended with {sorted(set(codes.values()))}"
    return 0, ""


def _run_ranks(argv: list[str]) -> dict[int, int]:
    """Run Accelerate's launcher; exit codes by rank, of those that did not end with 0 (negative: a signal)."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args(argv))
    except ChildFailedError as error:
        failures = error.failures.values()
        first = min(failure.timestamp for failure in failures)
        # Without the ranks that torch ended because another had failed.
        own = {
            rank: failure.exitcode
            for rank, failure in error.failures.items()
            if failure.exitcode in EXPLAINED or failure.timestamp <= first + 5
        }
        return {rank: code for rank, code in own.items() if code != -signal.SIGTERM} or own
    except DistError as error:
        raise RankLost(f"the machines did not meet: {first_line(error)}; {AGAIN}") from None
    except (AssertionError, ConnectionError, FileNotFoundError, ImportError, ValueError) as error:
        raise UserError(first_line(error)) from error  # Accelerate's own checks of options and configuration
    return {}


def _find_config(name: str, nodes: int) -> Path:
    folder = shipped("accelerate_configs")
    if "/" in name or name.endswith((".yaml", ".yml")):
        candidates = [Path(name)]
    else:
        candidates = [folder / f"multi-node-{name}.yaml"] * (nodes > 1) + [folder / f"{name}.yaml"]
    for path in candidates:
        if path.is_file():
            return path
    known = " ".join(sorted(path.stem for path in folder.glob("*.yaml") if not path.stem.startswith("multi-node-")))
    raise UserError(f"no configuration {name}; there are: {known}")


def _find_deepspeed_file(name: str, config: Path) -> Path:
    """The file that a configuration names: from here, from the folder above the configuration's, or the shipped one."""
    candidates = (Path(name), config.resolve().parents[1] / name, shipped(name))
    for path in candidates:
        if path.is_file():
            return path.resolve()
    raise UserError(f"{config} names {name}, which is neither here nor in {config.resolve().parents[1]}")


def _ranks_per_node(name: str, settings: dict[str, Any], processes: int | None, nodes: int) -> int:
    on_cpu = bool(settings.get("use_cpu"))
    gpus = 0
    if on_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        import torch

        if not (gpus := torch.cuda.device_count()):
            raise UserError(f"{name} is for GPUs and torch finds none here; cpu.yaml and cpu-2*.yaml need none")
    if _starts_one_process(settings):
        if (total := (processes or 1) * nodes) > 1:
            other = "cpu-2.yaml and ddp.yaml start as many as you say"
            raise UserError(f"{name} starts one process, so not {total}; {other}")
        return 1
    return processes or gpus or max(1, int(settings.get("num_processes") or 1) // nodes)


def _starts_one_process(settings: dict[str, Any]) -> bool:
    return settings.get("distributed_type") in ("NO", False)  # unquoted, YAML reads NO as false


def _become_the_rank(settings: dict[str, Any], target: list[str]) -> NoReturn:
    """One process needs no launcher: it takes this one's place, so that signals and exit code are its own."""
    os.environ["ACCELERATE_USE_CPU"] = str(bool(settings.get("use_cpu"))).lower()
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *target])


def _open_store(address: str, port: int, many_nodes: bool) -> TCPStore:
    """The store through which launchers and ranks find each other, and its endpoint in torchrun's --rdzv-endpoint.

    Torch's agent would open one that listens on all addresses of the machine; it takes this one, which is there already.
    This one listens on `address` alone, except where other machines know this one by an address that is not its own
    (behind a NAT) or that is loopback here (as in Debian's /etc/hosts).
    """
    from torch.distributed import TCPStore

    try:
        family, _, _, _, found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        host = "" if many_nodes and ipaddress.ip_address(found[0]).is_loopback else str(found[0])
        try:
            listener = socket.create_server((host, port), family=family)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            listener = socket.create_server(("", port), family=family)
    except OSError as error:
        raise UserError(f"cannot listen on {address}:{port}: {error}") from None
    port = listener.getsockname()[1]
    os.environ["PET_RDZV_ENDPOINT"] = f"{address}:{port}"
    return TCPStore(
        address, port, is_master=True, wait_for_workers=False, multi_tenant=True, master_listen_fd=listener.detach()
    )


def _await_store(address: str, port: int, seconds: int) -> socket.socket:
    """A connection to the store of machine 0, made as soon as it listens; torch would wait in silence."""
    os.environ["PET_RDZV_ENDPOINT"] = f"{address}:{port}"
    until, report_at = time.monotonic() + seconds, time.monotonic() + 10
    while True:
        try:
            return socket.create_connection((address, port), timeout=5)
        except OSError as error:
            reason = error
        if time.monotonic() > until:
            raise RankLost(
                f"no launcher of machine 0 at {address}:{port} within {seconds} s ({reason}); PEFTUNE_JOIN=SECONDS "
                "waits longer, and a firewall between the machines must let every port through"
            )
        if time.monotonic() > report_at:
            _say(f"waiting for machine 0 at {address}:{port} ({reason})")
            report_at = time.monotonic() + 60
        time.sleep(0.5)


def _wait_for_end_of(store: socket.socket) -> None:
    """Return when machine 0's launcher has closed its store, so that nobody joins the attempt that has just failed."""
    store.settimeout(60)
    with store, suppress(OSError):
        store.recv(1)


def _use_interface_towards(address: str) -> None:
    """Without this gloo takes the interface of the host's name: often loopback on many machines, or not on one."""
    import psutil

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect((address, 9))  # sends nothing
        own = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if any(entry.address == own for entry in addresses):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _ranks() -> list[Any]:
    import psutil

    return list(psutil.Process().children())


def _send(process: Any, number: int) -> None:
    import psutil

    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _cores() -> int:
    """Cores that this process may use, hyperthreads not counted."""
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, psutil.cpu_count(logical=False) or usable)


def _seconds(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdigit():
        raise UserError(f"{variable} is {text!r}; expected a number of seconds")
    return int(text)


def _named(ranks: Collection[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, sorted(ranks)))}"


def _say(text: str) -> None:
    typer.echo(f"peftune: {text}", err=True)
