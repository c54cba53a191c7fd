"""Start ranks with `accelerate launch`, which calls torch's launcher, both in this process; say how they ended.

Only public interfaces are used: `launch_command`, torchrun's options (as PET_* in the environment, where Accelerate
does not have them), `TCPStore` and `ChildFailedError`. What is added, because neither launcher has it:

- the exit code of the ranks (plain: 1 for every failure, under a traceback), and one line that names a killed rank;
- restarts after a crash only, not after 2, 3 or 4, where the next attempt would end in the same way;
- a store that listens on one address instead of all, and machines that wait for a slow first one.

The rendezvous is torch's `static` one. Machines have fixed numbers, launchers do not depend on each other while ranks
run, and nothing that comes over the network is unpickled, as the state of torch's `c10d` rendezvous is.
"""

from __future__ import annotations

import gc
import ipaddress
import os
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass

import psutil
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]  # PyTorch lists them nowhere
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from peftune.cli.launcher.stop_signals import AGAIN, StopSignals, say
from peftune.cli.stop import NUMBERS
from peftune.errors import CheckFailed, Interrupted, PeftuneError, RankLost, UserError, explained, first_line

# Codes whose reason a rank has printed; where several occur, the first of these is the launcher's own.
_BY_SIGTERM = 128 + signal.SIGTERM
_EXPLAINED = (UserError.exit_code, CheckFailed.exit_code, Interrupted.exit_code)


@dataclass(frozen=True)
class Rendezvous:
    """Where launchers and ranks find each other: by default on this machine, at a free port, as runs may share one."""

    address: str = "127.0.0.1"
    port: int = 0
    node_rank: int = 0
    join: int = 900  # seconds that machines wait for each other

    def open(self) -> TCPStore | socket.socket:
        """On machine 0 the store; on others a connection to it, which ends with the store. PET_RDZV_ENDPOINT is set."""
        if self.node_rank:
            os.environ["PET_RDZV_ENDPOINT"] = f"{self.address}:{self.port}"
            return self._connect()
        with explained(f"cannot listen on {self.address}:{self.port}"):
            listener = self._listen()
        port, descriptor = listener.getsockname()[1], listener.detach()
        os.environ["PET_RDZV_ENDPOINT"] = f"{self.address}:{port}"
        # Torch's agent takes the store that its process has at a port; its own would listen on all addresses.
        return TCPStore(
            self.address, port, is_master=True, wait_for_workers=False, multi_tenant=True, master_listen_fd=descriptor
        )

    def _listen(self) -> socket.socket:
        """On `address` alone; on all where other machines know this one by an address that is not its own (behind a
        NAT), that is loopback here (as in Debian's /etc/hosts), or that is not known yet (a pod's own name)."""
        family, host = socket.AF_INET, ""
        with suppress(socket.gaierror):
            family, _, _, _, found = socket.getaddrinfo(self.address, self.port, type=socket.SOCK_STREAM)[0]
            known = str(found[0])
            if known in _interfaces() and not (self.port and ipaddress.ip_address(known).is_loopback):
                host = known
        return socket.create_server((host, self.port), family=family)

    def _connect(self) -> socket.socket:
        """As soon as machine 0 listens; torch would wait in silence."""
        where = f"machine 0 at {self.address}:{self.port}"
        for second in range(self.join):
            try:
                return socket.create_connection((self.address, self.port), timeout=5)
            except OSError as error:
                if second == 10:
                    say(f"waiting for {where} ({error})")
            time.sleep(1)
        raise RankLost(
            f"no launcher of {where} within {self.join} s; PEFTUNE_JOIN=SECONDS waits longer, and a firewall between "
            "the machines must let every port through"
        )

    def use_interface(self) -> None:
        """Have gloo use the interface towards `address`; its own choice, that of the host's name, is often loopback."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.connect((self.address, 9))  # sends nothing
            if name := _interfaces().get(probe.getsockname()[0]):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _interfaces() -> dict[str, str]:
    """Names of this machine's network interfaces, by address."""
    return {entry.address: name for name, entries in psutil.net_if_addrs().items() for entry in entries}


