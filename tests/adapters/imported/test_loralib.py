"""Files of microsoft/LoRA's loralib become PEFT adapters with the same logits, and nothing else in them is run."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from peftune.cli import main

WIDTH, BLOCKS = 32, 2
OUTPUTS = {"attn.c_attn": 3 * WIDTH, "attn.c_proj": WIDTH, "mlp.c_fc": 4 * WIDTH, "mlp.c_proj": WIDTH}
State = dict[str, torch.Tensor]
Captured = pytest.CaptureFixture[str]


def state_of(groups: int = 2, rank: int = 4, others: Sequence[str] = (), prefix: str = "transformer.") -> State:
    """What `lora_state_dict` returns for `MergedLinear` in c_attn, and `Linear` in `others`."""
    chance = torch.Generator().manual_seed(groups + rank)
    state = {}
    for block in range(BLOCKS):
        at = f"{prefix}h.{block}"
        state[f"{at}.attn.c_attn.lora_A"] = torch.randn(groups * rank, WIDTH, generator=chance) * 0.2
        state[f"{at}.attn.c_attn.lora_B"] = torch.randn(groups * WIDTH, rank, generator=chance) * 0.2
        for name in others:
            width = 4 * WIDTH if name == "mlp.c_proj" else WIDTH
            state[f"{at}.{name}.lora_A"] = torch.randn(rank, width, generator=chance) * 0.2
            state[f"{at}.{name}.lora_B"] = torch.randn(OUTPUTS[name], rank, generator=chance) * 0.2
    return state


def loralib_logits(base: Path, state: State, enabled: list[bool], alpha: float, ids: torch.Tensor) -> torch.Tensor:
    """loralib's forward, unmerged: F.linear of A, a 1d convolution in groups for B, then zeros between the parts."""
    model = GPT2LMHeadModel.from_pretrained(base).eval()

    def hook(a: torch.Tensor, b: torch.Tensor, merged: bool) -> Callable[..., torch.Tensor]:
        def add(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            after_a = F.linear(inputs[0], a)
            if not merged:
                return output + (after_a @ b.T) * (alpha / b.shape[1])
            after_b = F.conv1d(after_a.transpose(-2, -1), b.unsqueeze(-1), groups=sum(enabled)).transpose(-2, -1)
            padded = torch.zeros_like(output).view(-1, output.shape[-1])
            chosen = torch.zeros(3, WIDTH, dtype=torch.bool)
            chosen[enabled, :] = True
            padded[:, chosen.view(-1)] = after_b.reshape(-1, WIDTH * sum(enabled))
            return output + padded.view_as(output) * (alpha / b.shape[1])

        return add

    for block in range(BLOCKS):
        for suffix in OUTPUTS:
            parts = {part: next((t for n, t in state.items() if n.endswith(f"h.{block}.{suffix}.lora_{part}")), None)
                     for part in "AB"}  # fmt: skip
            if parts["A"] is not None and parts["B"] is not None:
                layer: Any = model.transformer.h[block].get_submodule(suffix)
                layer.register_forward_hook(hook(parts["A"], parts["B"], suffix == "attn.c_attn"))
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(
    ("groups", "parts", "enabled", "others", "prefix"),
    [
        (2, None, [True, False, True], (), "transformer."),
        (2, "q,k", [True, True, False], ("mlp.c_proj",), "module.transformer."),
        (1, "v", [False, False, True], ("attn.c_proj", "mlp.c_fc"), ""),
        (3, None, [True, True, True], (), "transformer."),
    ],
    ids=["published", "queries-and-keys", "values", "all"],
)
def test_logits_are_those_of_loralib(
    tiny_base: Path, tools: SimpleNamespace, tmp_path: Path, groups: int, parts: str | None, enabled: list[bool],
    others: tuple[str, ...], prefix: str,
) -> None:  # fmt: skip
    state = state_of(groups, 4, others, prefix)
    torch.save({"model_state_dict": state}, tmp_path / "e2e.pt")
    options = ["--parts", parts] if parts else []
    out = tmp_path / "out"
    asked = [str(tmp_path / "e2e.pt"), "--base", str(tiny_base), "--alpha", "24", "--out", str(out)]
    assert main.run(["adapters", "import", *asked, *options]) == 0
    ids = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(3))
    wanted = loralib_logits(tiny_base, state, enabled, 24.0, ids)
    found = tools.logits_with_peft(tiny_base, out)
    assert (found - wanted).abs().max() <= 1e-5 < (found - tools.logits_of(tiny_base)).abs().max()
    config = json.loads((out / "adapter_config.json").read_text())
    ranks = {config["r"], *config["rank_pattern"].values()}
    assert max(ranks) == 4 * groups and config["lora_alpha"] / config["r"] == 6.0


