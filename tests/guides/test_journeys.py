"""Every command of docs/guides is run, in order, at small size; what is small about it stands in this table."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from journey import GUIDES, Journey, Reader

TEN, THREE = "arabic braille cuneiform cyrillic ethiopic greek hangul mongolian tibetan vai", "arabic greek vai"
SMALL_XL = "base=builtin:small optim.steps=2 data.block_size=64 batch.global_size=2"
JOURNEYS = [
    Journey(
        "stories",
        smaller={"range(60)": "range(12)", "epochs: 12": "steps: 2", "save_every: 10": "save_every: 0",
                 "peftune plan": "peftune plan --no-time"},
        leaves=("cleaned/report.txt", "stories.html", "models/stories/model.safetensors"),
    ),
    Journey(
        "support",
        smaller={"range(300)": "range(80)", "epochs: 4": "steps: 2", "127.0.0.1:8000": "127.0.0.1:PORT",
                 "serve --base": "serve --port PORT --base", "range(40)": "range(4)",
                 "--data prose=builtin:docs/heldout": "--data prose=make_tickets.py"},
        leaves=("held.json", "answers.jsonl"),
    ),
    Journey(
        "gpt2-xl",
        smaller={"peftune train xl.yaml": f"peftune train xl.yaml {SMALL_XL}", "builtin:docs/heldout": "xl.yaml"},
        elsewhere={"peftune doctor": "tries each way of training for a minute; tests/cli/test_doctor.py"},
        leaves=("adapters/xl-loftq", "models/xl/merge.json"),
    ),
    Journey(
        "eight-gpus",
        smaller={"peftune launch ddp": "peftune launch cpu-2", "peftune launch zero2": "peftune launch cpu-2-zero2",
                 "epochs: 4": "steps: 12", "sleep 1": "sleep 0.2", "builtin:docs/heldout": "node.yaml",
                 "global_size: 16": "global_size: 4", "save_every: 25": "save_every: 0"},
        elsewhere={
            "torchrun --nproc-per-node 8 -m peftune train node.yaml": "tests/distributed starts ranks so",
            "peftune launch cpu-2 node.yaml --nodes 2 --node-rank 0 --master-addr node-0": "needs a second machine",
            "sbatch --nodes 2 launch/slurm.sbatch ddp node.yaml": "needs SLURM",
        },
        leaves=("node.html", "adapters/node/adapter_model.safetensors"),
    ),
    Journey(
        "ten-domains",
        smaller={TEN: THREE, "epochs: 6": "steps: 1", "127.0.0.1:8000": "127.0.0.1:PORT", "[:240]": "[:80]",
                 "serve --base": "serve --port PORT --base", " --data tibetan=held/tibetan.txt": "",
                 "--prompts 40": "--prompts 8", "builtin:code/heldout": "make_texts.py"},
        leaves=("matrix.json", "routing.json"),
    ),
    Journey(
        "experiment",
        smaller={"epochs: 5": "steps: 2", "warmup: 20": "warmup: 1", "meanings[8:24]": "meanings[8:12]",
                 "--max-new-tokens 48": "--max-new-tokens 8", "--beams 4": "--beams 2"},
        leaves=("scores.json", "eval.json", "data.json", "experiment.html"),
    ),
]  # fmt: skip


def test_no_guide_is_missing_here() -> None:
    assert {path.stem for path in GUIDES.glob("*.md")} == {journey.page for journey in JOURNEYS}


@pytest.mark.slow
@pytest.mark.parametrize("journey", JOURNEYS, ids=lambda journey: journey.page)
def test_every_command_of_a_guide_works(
    journey: Journey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if shutil.which("curl") is None and any("curl " in text for _, text in journey.blocks()):
        pytest.skip("curl is not installed")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    reader = Reader(capfd, tmp_path / "bin")
    try:
        reader.follow(journey)
    finally:
        reader.leave()
