"""What a run sets for its process, and the next one is free of: device, deterministic kernels, CUDA's allocator."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import PartialState
from safetensors.torch import load_file
from typer.testing import CliRunner

from peftune.cli.main import app
from peftune.config.recipe import Recipe
from peftune.errors import PeftuneError, ReportedElsewhere, UserError
from peftune.training import run
from peftune.training.distributed import start
from peftune.training.distributed.collectives import report_clearly
from peftune.training.inputs import RunInputs, read_inputs
from peftune.training.metrics import read_metrics
from peftune.training.planning import trace

Make = Callable[..., Recipe]


def test_the_device_of_a_run_is_not_that_of_the_run_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run on the CPU and one on the GPU in one process; the meta device stands for the GPU."""
    asked: list[str] = []

    def choose(device: str) -> torch.device:
        asked.append(device)
        return torch.device("cpu" if device == "cpu" else "cuda")

    monkeypatch.setattr(start, "choose_device", choose)
    monkeypatch.setattr(PartialState, "default_device", property(lambda _: torch.device("meta")))
    devices = [start.start([], str(tmp_path), device).device.type for device in ("cpu", "auto", "cpu")]
    assert devices == ["cpu", "meta", "cpu"]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert start.start([], str(tmp_path)).device.type == "cpu"
    assert asked == ["cpu", "auto", "cpu", "cpu"]


def test_a_gpu_that_does_not_compute_stops_a_run_before_it_reads(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(device: str) -> torch.device:
        raise UserError("Tesla V100 computes nothing")

    monkeypatch.setattr(start, "choose_device", choose)
    monkeypatch.setattr(run, "read_inputs_on_all_ranks", pytest.fail)
    with pytest.raises(UserError, match="Tesla V100 computes nothing"):
        run.train(recipe())


@pytest.mark.parametrize(("first", "kind"), [(True, UserError), (False, ReportedElsewhere)])
def test_ranks_that_share_a_gpu_are_told_how_many_there_may_be(first: bool, kind: type[PeftuneError]) -> None:
    ranks: Any = SimpleNamespace(num_processes=2, process_index=0 if first else 1, is_main_process=first)
    with pytest.raises(kind) as raised, report_clearly(ranks):
        raise torch.distributed.DistBackendError(
            "NCCL error in: ProcessGroupNCCL.cpp:3690, invalid usage (run with NCCL_DEBUG=WARN for details)\n"
            "Last error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 50000"
        )
    assert raised.value.exit_code == 2
    assert not first or "as many ranks on a machine as it has GPUs" in str(raised.value)


def test_the_start_line_and_the_record_name_the_device(recipe: Make, capsys: pytest.CaptureFixture[str]) -> None:
    made = recipe("run.device=cpu")
    run.train(made)
    assert "fp32, 1 process, CPU; fast steps" in " ".join(capsys.readouterr().err.split())
    assert next(iter(read_metrics(Path(made.run.out) / "metrics.jsonl")))["device"] == "CPU"


def test_deterministic_kernels_are_asked_for_during_the_run_and_no_longer(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    began, step, seen = start.start, run.train_step, set[bool]()

    def note_workspace(*given: Any) -> Any:
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # before CUDA can have started
        return began(*given)

    def note(*given: Any) -> Any:
        seen.add(torch.are_deterministic_algorithms_enabled())
        return step(*given)

    monkeypatch.setattr(run, "train_step", note)
    adapters = []
    for number, wanted in enumerate(("true", "true", "false")):
        if wanted == "true":
            monkeypatch.setattr(start, "start", note_workspace)
        run.train(recipe(f"run.deterministic={wanted}", f"run.out={tmp_path / str(number)}"))
        assert seen == {wanted == "true"} and not torch.are_deterministic_algorithms_enabled()
        seen.clear()
        monkeypatch.setattr(start, "start", began)
        adapters.append(load_file(tmp_path / str(number) / "adapter_model.safetensors"))
    for other in adapters[1:]:  # on a CPU it changes nothing
        assert all(torch.equal(other[name], tensor) for name, tensor in adapters[0].items())


def test_an_operation_without_a_deterministic_kernel_is_one_line() -> None:
    with pytest.raises(UserError, match=r"run.deterministic: put_ does not have a deterministic") as told:  # noqa: SIM117
        with start.same_order_of_sums(True):
            torch.zeros(4).put_(torch.tensor([1, 1]), torch.ones(2))
    assert "\n" not in str(told.value) and not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="another"), start.same_order_of_sums(True):
        raise RuntimeError("another")


@pytest.fixture
def inputs(recipe: Make) -> RunInputs:
    return read_inputs(recipe("batch.global_size=64", "batch.micro_size=auto", "data.block_size=16"))


def test_a_gpu_begins_with_as_many_blocks_as_are_foreseen_to_fit(
    inputs: RunInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that lends main memory never says that a GPU is full."""
    first, each = trace.activations(inputs.base.config, inputs.recipe, torch.bfloat16, 16, "cuda", False)
    shapes = trace.shapes_of(inputs.base.config, inputs.recipe.lora)
    held = trace.bytes_per_rank(shapes, "one", 1, "bf16").held
    share = min(64, len(inputs.corpus.train))
    for free, wanted in ((80e9, share), ((held + first + 2.5 * each) / trace.GPU_SHARE, 3), (1, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (int(free), 80 << 30))
        assert trace.first_micro_size(inputs, torch.bfloat16, "one", 1, "cuda") == wanted
    assert share > 3
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 << 30, 80 << 30))
    monkeypatch.setattr(trace, "GPU_TOKENS", 64)
    assert trace.first_micro_size(inputs, torch.bfloat16, "ddp", 2, "cuda") == 4


@pytest.mark.parametrize(
    ("release", "variables", "wanted"),
    [
        ("6.1.0-generic", {}, "expandable_segments:True"),
        ("5.15.90.1-microsoft-standard-WSL2", {}, None),  # github.com/pytorch/pytorch/issues/192330
        ("6.1.0-generic", {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, None),
        ("6.1.0-generic", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
    ],
)
@pytest.mark.skipif(platform.system() != "Linux", reason="elsewhere it is never asked for")
def test_a_training_process_lets_cuda_memory_grow_in_place(
    release: str, variables: dict[str, str], wanted: str | None, recipe: Make, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Scripts, `peftune launch` and `accelerate launch` all start `peftune train`."""
    monkeypatch.setattr(platform, "release", lambda: release)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("peftune.cli.output.dry_run.print_dry_run", lambda *_: None)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe().model_dump(mode="json")))
    assert CliRunner().invoke(app, ["train", str(path), "--dry-run"]).exit_code == 0
    assert os.environ.pop("PYTORCH_ALLOC_CONF", None) == wanted