def test_the_published_size_names_its_base_and_says_what_is_assumed(tmp_path: Path, capsys: Captured) -> None:
    state = {}
    for block in range(24):
        at = f"transformer.h.{block}.attn.c_attn"
        state[f"{at}.lora_A"], state[f"{at}.lora_B"] = torch.ones(8, 1024) * 1e-3, torch.ones(2048, 4) * 1e-3
    torch.save({"model_state_dict": state}, tmp_path / "gpt2_md_lora_e2e.pt")
    asked = [str(tmp_path / "gpt2_md_lora_e2e.pt"), "--out", str(tmp_path / "out")]
    assert main.run(["adapters", "import", *asked]) == 0
    said = capsys.readouterr().out
    assert all(words in said for words in ("gpt2-medium", "alpha; 32 is taken", "queries and values are taken"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 64)
    assert config["base_model_name_or_path"] == "gpt2-medium"


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def _hostile(name: str, directory: Path) -> Any:
    state: dict[Any, Any] = state_of()
    key = "transformer.h.0.attn.c_attn.lora_B"
    changes: dict[str, Any] = {
        "code": {key: _Evil(directory / "ran")},
        "bias": {"transformer.h.0.attn.c_attn.bias": torch.zeros(96)},
        "whole": {"transformer.wte.weight": torch.zeros(300, 32)},
        "nan": {key: torch.full((64, 4), float("nan"))},
        "shape": {key: torch.zeros(65, 4)},
        "flat": {key: torch.zeros(64)},
        "whole-numbers": {key: torch.zeros(64, 4, dtype=torch.int64)},
        "repeated": {key: torch.zeros(1).expand(64_000_000, 4)},
        "meta": {key: torch.zeros(64, 4, device="meta")},
        "sparse": {key: torch.zeros(64, 4).to_sparse()},
        "ranks": {key: torch.zeros(64, 8), "transformer.h.0.attn.c_attn.lora_A": torch.zeros(16, 32)},
        "no-tensor": {key: "text"},
        "no-name": {3: torch.zeros(1)},
        "two-prefixes": {f"module.{key}": torch.zeros(64, 4)},
        "zero-rank": {key: torch.zeros(64, 0)},
        "far-block": {key.replace("h.0", "h.99999999"): torch.zeros(64, 4)},
    }
    if name in changes:
        return state | changes[name]
    return {"half": {k: v for k, v in state.items() if k != key}, "empty": {}, "list": [1, 2]}[name]


HOSTILE = ("code", "bias", "whole", "nan", "shape", "flat", "whole-numbers", "repeated", "meta", "sparse", "ranks",
           "no-tensor", "no-name", "two-prefixes", "zero-rank", "far-block", "half", "empty", "list")  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_line(name: str, tiny_base: Path, tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "bad.pt"
    torch.save(_hostile(name, tmp_path), file)
    assert main.run(["adapters", "import", str(file), "--base", str(tiny_base), "--out", str(tmp_path / "o")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"peftune: {file}: ") and err.count("\n") == 1 and len(err) < 600
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pt"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"x" * 1000, pickle.dumps({"a": 1}, 4)])
def test_broken_files_are_refused_in_one_line(content: bytes, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "bad.pt").write_bytes(content)
    assert main.run(["adapters", "import", str(tmp_path / "bad.pt"), "--out", str(tmp_path / "o")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--parts", "q,q"], "expected some of q, k, v"),
        (["--parts", "q"], "name 2 of q, k, v"),
        (["--alpha", "0"], "expected a number above 0"),
        (["--rank", "2"], "keeps its rank"),
        ([], "pass the base"),
    ],
)
def test_what_does_not_go_together_is_refused(
    options: list[str], words: str, tiny_base: Path, tmp_path: Path, capsys: Captured
) -> None:
    torch.save(state_of(), tmp_path / "a.pt")
    base = ["--base", str(tiny_base)] if options else []
    asked = ["adapters", "import", str(tmp_path / "a.pt"), *base, "--out", str(tmp_path / "o")]
    assert main.run([*asked, *options]) == 2
    assert words in capsys.readouterr().err
