"""What `run.compile` brings a step: whole steps of peftune, as it comes and compiled, in turns.

    python -m benchmarks.compiling [--shape small] [--device cuda] [--rounds 5]

The gate compares the gradients of the compiled steps with PEFT's. Compiling is done before the first round; how long it
took is among what is printed. Most of a step is matrix products, which no compiler makes faster.
"""

from __future__ import annotations

from argparse import Namespace

from benchmarks.measure import Result, Row, finish, ratio
from benchmarks.options import add_training, parse, parser, prepared
from benchmarks.training import compare

_COMPILED = "run.compile=true"


def run(arguments: Namespace) -> Result:
    """Gate of the compiled steps, rounds, a row."""
    plain = list(arguments.ours)
    arguments.ours = [*plain, _COMPILED]
    with prepared(arguments) as setup:
        compiled = setup.ours(f"peftune {_COMPILED}")
        arguments.ours = plain
        ours = setup.ours()
        arguments.ours = [*plain, _COMPILED]  # the gate's
        result = compare(setup, "compile", "steps with and without run.compile", [ours, compiled])
    told = str(compiled.facts["settings"]["function"])
    result.rows.append(
        Row("compile", "a step, compiled", "as it comes", ratio(compiled, ours), 0, "information", reason=told)
    )
    return result


def main() -> None:
    """Measure and tell."""
    made = parser(__doc__)
    add_training(made, "")
    arguments = parse(made)
    finish(run(arguments), arguments.json)


if __name__ == "__main__":
    main()
