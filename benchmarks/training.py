"""The skeleton of targets that time training: gate, calibration, rounds in turns, one result."""

from __future__ import annotations

from argparse import Namespace

from benchmarks import gradients, machine
from benchmarks.measure import Result
from benchmarks.options import Setup
from benchmarks.rounds import Contestant, interleave
from peftune.config.recipe import RunSection

CALIBRATION = "calibration"
HAS_FAST = "fast" in RunSection.model_fields
"""Whether this peftune has a training step of its own beside that through Transformers and PEFT (`run.fast`)."""


def calibration(arguments: Namespace) -> Contestant:
    """GEMM peak and bandwidth, measured in the same rounds as what they are compared with."""
    sizes = machine.products(arguments.shape, 2048)
    job = {"sizes": sizes, "device": getattr(arguments, "device", "cpu")}
    return Contestant(CALIBRATION, "benchmarks.machine", job, "GFLOP/s")


def compare(setup: Setup, target: str, title: str, contestants: list[Contestant], at_once: bool = True) -> Result:
    """Gate, then rounds in turns, the calibration among them."""
    arguments = setup.arguments
    gate = gradients.passed(setup)
    everyone = [*contestants, calibration(arguments)]
    interleave(everyone, arguments.rounds, arguments.warmup, setup.environment(), at_once)
    result = Result(target, title, setup.told(), gate)
    result.add(everyone)
    return result


def ours_both_ways(setup: Setup) -> list[Contestant]:
    """peftune as it comes, and with `run.fast=false` where the recipe knows that key and the command leaves it open."""
    slow = HAS_FAST and not any(key.startswith("run.fast=") for key in setup.arguments.ours)
    return [setup.ours(), *([setup.ours("peftune run.fast=false", ["run.fast=false"])] if slow else [])]


def fastest(contestants: list[Contestant]) -> Contestant | None:
    """The best peer by median, or None where none ran."""
    ran = [c for c in contestants if c.rounds]
    return max(ran, key=lambda c: sorted(c.values())[len(c.rounds) // 2], default=None)
