"""What Transformers generates, on a pretended GPU: beams, and the samples of a run. Its loop waits at every token."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpu_recipe import values_over_text
from pretended_cuda import PretendedCUDA

from peftune.config.recipe import recipe_from
from peftune.inference.generate import text_generator
from peftune.inference.settings import GenerationSettings
from peftune.training import run
from peftune.training.metrics import read_metrics

BEAMS = GenerationSettings(max_new_tokens=6, temperature=0, beams=2, num_return_sequences=2, no_repeat_ngram_size=2)


@pytest.mark.parametrize("name", [None, "dora"])
def test_beams_keep_to_the_gpu(
    name: str | None, base_directory: Path, adapters: dict[str, Path], cuda: PretendedCUDA
) -> None:
    generate = text_generator(str(base_directory), adapters[name] if name else None, BEAMS, "bf16", "cuda")
    found = generate(["the cat", "on the log and"], None)
    assert not cuda.faults and len(found) == 4 and all(one.ids for one in found)


def test_samples_of_a_run_keep_to_the_gpu(tiny_base: Path, tmp_path: Path, cuda: PretendedCUDA) -> None:
    run_section = {"out": str(tmp_path / "adapter"), "precision": "bf16", "eval_every": 0, "samples": ["the cat"]}
    run.train(recipe_from(values_over_text(tiny_base, tmp_path) | {"run": run_section}, ["optim.steps=1"]))
    samples = [event["text"] for event in read_metrics(tmp_path / "adapter") if event["event"] == "sample"]
    assert not cuda.faults and len(samples) == 2
