"""The verb `doctor`: its options, the order of the checks, and what is printed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated

import typer

from peftune.cli.options import Json, save_json
from peftune.cli.output.text_output import results
from peftune.errors import UserError

_STYLE = {"fine": "", "slower": "yellow", "broken": "bold red"}


def doctor(
    online: Annotated[bool, typer.Option("--online", help="Also whether the Hugging Face hub can be reached.")] = False,
    json_path: Json = None,
) -> int:
    """Check this machine: versions, CPU, GPUs, ranks, memory, disk, caches; and train a step in each way that there is.

    Example:  peftune doctor

    Each line says fine, slower than it could be and why, or will not work and what to do. It takes a minute or two,
    changes nothing, and ends with exit code 2 where something will not work, else 0.
    """
    from peftune.cli.checks.result import CheckResult
    from peftune.console import Console

    def checks() -> Iterator[CheckResult]:
        from peftune.cli.checks import libraries, machine, runs

        yield from libraries.check_libraries()
        yield from machine.check_room()
        yield from machine.check_caches()
        if online:
            yield runs.check_hub()
        facts, reason = runs.torch_facts()
        if facts is None:
            yield CheckResult("torch", "broken", f"{reason}; install it again")
            return
        yield from machine.check_processor(facts)
        yield from runs.check_gpus(facts)
        if facts["no_gpu"]:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # told once; the rest is tried on the CPU
        tries = runs.runs_to_try(len(facts["gpus"]))
        with Console().progress as progress:
            task = progress.add_task("trying", total=len(tries), note="")
            for name, words in tries.items():
                progress.update(task, note=name)
                yield runs.check_run(name, words)
                progress.advance(task)

    found = []
    for result in checks():
        found.append(result)
        results().print(result.line(), style=_STYLE[result.verdict], soft_wrap=True)
    broken = sum(result.verdict == "broken" for result in found)
    save_json(json_path, {"broken": broken, "checks": [asdict(result) for result in found]})
    return UserError.exit_code if broken else 0
