#!/usr/bin/env python3
"""Start the ranks of a run as `accelerate launch` does, and end with the exit code that the ranks ended with.

    python launch/ranks.py --config_file accelerate_configs/ddp.yaml -m peftune train RECIPE [key=value ...]

takes the arguments of `accelerate launch` and hands them to it. What it adds:

- the exit code is the ranks' own (2 input at fault, 3 stopped with a checkpoint saved, 4 a check failed), without a
  traceback of the launcher; a rank that was killed is named in one line, and the code is 1;
- SIGTERM, SIGINT and SIGHUP reach every rank, which then has PEFTUNE_GRACE seconds (110) to save and to end;
- `--max_restarts N` starts ranks again after a crash, never after 2, 3 or 4, where it would end in the same way;
- a configuration without `num_processes` gets one rank for each GPU of this machine, one with `use_cpu` none of them;
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
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

FAILED, BAD_INPUT, STOPPED, CHECK_FAILED = 1, 2, 3, 4
ITS_OWN_WORDS = (BAD_INPUT, CHECK_FAILED, STOPPED)  # codes whose reason a rank has printed; the first that occurs tells
READ_TIMEOUT = 30  # seconds in which the first machine must answer the others' launchers
EXIT_TIMEOUT = 30  # seconds that a launcher whose ranks are done waits for those of other machines
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
AGAIN = "start the same command again, it goes on from the last checkpoint"


@dataclass
class Outcome:
    """How the ranks of this machine ended, as far as they have."""

    codes: dict[int, int] = field(default_factory=dict)  # by rank, of those that did not end with 0; negative: a signal
    stopped_by: str | None = None
    grace: int = 110


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
        logging.disable(logging.ERROR)  # what they say about a failed rank is said here in one line
    from accelerate.commands import launch as accelerate
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    _watch(outcome)
    accelerate.simple_launcher = _become_the_rank
    try:
        accelerate.launch_command(completed(accelerate.launch_command_parser().parse_args(argv)))
    except (ChildFailedError, SignalException):
        pass
    except RendezvousError as error:
        say(f"the nodes did not meet, or one has left for good: {_first_line(error)}")
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
    if not on_cpu and not torch.cuda.is_available():
        refuse(f"{path.name} is for GPUs and torch finds none here; cpu.yaml and cpu-2*.yaml need none")
    if ranks is None:
        ranks = args.num_processes = torch.cuda.device_count() * machines
    if ranks % machines:
        refuse(f"{ranks} ranks cannot be shared equally by {machines} machines")
    _arrange_meeting(args, config, machines)
    if file := config.get("deepspeed_config", {}).get("deepspeed_config_file"):
        _give(args, "deepspeed_config_file", found(file, path))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // (ranks // machines))))
    return args


def _arrange_meeting(args: argparse.Namespace, config: dict[str, Any], machines: int) -> None:
    """Where the launchers of a run meet: torch's `c10d` way, because with `static` ranks cannot be started again."""
    args.rdzv_backend = "c10d"
    # With torch's shared store, ranks that are started again read addresses of the dead ones and wait for them for ever.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if machines == 1:
        os.environ.setdefault("PET_RDZV_ENDPOINT", "localhost:0")  # any port that is free: runs may share a machine
        os.environ.setdefault("PET_LOCAL_ADDR", "localhost")
        args.main_process_port = args.main_process_port or 0
        return
    address, port = (getattr(args, name) or config.get(name) for name in ("main_process_ip", "main_process_port"))
    number = args.machine_rank if args.machine_rank is not None else config.get("machine_rank")
    if None in (address, port, number):
        refuse(f"{machines} machines need --machine_rank, --main_process_ip and --main_process_port")
    # Torch would guess from host names who keeps the store, and number the machines by their names. The first machine
    # shall be the first always: rank 0 writes what the run leaves. A `~` sorts after every address and is never called.
    os.environ.setdefault("PET_LOCAL_ADDR", address if number == 0 else f"~{number:06d}")
    args.rdzv_conf = args.rdzv_conf or f"is_host={number == 0},join_timeout={_seconds('PEFTUNE_JOIN', 900)}"
    args.rdzv_conf += f",read_timeout={READ_TIMEOUT}"
    if interface := _interface_towards(address, int(port)):
        os.environ.setdefault(
            "GLOO_SOCKET_IFNAME", interface
        )  # else gloo takes what the host name means: often loopback
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
            say(f"no launcher of machine 0 at {address}:{port} within {seconds} s ({reason}); PEFTUNE_JOIN=SECONDS waits "
                "longer, and a firewall between the machines must let every port through")  # fmt: skip
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
    """The absolute path of a file that a configuration names: from here, else from the folder above the configuration."""
    for base in (Path.cwd(), config.resolve().parents[1]):
        if (base / named).is_file():
            return str(base / named)
    refuse(f"{config} names {named}, which is neither here nor in {config.resolve().parents[1]}")


