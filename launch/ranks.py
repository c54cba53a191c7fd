#!/usr/bin/env python3
"""Start the ranks of a run as `accelerate launch` does, and end with the exit code that the ranks ended with.

    python launch/ranks.py --config_file accelerate_configs/ddp.yaml -m peftune train RECIPE [key=value ...]

takes the arguments of `accelerate launch` and hands them to it. What it adds:

- the exit code is the ranks' own (2 input at fault, 3 stopped with a checkpoint saved, 4 a check failed), without a
  traceback of the launcher; a rank that was killed is named in one line, and the code is 1;
- SIGTERM, SIGINT and SIGHUP reach every rank, which then has PEFTUNE_GRACE seconds (110) to save and to end;
- `--max_restarts N` starts ranks again after a crash, never after 2, 3 or 4, where it would end in the same way;
- without `--num_processes`, ranks of a GPU configuration are as many as this machine has GPUs;
- a DeepSpeed file named in the configuration is found from any directory, and every rank gets its share of the cores.

LOGLEVEL=INFO (or WARNING) shows what Accelerate and torch say meanwhile.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from outcome import AGAIN, BAD_INPUT, FAILED, STOP_SIGNALS, STOPPED, Outcome, say, told


def main() -> NoReturn:
    for number in STOP_SIGNALS:
        signal.signal(number, _nothing_started)
    if sys.argv[1:] in ([], ["--help"], ["-h"]):
        print(__doc__)
        sys.exit(0 if sys.argv[1:] else BAD_INPUT)
    sys.exit(launch(sys.argv[1:]))


def launch(argv: list[str]) -> int:
    """Run Accelerate's launcher in this process; the exit code that tells most about its ranks."""
    outcome = Outcome(grace=_seconds("PEFTUNE_GRACE", 110))
    if "LOGLEVEL" not in os.environ:
        # What the libraries say about a failed rank, or a peer that has gone, is said here in one line.
        logging.disable(logging.ERROR)
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from accelerate.commands import launch as accelerate
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from watching_agent import MachineLost, watch

    watch(outcome)
    accelerate.simple_launcher = _become_the_rank
    try:
        accelerate.launch_command(completed(accelerate.launch_command_parser().parse_args(argv)))
    except (ChildFailedError, SignalException):
        pass
    except MachineLost as error:
        say(f"{error}; {AGAIN}")
        return FAILED
    except RendezvousError as error:
        if not outcome.codes:
            say(f"the machines did not meet, or one has left for good: {_first_line(error)}")
        return told(outcome) or FAILED
    except (AssertionError, ConnectionError, FileNotFoundError, ImportError, ValueError) as error:
        if outcome.codes:
            raise
        refuse(_first_line(error))  # Accelerate's own checks of arguments and configuration
    return told(outcome)


def completed(args: argparse.Namespace) -> argparse.Namespace:
    """Accelerate's arguments with what it would ask for, or guess wrongly, on this machine."""
    import torch
    import yaml

    if args.config_file is None:
        refuse("--config_file is missing; accelerate_configs/README.md lists them")
    path = Path(args.config_file)
    if not path.is_file():
        refuse(f"{path}: no such configuration; accelerate_configs/README.md lists them")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    on_cpu = bool(config.get("use_cpu"))
    if on_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    machines = args.num_machines or config.get("num_machines") or 1
    ranks = args.num_processes or config.get("num_processes")
    several = config.get("distributed_type") not in ("NO", False)  # unquoted, YAML reads NO as false
    if not on_cpu and not torch.cuda.is_available():
        refuse(f"{path.name} is for GPUs and torch finds none here; cpu.yaml and cpu-2*.yaml need none")
    if args.num_processes is None and several and not on_cpu:
        ranks = args.num_processes = torch.cuda.device_count() * machines
    if ranks > 1 and not several:
        refuse(f"{path.name} starts one process, so not {ranks}; cpu-2.yaml and ddp.yaml start as many as you say")
    if ranks % machines:
        refuse(f"{ranks} ranks cannot be shared equally by {machines} machines")
    _arrange_meeting(args, config, machines)
    if file := config.get("deepspeed_config", {}).get("deepspeed_config_file"):
        _give(args, "deepspeed_config_file", found(file, path))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // (ranks // machines))))
    return args


