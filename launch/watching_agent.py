"""torch's launcher of ranks, watched: it remembers how they ended, and notices a machine that is gone.

Part of launch/ranks.py. `watch` puts it in the place of torch's `LocalElasticAgent`, whose methods it extends.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from typing import Any

from outcome import AGAIN, FAILED, ITS_OWN_WORDS, STOP_SIGNALS, Outcome, named, say
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError
from torch.distributed.launcher import api

GONE_AFTER = int(os.environ.get("PEFTUNE_LOST_AFTER", "60"))  # seconds of silence that mean a machine is gone
ANSWER_WITHIN = GONE_AFTER  # seconds in which the first machine, which keeps the store, must answer the others
BEAT_EVERY = min(5, GONE_AFTER / 5)  # seconds between two signs of life
HUNG_RANKS = 5  # seconds for ranks to end once a machine is gone: they wait for it inside a collective
EXIT_TIMEOUT = 30  # seconds that a launcher whose ranks are done waits for those of other machines


class MachineLost(RuntimeError):
    """Another machine's launcher does not answer any more."""


def watch(outcome: Outcome) -> None:
    """Have torch's launcher use the agent below, which writes into `outcome`."""

    def agent(*arguments: Any, **named: Any) -> WatchingAgent:
        return WatchingAgent(outcome, *arguments, **{"exit_barrier_timeout": EXIT_TIMEOUT} | named)

    vars(api)["LocalElasticAgent"] = agent


class WatchingAgent(LocalElasticAgent):
    def __init__(self, outcome: Outcome, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._outcome = outcome
        self._beat_at = 0.0
        self._beats: dict[int, tuple[int, float]] = {}  # by machine: how often it told, and when that last changed
        self._machine_gone = False
        self._answered: float | None = None  # when the store last answered; None while it need not
        threading.Thread(target=self._end_if_unanswered, daemon=True).start()

    def run(self, role: str = "default") -> RunResult:
        try:
            result: RunResult | None = super().run(role)
        except RendezvousError as error:
            if self._worker_group.state == WorkerState.HEALTHY:
                raise MachineLost(f"machine 0 has not answered for {ANSWER_WITHIN} s") from error
            raise
        if result is None:  # torch returns nothing where the other machines have closed the rendezvous
            raise RendezvousClosedError("another machine has ended the run")
        return result

    def _initialize_workers(self, worker_group: WorkerGroup) -> None:
        self._machine_gone, self._beats, self._answered = False, {}, None
        super()._initialize_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        self._answered = time.monotonic() if result.state == WorkerState.HEALTHY else None
        self._outcome.codes = {}
        if result.failures:
            codes = self._outcome.codes = _first_to_fail(result.failures)
            if set(ITS_OWN_WORDS) & set(codes.values()):
                self._remaining_restarts = 0  # the same again would end in the same way
            elif self._remaining_restarts:
                ended = {str(code) if code > 0 else signal.Signals(-code).name for code in codes.values()}
                self._announce_restart(
                    f"{named(codes)} on {socket.gethostname()} ended with {', '.join(sorted(ended))}"
                )
        elif result.state == WorkerState.HEALTHY and (gone := self._gone_machines(worker_group)):
            lost = f"machine{'s' * (len(gone) > 1)} {', '.join(map(str, gone))} has not answered for {GONE_AFTER} s"
            self._machine_gone, self._answered = True, None
            if not self._remaining_restarts:
                raise MachineLost(lost)
            self._announce_restart(lost)
            return RunResult(state=WorkerState.UNHEALTHY)  # ranks start again when the machine is back
        return result

    def _gone_machines(self, group: WorkerGroup) -> list[int]:
        """Machines whose launcher has been silent; a cut cable alone would leave the ranks waiting for half an hour."""
        now = time.monotonic()
        store: Any = group.store
        machines = group.group_world_size or 1
        if machines == 1 or now < self._beat_at + BEAT_EVERY:
            return []
        self._beat_at = now
        try:
            store.add(f"peftune/beats/{group.group_rank}", 1)
            beats = {machine: store.add(f"peftune/beats/{machine}", 0) for machine in range(machines)}
        except RuntimeError as error:
            raise MachineLost(f"machine 0 has not answered for {ANSWER_WITHIN} s") from error
        for machine, beat in beats.items():
            if self._beats.get(machine, (-1, 0.0))[0] != beat:
                self._beats[machine] = beat, now
        return [machine for machine, (_, since) in self._beats.items() if now - since > GONE_AFTER]

    def _announce_restart(self, reason: str) -> None:
        allowed = self._worker_group.spec.max_restarts
        say(f"{reason}; restart {allowed - self._remaining_restarts + 1} of {allowed}")

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        self._answered = None
        running, reason = self._running(), sys.exc_info()[1]
        if not isinstance(reason, SignalException) or not running:
            super()._shutdown(death_sig, HUNG_RANKS if reason or self._machine_gone else timeout)
            return
        self._outcome.stopped_by = death_sig.name
        for number in STOP_SIGNALS:  # one more is for the ranks too; here it would leave them orphaned
            signal.signal(number, lambda number, _: self._pass_on(number))
        # SIGTERM also for Ctrl-C: a rank that is still importing ends by it without a traceback.
        super()._shutdown(signal.SIGTERM, self._outcome.grace)
        self._outcome.codes = {rank: process.returncode for rank, process in running.items() if process.returncode}

    def _end_if_unanswered(self) -> None:
        """For all machines but the first: when its store is out of reach, a request to it blocks, signals included."""
        while True:
            time.sleep(1)
            if self._answered is not None and time.monotonic() - self._answered > ANSWER_WITHIN:
                say(f"machine 0 has not answered for {ANSWER_WITHIN} s; {AGAIN}")
                self._pass_on(signal.SIGKILL)
                os._exit(FAILED)

    def _running(self) -> dict[int, Any]:
        handlers = getattr(self._pcontext, "subprocess_handlers", {})  # ranks of a program, not of a function
        ranks = [worker.global_rank for worker in self._worker_group.workers]
        return {ranks[local]: h.proc for local, h in handlers.items() if h.proc.poll() is None}

    def _pass_on(self, number: int) -> None:
        for process in self._running().values():
            os.killpg(process.pid, number)  # a rank leads a session of its own


def _first_to_fail(failures: dict[int, Any]) -> dict[int, int]:
    """Exit codes by rank, without those of ranks that torch ended because another had failed."""
    first = min(failure.timestamp for failure in failures.values())
    own = {r: f.exitcode for r, f in failures.items() if f.exitcode in ITS_OWN_WORDS or f.timestamp <= first + 5}
    return {rank: code for rank, code in own.items() if code != -signal.SIGTERM} or own
