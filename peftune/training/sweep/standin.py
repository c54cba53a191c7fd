"""Stands in for the fleet until there is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftune.config.recipe import Recipe
from peftune.errors import Interrupted, PeftuneError
from peftune.training import run
from peftune.training.checkpoint import State
from peftune.training.export.adapter import Delivery


class _Reached(Exception):
    pass


def train_fleet(recipes: Sequence[Recipe], until: float = 1.0) -> list[Delivery | State | PeftuneError]:
    found: list[Delivery | State | PeftuneError] = []
    original = run._evaluate_if_due

    def evaluate(one: Any, stop: Any) -> bool:
        better = original(one, stop)
        state = one.state
        if (
            until < 1
            and state.evaluated_step == state.step
            and until * one.inputs.total_steps <= state.step < one.inputs.total_steps
        ):
            run._save(one)
            raise _Reached(state)
        return better

    run._evaluate_if_due = evaluate
    try:
        for recipe in recipes:
            try:
                found.append(run.train(recipe))
            except _Reached as reached:
                found.append(reached.args[0])
            except Interrupted:
                raise
            except PeftuneError as error:
                found.append(error)
    finally:
        run._evaluate_if_due = original
    return found
