"""Signs that a run goes wrong, told while it goes on: weights that do not move or must not, and losses that say so."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

import torch
from accelerate import Accelerator
from torch import nn

from peftune.console import Console
from peftune.device import peak_memory
from peftune.errors import CheckFailed
from peftune.inference.perplexity import Score
from peftune.inference.request import Generation
from peftune.training.checkpoint import State
from peftune.training.distributed.collectives import all_gather
from peftune.training.inputs import RunInputs
from peftune.training.metrics import MetricsLog
from peftune.training.optimizer import lr_at, warmup_steps

_CHECKED = 3  # steps until every matrix has moved: B first, A then, and last what waits for a B before it
_SUMMED = 4_000_000  # elements at a time: a sum in int64 copies them
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SPIKE, _RECENT = 6.0, 20  # standard deviations above the mean of so many steps before
_SPIKES = 3  # told in a run
_FIRST = 5  # steps that are compared with the first as many
_RISE = 0.01  # nats per token: what a validation loss is worse by
_FLAT = 1e-3  # of the base's validation loss: less is nothing


class Health:
    """What is known of a run since this process began it; every rank calls the same methods in the same order.

    What it tells is one line on the screen and an event "warning" of the metrics.
    """

    def __init__(
        self, inputs: RunInputs, model: nn.Module, accelerator: Accelerator, state: State, metrics: MetricsLog,
        console: Console, sums: dict[int, int] | None = None,
    ) -> None:  # fmt: skip
        """`sums` are of frozen weights that several runs share: what one has summed up in a round, others need not."""
        self.inputs, self.accelerator, self.state = inputs, accelerator, state
        self.metrics, self.console = metrics, console
        self.first_step = state.step
        self.parameters = dict(model.named_parameters())
        self.sums = sums
        self.before = _checksums(self.parameters, self.sums)
        self.losses: list[float] = []
        self.told: list[str] = []

    def after_step(self, loss: float) -> None:
        """Hear the mean loss of a step that was taken; CheckFailed where weights are wrong.

        By the third step of a start all weights are compared with what they were.
        """
        if self.state.step == min(self.first_step + _CHECKED, self.inputs.total_steps):
            self._check_what_moved()
        self._tell_a_spike(loss)
        self.losses.append(loss)
        count, lr = len(self.losses), self.inputs.recipe.optim.lr
        if self.first_step == 0 and count >= 2 * _FIRST and count & (count - 1) == 0:  # 16, 32, 64, … steps
            began, now = self.losses[:_FIRST], self.losses[-_FIRST:]
            if min(now) > 1.05 * max(began):
                self._tell(
                    "rising",
                    f"the loss is {fmean(now):.3f} after {count} steps, higher than {fmean(began):.3f} at the start: "
                    f"optim.lr={lr:g} is too high; try {lr / 5:.2g}, or a longer optim.warmup",
                )

    def after_evaluation(self, scores: Mapping[str, Score], samples: Sequence[Generation]) -> bool:
        """Record and show what was measured, by domain; whether the loss is the lowest so far."""
        state = self.state
        figures = {name: score.figures() | {"tokens": score.tokens} for name, score in scores.items()}
        for domain, measured in figures.items():
            self.metrics.write("eval", step=state.step, domain=domain, **measured)
        if scores:
            texts = [f"{d}: loss {f['loss']:.4f}, perplexity {f['perplexity']:.2f}" for d, f in figures.items()]
            self.console.say(f"step {state.step}/{self.inputs.total_steps}  {'  '.join(texts)}")
        for made in samples:
            self.metrics.write("sample", step=state.step, prompt=made.prompt, text=made.text)
            self.console.say(f"  sample {made.prompt!r} → {made.text!r}")
        state.evaluated_step = state.step
        if not scores:
            return False
        loss = sum(s.nats for s in scores.values()) / sum(s.tokens for s in scores.values())
        better = state.is_improved_by(loss)
        state.keep_figures(figures)
        self._judge_validation(loss)
        return better

    def _judge_validation(self, loss: float) -> None:
        state, optim, total = self.state, self.inputs.recipe.optim, self.inputs.total_steps
        best, waited, base = state.best_loss or loss, state.evaluations_without_gain, validation_loss(state, 0)
        if loss > best + _RISE and waited == 2 and state.best_step == 0:
            self._tell(
                "validation",
                f"validation loss has only risen since step 0 ({best:.4f} → {loss:.4f}): optim.lr={optim.lr:g} is too "
                f"high (try {optim.lr / 5:.2g}), or the validation text is of another kind than the training text",
            )
        if loss > best + _RISE and waited == 3 and state.best_step:
            self._tell(
                "validation",
                f"no evaluation since step {state.best_step} was better than its validation loss of {best:.4f}, and it "
                f"is {loss:.4f} now: the adapter learns its text by heart. run.early_stopping delivers the best step; "
                "fewer optim.epochs or more text help",
            )
        settled = warmup_steps(total, optim.warmup) + _RECENT
        if base is not None and state.step >= settled and abs(base - loss) < _FLAT * base:
            self._tell(
                "flat",
                f"after {state.step} steps the validation loss is still that of the base ({base:.4f} → {loss:.4f}): "
                f"optim.lr={optim.lr:g} is too low, unless the base knew this text; try {optim.lr * 10:.2g}",
            )

    def has_stopped_improving(self) -> bool:
        """Whether early stopping is asked for, and due."""
        patience = self.inputs.recipe.run.early_stopping
        if patience is None or self.state.evaluations_without_gain < patience:
            return False
        self.console.say(f"no better validation loss in {patience} evaluations: stopping at step {self.state.step}")
        return True

    def at_the_end(self, predicted: int) -> None:
        """Tell what is known against the adapter that will be delivered; what memory was taken and `predicted`."""
        if predicted:
            most = peak_memory(self.accelerator.device)
            self.console.say(f"memory at most {most / 1e9:.2f} GB; predicted {predicted / 1e9:.2f} GB")
        state, lr = self.state, self.inputs.recipe.optim.lr
        base, last, best = validation_loss(state, 0), validation_loss(state, state.step), state.best_loss
        if base is not None and last is not None and best is not None and self.inputs.recipe.run.early_stopping is None:
            if last > base + _RISE:
                self._tell(
                    "worse",
                    f"the adapter of step {state.step} is worse on the validation text than the base "
                    f"({base:.4f} → {last:.4f} nats per token)",
                )
            elif last > best + _RISE:
                self._tell(
                    "best",
                    f"step {state.best_step} was better on the validation text ({best:.4f} nats per token, step "
                    f"{state.step} has {last:.4f}); run.early_stopping delivers the best step",
                )
        if not self.inputs.corpus.domains and self.first_step == 0 and len(self.losses) >= 2 * _RECENT:
            began, now = self.losses[:_RECENT], self.losses[-_RECENT:]
            noise = math.hypot(stdev(began), stdev(now)) / math.sqrt(_RECENT)
            if abs(fmean(began) - fmean(now)) < 2 * noise + _FLAT * fmean(began):
                self._tell(
                    "flat",
                    f"the training loss has not changed beyond its noise ({fmean(began):.3f} in the first {_RECENT} "
                    f"steps, {fmean(now):.3f} in the last): optim.lr={lr:g} may be too low; data.validation tells a "
                    "small gain from none",
                )

    def _tell(self, sign: str, text: str, most: int = 1) -> None:
        """Tell a sign of trouble, at most so many times a start."""
        if self.told.count(sign) < most:
            self.told.append(sign)
            self.metrics.write("warning", step=self.state.step, text=text)
            self.console.say(f"warning: {text}")

    def _tell_a_spike(self, loss: float) -> None:
        recent = self.losses[-_RECENT:]
        if len(recent) < _RECENT or loss <= 1.25 * fmean(recent):
            return
        if loss > fmean(recent) + _SPIKE * stdev(recent):
            self._tell(
                "spike",
                f"step {self.state.step}: a spike, loss {loss:.3f} where the {_RECENT} steps before had "
                f"{fmean(recent):.3f} on average; if it does not fall back, lower optim.lr or optim.clip",
                most=_SPIKES,
            )

    def _check_what_moved(self) -> None:
        after, step = _checksums(self.parameters, self.sums), self.state.step
        still = {name for name, value in after.items() if value == self.before[name]}
        frozen = {name for name, parameter in self.parameters.items() if not parameter.requires_grad}
        # Of a sharded matrix a rank may have a part that holds nothing.
        ranks = all_gather(self.accelerator, (frozen - still, still - frozen))
        changed = set().union(*(names for names, _ in ranks))
        stuck = set.intersection(*(names for _, names in ranks))
        if changed:
            raise CheckFailed(
                f"step {step}: {_some(changed)} of the base has changed, and nothing of it may: this is a fault of "
                "peftune or of a library; no adapter of this run is delivered"
            )
        if self.first_step or step < _CHECKED:
            return
        dead = {name for name in stuck if self.before[name] == 0 and "lora_" in name}
        if dead:
            raise CheckFailed(
                f"step {step}: {_some(dead)} of the adapter is still zero: no gradient reaches it, so it would never "
                "learn; leave it out of lora.targets, or try run.fast=false"
            )
        if stuck:
            rate = lr_at(step - 1, self.inputs.total_steps, self.inputs.recipe.optim)
            self._tell(
                "stuck",
                f"after {step} steps {_some(stuck)} has not changed: the rate, {rate:.2g} so far, is so low that "
                "rounding loses it, or nothing in the text uses it yet",
            )


def validation_loss(state: State, step: int) -> float | None:
    """Nats per token over all domains at a step that the state remembers."""
    return mean_loss(state.figures.get(str(step), {}))


def mean_loss(figures: Mapping[str, Mapping[str, float]]) -> float | None:
    """Nats per token over all domains, of `loss` and `tokens` by domain."""
    tokens = sum(of["tokens"] for of in figures.values())
    return sum(of["loss"] * of["tokens"] for of in figures.values()) / tokens if tokens else None


def never_better(state: State, total: int) -> str:
    """What to say and to try where the best step is the first: the adapter of that step changes nothing of the base."""
    base, last = (validation_loss(state, step) or math.nan for step in (0, state.step))
    rate = "higher" if abs(last - base) < _FLAT * base else "lower"
    return (
        f"no evaluation after step 0 was better than the base's validation loss of {base:.4f}, so the best adapter is "
        f"the one that changes nothing, and it is not delivered. It is {last:.4f} now: try a {rate} optim.lr, more "
        "training text or validation text of the same kind, with another run.out; run.early_stopping=null "
        f"{'goes on to the last step and ' if state.step < total else ''}delivers the adapter of step {total}"
    )


def _checksums(parameters: Mapping[str, torch.Tensor], known: dict[int, int] | None) -> dict[str, int]:
    """Sums of the bit patterns of all values that this rank holds: another one where any single value changes.

    What is frozen is looked up in `known` by its identity, and noted there.
    """
    found, known = dict[str, int](), {} if known is None else known
    for name, parameter in parameters.items():
        if not parameter.requires_grad and id(parameter) in known:
            found[name] = known[id(parameter)]
            continue
        flat = getattr(parameter, "ds_tensor", parameter).detach().reshape(-1)
        bits = flat.view(_INTEGERS[flat.element_size()])
        found[name] = sum(int(part.sum(dtype=torch.int64)) for part in bits.split(_SUMMED))
        if not parameter.requires_grad:
            known[id(parameter)] = found[name]
    return found


def _some(names: set[str]) -> str:
    first = min(names).removeprefix("base_model.model.")
    return first if len(names) == 1 else f"{first} (and {len(names) - 1} more)"