def _arrange_meeting(args: argparse.Namespace, config: dict[str, Any], machines: int) -> None:
    """Where the launchers of a run meet: torch's `c10d` way, because with `static` ranks cannot be started again."""
    from watching_agent import ANSWER_WITHIN

    args.rdzv_backend = "c10d"
    # With torch's shared store, ranks that are started again read addresses of the dead and wait for ever.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if machines == 1:
        os.environ.setdefault("PET_RDZV_ENDPOINT", "localhost:0")  # any port that is free: runs may share a machine
        os.environ.setdefault("PET_LOCAL_ADDR", "localhost")
        args.main_process_port = args.main_process_port or 0
        return
    address, port = args.main_process_ip or config.get("main_process_ip"), args.main_process_port
    port = port or config.get("main_process_port")
    number = args.machine_rank if args.machine_rank is not None else config.get("machine_rank")
    if address is None or port is None or number is None:
        refuse(f"{machines} machines need --machine_rank, --main_process_ip and --main_process_port")
    _give(args, "deepspeed_multinode_launcher", "standard")  # else DeepSpeed would start the others over ssh
    # Torch would guess from host names who keeps the store, and number the machines by their names. The first machine
    # shall be the first always: rank 0 writes what the run leaves. A `~` sorts after every address and is never called.
    os.environ.setdefault("PET_LOCAL_ADDR", address if number == 0 else f"~{number:06d}")
    args.rdzv_conf = args.rdzv_conf or f"is_host={number == 0},join_timeout={_seconds('PEFTUNE_JOIN', 900)}"
    args.rdzv_conf += f",read_timeout={ANSWER_WITHIN}"
    if interface := _interface_towards(address, int(port)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)  # else gloo takes the host name's: often loopback
    if number:
        _wait_for(address, int(port), _seconds("PEFTUNE_JOIN", 900))


def _wait_for(address: str, port: int, seconds: int) -> None:
    """Return when the first machine's launcher listens; torch itself would give up within two minutes."""
    until, told_at = time.monotonic() + seconds, time.monotonic() + 10
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            reason = error
        if time.monotonic() > until:
            say(f"no launcher of machine 0 at {address}:{port} within {seconds} s ({reason}); PEFTUNE_JOIN=SECONDS "
                "waits longer, and a firewall between the machines must let every port through")  # fmt: skip
            sys.exit(FAILED)
        if time.monotonic() > told_at:
            say(f"waiting for machine 0 at {address}:{port} ({reason})")
            told_at = time.monotonic() + 60
        time.sleep(0.5)


def _interface_towards(address: str, port: int) -> str | None:
    import psutil

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, port))  # sends nothing
        except OSError:
            return None
        own = probe.getsockname()[0]
    return next((name for name, all in psutil.net_if_addrs().items() if any(a.address == own for a in all)), None)


def found(named: str, config: Path) -> str:
    """The absolute path of a file that a configuration names: from here, else from the folder above the config's."""
    for base in (Path.cwd(), config.resolve().parents[1]):
        if (base / named).is_file():
            return str(base / named)
    refuse(f"{config} names {named}, which is neither here nor in {config.resolve().parents[1]}")


def _become_the_rank(args: argparse.Namespace) -> NoReturn:
    """One process needs no watcher: it takes the launcher's place, so that signals and exit code are its own."""
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    command, environment = prepare_simple_launcher_cmd_env(args)
    sys.stdout.flush()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    os.execvpe(command[0], command, environment)


def _nothing_started(number: int, frame: FrameType | None) -> None:
    say(f"{signal.Signals(number).name} before any rank had started; {AGAIN}")
    os._exit(STOPPED)


def _give(args: argparse.Namespace, name: str, value: str) -> None:
    """Set an argument so that Accelerate takes it for one from the command line, which wins over its file."""
    setattr(args, name, value)
    args.nondefault.add(name)


def _cores() -> int:
    """Cores that this process may use, hyperthreads not counted."""
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, psutil.cpu_count(logical=False) or usable)


def _seconds(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdigit():
        refuse(f"{variable} is {text!r}; expected a number of seconds")
    return int(text)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def refuse(reason: str) -> NoReturn:
    say(reason)
    sys.exit(BAD_INPUT)


if __name__ == "__main__":
    main()
