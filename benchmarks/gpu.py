"""The first hour on a GPU, in parts: what holds there, and where the time goes. `launch/first-gpu-hour.sh` runs all.

What training and decoding reach beside other programs is measured by `benchmarks.train` and `benchmarks.decode`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks.harness.machine import seconds_of
from benchmarks.harness.options import Setup, main
from benchmarks.harness.ours import TrainingRun
from benchmarks.harness.report import Result, compare, row
from benchmarks.harness.workers import ROOT, Channel, Contestant
from peftune.device import choose_device, device_name, nvidia_driver
from peftune.model.loss import by_torch
from peftune.model.train import cross_entropy
from peftune.model.train.attention import kernel_for

_STEPS, _LINES = 3, 40  # of the profile
_ALIGNED = 64  # elements; a row stride of so many suits every fast kernel
_LAUNCHES = (2048, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 16)


def holds(setup: Setup) -> Result:
    """What must hold before anything is timed: the device, the attention kernel, and the tests that need a GPU.

    python -m benchmarks.gpu holds [--tests tests/test_gpu.py]
    """
    device = choose_device(setup.arguments.device)
    facts: dict[str, Any] = {"device": device_name(device), "driver": nvidia_driver(), "cuda": torch.version.cuda}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        facts |= {"memory": found.total_memory, "capability": f"{found.major}.{found.minor}"}
    facts["attention"] = {
        f"{dtype}, heads of {width}": kernel_for(device, dtype, width).name
        for width in (64, 80)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    }
    if device.type == "cuda":
        facts["loss"] = {
            f"{dtype}": cross_entropy.description(device, dtype) for dtype in (torch.bfloat16, torch.float32)
        }
    report = setup.root / "tests.xml"
    marker = "gpu" if device.type == "cuda" else "not slow"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", "-m", marker]
    subprocess.run([*command, f"--junitxml={report}", *setup.arguments.tests.split()], cwd=ROOT, stdout=sys.stderr)
    result = Result("gpu", "what holds on this device", setup.settings(**facts))
    outcomes = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for case in ElementTree.parse(report).iter("testcase"):
        bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if bad is None else "skipped" if bad.tag == "skipped" else "failed"
        outcomes[outcome] += 1
        if bad is not None:
            result.notes.append(f"{outcome}: {case.get('name')}: {(bad.get('message') or '')[:300]}")
    result.rows += [
        row(f"tests {name}", f"tests {name}", "pytest", [count], "tests") for name, count in outcomes.items()
    ]
    result.failed = bool(outcomes["failed"]) or not outcomes["passed"]
    return result


def repeat(setup: Setup) -> Result:
    """Whether the same run twice, in bf16, gives the same adapter: as it comes, and with `run.deterministic`.

    python -m benchmarks.gpu repeat [--steps 20]
    """
    result = Result("gpu", "the same run twice", setup.settings())
    for deterministic in (False, True):
        hashes, seconds = [], []
        for number in range(2):
            name = f"repeat-{deterministic}-{number}"
            values = setup.recipe(name, optim={"lr": 1e-3, "steps": setup.arguments.steps})
            values["run"] |= {"precision": "bf16", "deterministic": deterministic, "device": setup.arguments.device}
            shutil.rmtree(values["run"]["out"], ignore_errors=True)  # of a part that was cut
            path = setup.root / f"{name}.json"
            path.write_text(json.dumps(values), encoding="utf-8")
            began = time.perf_counter()
            command = [sys.executable, "-m", "peftune", "train", "--quiet", str(path), "run.resume=never"]
            subprocess.run(command, check=True, stdout=sys.stderr)
            seconds.append(time.perf_counter() - began)
            adapter = Path(values["run"]["out"]) / "adapter_model.safetensors"
            hashes.append(hashlib.sha256(adapter.read_bytes()).hexdigest())
        equal = hashes[0] == hashes[1]
        what = "run.deterministic" if deterministic else "as it comes"
        result.notes.append(f"{what}: {'equal' if equal else 'NOT equal'}: {hashes[0][:16]} {hashes[1][:16]}")
        result.rows.append(row(f"repeat {what}", f"a run, {what}", "the clock", seconds, "s"))
        result.failed |= deterministic and not equal
    return result


def head(setup: Setup) -> Result:
    """The head's product into rows of the vocabulary's own length, and of the next multiple of 64 elements; and what
    follows it there, nats and gradient in place of the logits, by torch's operations and by the kernel.

    python -m benchmarks.gpu head [--shape small] [--tokens 4096]
    """
    shape, device = setup.arguments.shape, torch.device(setup.arguments.device)
    x = torch.randn(setup.arguments.tokens, shape.width, device=device, dtype=torch.bfloat16)
    w = torch.randn(shape.vocabulary, shape.width, device=device, dtype=torch.bfloat16)
    targets, nats = torch.zeros(len(x), device=device, dtype=torch.int64), torch.zeros(len(x), 1, device=device)
    room = torch.empty(len(x), shape.vocabulary, device=device)
    result = Result("gpu", "the head at two strides", setup.settings(tokens=len(x)))

    def add(name: str, work: str, done: float, unit: str, reason: str = "", **names: Any) -> None:
        rounds = range(0 if reason else setup.arguments.rounds)
        rates = [1e-9 * done / seconds_of(work, targets=targets, nats=nats, **names) for _ in rounds]
        result.rows.append(row(name, name.replace("head ", "head, rows of ", 1), "the clock", rates, unit, reason))

    lost, logits = cross_entropy.reason_against(x[:1].device, x.dtype), len(x) * shape.vocabulary
    for stride in (shape.vocabulary, -(-shape.vocabulary // _ALIGNED) * _ALIGNED):
        out = torch.empty(len(x), stride, device=device, dtype=torch.bfloat16)[:, : shape.vocabulary]
        add(f"head {stride}", "torch.mm(x, w, out=out)", 2 * logits * shape.width, "GFLOP/s", x=x, w=w.T, out=out)
        call = "way(room, out, targets, 0.0, nats, True)"
        add(f"head {stride}, loss by torch", call, logits, "Glogits/s", way=by_torch, room=room, out=out)
        call = "way(out, targets, 0.0, nats, True)"
        add(f"head {stride}, loss by the kernel", call, logits, "Glogits/s", lost, way=cross_entropy.by_kernel, out=out)
    for block, warps in _LAUNCHES:
        call = f"launch(out, targets, None, nats, True, {block}, {warps})"
        launch = None if lost else import_module("peftune.model.train.cross_entropy_kernel").launch
        name = f"head {stride}, loss by the kernel, {warps} warps on blocks of {block}"
        add(name, call, logits, "Glogits/s", lost, launch=launch, out=out)
    return result


def profile(setup: Setup) -> Result:
    """Where the time of a training step goes: torch's profiler over three steps, the operations that take most.

    python -m benchmarks.gpu profile [--shape small] [--batch 32]
    """
    from torch.profiler import ProfilerActivity

    run = TrainingRun(setup.recipe("profile"), setup.arguments.ours)
    on_gpu = run.run.accelerator.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    run.step()
    tokens, began = 0, time.perf_counter()
    with torch.profiler.profile(activities=activities) as profiled:
        for _ in range(_STEPS):
            tokens += run.step()
    wall = time.perf_counter() - began
    events = profiled.key_averages()
    kind = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    busy = sum(getattr(event, kind) for event in events) / 1e6
    launches = sum(event.count for event in events if event.key.startswith(("cudaLaunchKernel", "cuLaunchKernel")))
    syncs = sum(event.count for event in events if "Synchronize" in event.key)
    facts = {"tokens a step": tokens // _STEPS, "seconds a step, profiled": wall / _STEPS, "device busy": busy / wall}
    facts |= {"launches a step": launches / _STEPS, "synchronisations a step": syncs / _STEPS}
    result = Result("gpu", "where the time of a step goes", setup.settings(**run.settings(), **facts))
    for event in sorted(events, key=lambda event: -getattr(event, kind))[:_LINES]:
        milliseconds = getattr(event, kind) / 1e3 / _STEPS
        result.notes.append(f"{milliseconds:9.3f} ms  {event.count / _STEPS:7.1f} times a step  {event.key[:100]}")
    return result


def blocks(setup: Setup) -> Result:
    """Tokens a second against blocks a step: where one adapter leaves the device idle.

    python -m benchmarks.gpu blocks [--counts 1,2,4,8,16,32,64]
    """
    result = Result("gpu", "tokens a second against blocks a step", setup.settings())
    for count in map(int, setup.arguments.counts.split(",")):
        ours = setup.ours(f"{count} blocks", batch={"global_size": count})
        setup.interleave([ours])  # one at a time: no sleeper holds memory
        result.add([ours])
        result.rows.append(row(f"blocks {count}", f"{count} blocks a step", "the clock", ours.values(), "tok/s"))
    return result


def rows(setup: Setup) -> Result:
    """Tokens written a second by batches of so many rows, against Transformers' `generate`, and vLLM where it is.

    python -m benchmarks.gpu rows [--counts 1,8,64,256] [--new 64] [--precision bf16]

    On a GPU also with CUDA graphs off.
    """
    a, base = setup.arguments, str(setup.base)
    job = {"base": base, "adapters": setup.adapters(3)}
    job |= {key: vars(a)[key] for key in ("precision", "prompt", "new", "seed", "device")}
    result = Result("gpu", "tokens written a second", setup.settings(prompt=a.prompt, new=a.new, precision=a.precision))
    for count in map(int, a.counts.split(",")):
        none, three = [None] * count, list(itertools.islice(itertools.cycle(range(3)), count))
        worker = "benchmarks.decode:decode_worker"
        ours = Contestant(f"{count} rows", worker, {**job, "way": "ours", "rows": none}, "tok/s", True)
        mixed = Contestant(f"{count} rows, 3 adapters", worker, {**job, "way": "ours", "rows": three}, "tok/s", True)
        peer = Contestant(f"{count} rows, generate", worker, {**job, "way": "generate", "rows": none}, "tok/s")
        other = Contestant(f"{count} rows, vLLM", "benchmarks.gpu:vllm_worker", {**job, "rows": none}, "tok/s")
        eager = {"graphs": "0", "way": "ours", "rows": three}
        without = Contestant(f"{count} rows, 3 adapters, no CUDA graphs", worker, {**job, **eager}, "tok/s", True)
        others = [mixed, *[without] * (a.device == "cuda"), peer, other]
        everyone = [ours, *others]
        for contestant in everyone:  # one at a time: vLLM takes its memory at the start and keeps it
            setup.interleave([contestant])
        result.add(everyone)
        result.rows += [compare(f"rows {count}", f"write {count} rows", ours, each) for each in others]
    return result


def vllm_worker(job: dict[str, Any], channel: Channel) -> None:
    """As `decode.decode_worker`, by vLLM, on the base alone; its texts are as long as ours."""
    from benchmarks.decode import prompts_of

    vllm: Any = __import__("vllm")
    precision = {"fp32": "float32", "bf16": "bfloat16"}[job["precision"]]
    model = vllm.LLM(model=job["base"], dtype=precision, skip_tokenizer_init=True, gpu_memory_utilization=0.5)
    settings = vllm.SamplingParams(
        temperature=0, max_tokens=job["new"], min_tokens=job["new"], ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in prompts_of(job)]
    for _ in channel.rounds(way="vllm", rows=len(prompts)):
        start = time.perf_counter()
        outputs: Sequence[Any] = model.generate(prompts, settings, use_tqdm=False)
        written = sum(len(output.outputs[0].token_ids) for output in outputs)
        channel.send(value=written / (time.perf_counter() - start))


BENCHMARKS = {"holds": holds, "repeat": repeat, "head": head, "profile": profile, "blocks": blocks, "rows": rows}

if __name__ == "__main__":
    main("gpu", BENCHMARKS)
