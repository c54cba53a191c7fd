"""Points of a sweep that Optuna chooses, a few at a time, from what the points before them reached.

Ask and tell: https://optuna.readthedocs.io/en/stable/tutorial/20_recipes/009_ask_and_tell.html.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftune.errors import UserError
from peftune.training.sweep.grid import Grid, Range, Values
from peftune.training.sweep.results import Row

_DIGITS = 3  # of a number, so that it can be named and typed again
_TRIES = 20  # for a point that was not tried before


def require_optuna() -> None:
    """UserError where it is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UserError(
            "trials are chosen by Optuna, which is not installed; pip install 'peftune[sweep]', or give values for a "
            "grid"
        ) from None


def propose(grid: Grid, rows: Sequence[Row], count: int) -> list[Values]:
    """At most `count` new points; the same for the same rows, so that a sweep that was cut goes on as it would have.

    Of a grid of values alone it may be fewer, in the end none, when all were tried.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {key: _distribution(axis) for key, axis in grid.axes.items()}
    seed = (int(grid.recipe.get("run", {}).get("seed", 0)) + len(rows)) % 2**32
    sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    study = optuna.create_study(sampler=sampler, direction="minimize")
    tried = []
    for row in sorted(rows, key=lambda row: row.name):
        if row.values.keys() != space.keys():
            continue  # of another grid
        tried.append(row.values)
        params = {key: _inside(grid.axes[key], value) for key, value in row.values.items()}
        if None not in params.values() and row.ending == "delivered":
            study.add_trial(optuna.create_trial(params=params, distributions=space, value=row.loss))
        elif None not in params.values():
            study.add_trial(optuna.create_trial(params=params, distributions=space, state=_failed()))
    points: list[Values] = []
    for _ in range(count * _TRIES):
        if len(points) == count:
            break
        asked = study.ask(space).params
        point = {key: _rounded(axis, asked[key]) for key, axis in grid.axes.items()}
        if point not in tried:
            points.append(point)
            tried.append(point)
    return points


def _failed() -> Any:
    from optuna.trial import TrialState

    return TrialState.FAIL


def _distribution(axis: list[Any] | Range) -> Any:
    """What Optuna draws from: of values their numbers in the list, as it takes no lists among them."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(axis, Range):
        return CategoricalDistribution(list(range(len(axis))))
    if isinstance(axis.low, int) and isinstance(axis.high, int):
        return IntDistribution(axis.low, axis.high, log=axis.is_log)
    return FloatDistribution(axis.low, axis.high, log=axis.is_log)


def _inside(axis: list[Any] | Range, value: Any) -> Any:
    """A value as Optuna knows it; None where the axis does not have it."""
    if isinstance(axis, Range):
        return value if axis.low <= value <= axis.high else None
    return axis.index(value) if value in axis else None


def _rounded(axis: list[Any] | Range, asked: Any) -> Any:
    if not isinstance(axis, Range):
        return axis[asked]
    if isinstance(asked, int):
        return asked
    return min(max(float(f"{asked:.{_DIGITS}g}"), axis.low), axis.high)
