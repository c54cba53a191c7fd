"""What is tried for real: kernels on GPUs, a training step on each kind of base and of ranks, and the hub."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftune.cli.checks.result import CheckResult, bounded
from peftune.cli.launcher.configuration import has_engine
from peftune.model import quantized

_LIMIT = 300.0  # seconds of one program; a machine may be busy
_FACTS = ("-m", "peftune.cli.checks.torch_facts")
_RECIPE = """\
base: builtin:small
data: {train: text.txt, validation: 0, block_size: 16}
lora: {rank: 1}
optim: {steps: 1}
batch: {global_size: 2}
run: {eval_every: 0, save_every: 0}
"""


def torch_facts() -> tuple[dict[str, Any] | None, str]:
    """What `torch_facts` says, or None and why torch cannot be used."""
    answer = bounded(_FACTS, _LIMIT)
    return (None, answer.failure) if answer.failure is not None else (json.loads(answer.output), "")


def check_gpus(facts: dict[str, Any]) -> Iterator[CheckResult]:
    """Each GPU that torch finds, with a product of matrices on it; or why it finds none."""
    driver = facts["driver"]
    if facts["no_gpu"]:
        yield CheckResult("GPU", "broken", f"{facts['no_gpu']}; CUDA_VISIBLE_DEVICES= uses the CPU")
    elif not facts["gpus"]:
        yield CheckResult("GPU", "fine", "none that may be used here, the CPU does the work")
    for number, gpu in enumerate(facts["gpus"]):
        name = f"GPU {number}"
        what = f"{gpu['name']}, {gpu['bytes'] / 1e9:.0f} GB, compute capability {gpu['capability']}, driver {driver}"
        answer = bounded((*_FACTS, str(number)), _LIMIT)
        found = {} if answer.failure else json.loads(answer.output)
        if found.get("relative_error", 1.0) < 0.02:
            yield CheckResult(name, "fine", f"{what}, computes in {found['precision']}")
        else:
            reason = answer.failure or f"a product of matrices is wrong by {found['relative_error']:.0%}"
            advice = "driver, CUDA and torch must fit; CUDA_VISIBLE_DEVICES= uses the CPU"
            yield CheckResult(name, "broken", f"{what}: {reason}; {advice}")


def runs_to_try(gpus: int) -> dict[str, list[str]]:
    """A step of each way of training that is installed, by what it tells of, as arguments of peftune."""
    tries = {"a training step": ["train", "r.yaml"]}
    if quantized.is_available():
        for kind in ("int8", "nf4"):
            tries[f"{quantized.LIBRARIES[0]} ({kind})"] = ["train", "r.yaml", f"quantize={kind}"]
    tries["two processes (gloo)"] = ["launch", "cpu-2", "r.yaml"]
    if gpus > 1:
        tries["two GPUs (NCCL)"] = ["launch", "ddp", "r.yaml", "--processes", "2"]
    if has_engine():
        ranks = ["zero2", "r.yaml", "--processes", str(min(gpus, 2))] if gpus else ["cpu-2-zero2", "r.yaml"]
        tries["DeepSpeed (ZeRO-2)"] = ["launch", *ranks]
    return tries


def check_run(name: str, words: list[str]) -> CheckResult:
    """One training step, by the program itself in a directory that is removed afterwards."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        (folder / "r.yaml").write_text(_RECIPE, encoding="utf-8")
        (folder / "text.txt").write_text("one two three\n\nfour five six\n\nseven eight nine\n", encoding="utf-8")
        verb, *rest = words
        command = ["-m", "peftune", verb, "--quiet", *rest, "run.out=adapter"]
        answer = bounded(command, _LIMIT, folder, {"PEFTUNE_CACHE": str(folder / "cache")})
        if answer.failure is None and not (folder / "adapter" / "adapter_model.safetensors").is_file():
            return CheckResult(name, "broken", "it ended without an adapter; peftune train -v says more")
    if answer.failure is None:
        return CheckResult(name, "fine", "trained one step")
    return CheckResult(name, "broken", f"{answer.failure}; only what needs it is affected")


def check_hub() -> CheckResult:
    """Whether the hub answers, in which nothing is downloaded but the facts of one model."""
    code = "from huggingface_hub import HfApi; print(HfApi().model_info('gpt2', timeout=10).id)"
    answer = bounded(("-c", code), 60.0)
    if answer.failure is None:
        return CheckResult("hub", "fine", "it can be reached")
    advice = "bases and data by directory work without it; HTTPS_PROXY and HF_ENDPOINT name another way"
    return CheckResult("hub", "broken", f"{answer.failure[:200]}; {advice}")