def run(
    options: dict[str, object], target: list[str], rendezvous: Rendezvous, stop: StopSignals, max_restarts: int
) -> int:
    """Start ranks, again after a crash; the exit code that says most about how they ended."""
    rendezvous.use_interface()
    options |= {"machine_rank": rendezvous.node_rank, "main_process_ip": rendezvous.address, "rdzv_backend": "static"}
    # With --same_network Accelerate leaves the endpoint to PET_RDZV_ENDPOINT; its own port stays unused.
    options |= {"rdzv_conf": f"timeout={rendezvous.join}", "main_process_port": 0}
    argv = ["--same_network", *(part for name, value in options.items() for part in (f"--{name}", str(value))), *target]
    for attempt in range(max_restarts + 1):
        store = rendezvous.open()
        code, reason = verdict(_exit_codes(argv), stop)
        if code != PeftuneError.exit_code or stop.first or attempt == max_restarts:
            break
        say(f"{reason}; restart {attempt + 1} of {max_restarts}")
        if isinstance(store, socket.socket):  # nobody may join the attempt that has just failed
            store.settimeout(60)
            with store, suppress(OSError):
                store.recv(1)  # returns when machine 0 has closed it
        del store
        gc.collect()  # torch's agent, which is part of a cycle of references, holds the store as well
    if reason:
        say(f"{reason}; {AGAIN}")
    return code


def _exit_codes(argv: list[str]) -> dict[int, int]:
    """Run the ranks; codes of those that did not end with 0 (negative: by a signal)."""
    try:
        launch_command(launch_command_parser().parse_args(argv))
    except ChildFailedError as error:
        first = min(failure.timestamp for failure in error.failures.values())
        codes = {
            rank: failure.exitcode
            for rank, failure in error.failures.items()
            if failure.exitcode in _EXPLAINED or failure.timestamp <= first + 5
        }
        # Without those that torch has ended because another had failed.
        return {rank: code for rank, code in codes.items() if code not in (-signal.SIGTERM, _BY_SIGTERM)} or codes
    except DistError as error:
        raise RankLost(f"the rendezvous of the machines failed: {first_line(error)}; {AGAIN}") from None
    except (AssertionError, ConnectionError, FileNotFoundError, ImportError, ValueError) as error:
        raise UserError(first_line(error)) from error  # Accelerate's own checks of options and configuration
    return {}


def verdict(codes: dict[int, int], stop: StopSignals) -> tuple[int, str]:
    """The exit code that says most about ranks that ended with `codes`, and the reason where no rank has printed it."""
    killed = {rank: -code for rank, code in codes.items() if code < 0 and -code not in NUMBERS}
    failed = [rank for rank, code in codes.items() if code == PeftuneError.exit_code]
    # A rank whose neighbour is gone may abort: gloo's threads still run when its exception ends it.
    first = {rank: number for rank, number in killed.items() if number != signal.SIGABRT}
    killed = first if first or failed else killed
    has_said = any(code - 128 in NUMBERS for code in codes.values())  # stopped before training: the first rank said so
    for code in _EXPLAINED:
        # Without a signal to the launcher, a rank that stopped may have done so because of another one's failure.
        if code in codes.values() and (code != Interrupted.exit_code or stop.first or not (killed or failed)):
            return code, ""
    if codes and stop.first and not killed and (has_said or not failed):
        reason = "" if has_said else f"{stop.first} came before training had begun or after its end"
        return Interrupted.exit_code, reason
    how, which = "", killed or failed or list(codes)
    if killed and stop.first:
        how = f"had not ended {stop.grace} s after {stop.first} (PEFTUNE_GRACE=SECONDS gives more time)"
    elif killed:
        name = signal.Signals(min(killed.values())).name
        how = f"{'were' if len(killed) > 1 else 'was'} killed by {name}"
        how += " (often for want of memory)" * (name == "SIGKILL")
    elif failed:
        how = "failed, see above"
    elif codes:
        how = f"ended with {sorted(set(codes.values()))}"
    ranks = f"rank{'s' * (len(which) > 1)} {', '.join(map(str, sorted(which)))} on {socket.gethostname()}"
    return (PeftuneError.exit_code, f"{ranks} {how}") if codes else (0, "")