def told(outcome: Outcome) -> int:
    """The exit code of a run from those of its ranks, with a line where the ranks could not speak for themselves."""
    codes = outcome.codes
    killed = {rank: -code for rank, code in codes.items() if code < 0 and -code not in STOP_SIGNALS}
    for code in ITS_OWN_WORDS:
        # Without a signal from outside, a rank that stopped was told to because of another one's failure.
        alone = outcome.stopped_by or (not killed and FAILED not in codes.values())
        if code in codes.values() and (code != STOPPED or alone):
            return code
    host = socket.gethostname()
    if outcome.stopped_by and killed:
        say(f"{_named(killed)} on {host} had not ended {outcome.grace} s after {outcome.stopped_by}; {AGAIN} "
            "(PEFTUNE_GRACE=SECONDS gives more time)")  # fmt: skip
    elif killed:
        name = signal.Signals(min(killed.values())).name
        hint = " (often for want of memory)" if name == "SIGKILL" else ""
        say(f"{_named(killed)} on {host} was killed by {name}{hint}; {AGAIN}")
    elif FAILED in codes.values():
        say(f"{_named([r for r, code in codes.items() if code == FAILED])} on {host} failed, see above; {AGAIN}")
    elif codes and outcome.stopped_by:
        say(f"{outcome.stopped_by} came before training had begun or after its end; {AGAIN}")
        return STOPPED
    elif codes:
        say(f"{_named(codes)} on {host} ended with {sorted(set(codes.values()))}; {AGAIN}")
    return FAILED if codes else 0


def _watch(outcome: Outcome) -> None:
    """Have torch's launcher use an agent that writes down how its ranks end."""
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.rendezvous import RendezvousClosedError
    from torch.distributed.launcher import api

    class WatchingAgent(LocalElasticAgent):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **{"exit_barrier_timeout": EXIT_TIMEOUT} | named)

        def run(self, role: str = "default") -> RunResult:
            result = super().run(role)
            if result is None:  # torch returns nothing where the other nodes have closed the rendezvous
                raise RendezvousClosedError("another node has ended the run")
            return result

        def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
            result = super()._monitor_workers(worker_group)
            if result.failures:
                outcome.codes = _first_to_fail(result.failures)
                if set(ITS_OWN_WORDS) & set(outcome.codes.values()):
                    self._remaining_restarts = 0
                elif self._remaining_restarts:
                    self._announce_restart()
            return result

        def _announce_restart(self) -> None:
            number = self._worker_group.spec.max_restarts - self._remaining_restarts + 1
            ended = {code if code > 0 else signal.Signals(-code).name for code in outcome.codes.values()}
            say(f"{_named(outcome.codes)} on {socket.gethostname()} ended with {', '.join(map(str, ended))}; "
                f"restart {number} of {self._worker_group.spec.max_restarts}")  # fmt: skip
            outcome.codes = {}

        def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
            running = self._running()
            if isinstance(sys.exc_info()[1], api.SignalException) and running:
                outcome.stopped_by = death_sig.name
                for number in STOP_SIGNALS:  # one more is for the ranks too; here it would leave them orphaned
                    signal.signal(number, lambda number, _: self._pass_on(number))
                # SIGTERM also for Ctrl-C: a rank that is still importing ends by it without a traceback.
                death_sig, timeout = signal.SIGTERM, outcome.grace
            super()._shutdown(death_sig, timeout)
            for rank, process in running.items():
                if process.returncode:
                    outcome.codes[rank] = process.returncode

        def _running(self) -> dict[int, Any]:
            handlers = self._pcontext.subprocess_handlers if self._pcontext else {}
            ranks = [worker.global_rank for worker in self._worker_group.workers]
            return {ranks[local]: h.proc for local, h in handlers.items() if h.proc.poll() is None}

        def _pass_on(self, number: int) -> None:
            for process in self._running().values():
                os.killpg(process.pid, number)  # a rank leads a session of its own

    api.LocalElasticAgent = WatchingAgent


def _first_to_fail(failures: dict[int, Any]) -> dict[int, int]:
    """Exit codes by rank, without those of ranks that torch ended because another had failed."""
    first = min(failure.timestamp for failure in failures.values())
    own = {r: f.exitcode for r, f in failures.items() if f.exitcode in ITS_OWN_WORDS or f.timestamp <= first + 5}
    return {rank: code for rank, code in own.items() if code != -signal.SIGTERM} or own


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


def _named(ranks: Any) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, sorted(ranks)))}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def say(text: str) -> None:
    print(f"peftune: {text}", file=sys.stderr, flush=True)


def refuse(reason: str) -> NoReturn:
    say(reason)
    sys.exit(BAD_INPUT)


if __name__ == "__main__":
    main()
