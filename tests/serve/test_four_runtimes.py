"""One adapter, four runtimes: PEFT, the merged model in Transformers, GGUF and our server write the same greedy text.

llama.cpp's place is taken by its graph, computed over the exported files. With PEFTUNE_LLAMA_PYTHON (see
tests/adapters/test_llama_cpp.py) llama.cpp itself writes as well.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_forward import logits_of, read
from peft import PeftModel
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from peftune.adapters.gguf.write_gguf import export_gguf
from peftune.adapters.merge.merge import merge
from peftune.model.base import Base
from peftune.model.lora import quiet_peft

pytest.importorskip("gguf", reason="the extra gguf is not installed")

KINDS = ["attention", "wide", "rslora", "uneven", "one-block"]
PROMPTS = ["the cat sat", "naïve café", "😀 and a tab\there", "x"]
TOKENS = 16
CLOSE = 2e-2  # llama.cpp looks GELU up in a table of float16: likeliest tokens that are nearer than this are a tie


@pytest.fixture(scope="module")
def running(base_directory: Path, adapters: dict[str, Path], start: Callable[..., Any]) -> Iterator[Any]:
    with start({kind: adapters[kind] for kind in KINDS}, base=str(base_directory)) as running:
        yield running


def ids_of(prompt: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """A text is continued as training saw it, behind an end of text."""
    return [tokenizer.eos_token_id, *tokenizer(prompt).input_ids]


def by_transformers(model: Any, prompt: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    ids = torch.tensor([ids_of(prompt, tokenizer)])
    with torch.no_grad():
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    return made[0, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


def by_gguf(model: Path, lora: Path, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    (fields, tensors), (_, parts) = read(model), read(lora)
    found = []
    for prompt in PROMPTS:
        ids, made = ids_of(prompt, tokenizer), list[int]()
        while len(made) < TOKENS and tokenizer.eos_token_id not in made:
            made.append(int(logits_of(torch.tensor(ids + made), fields, tensors, parts)[-1].argmax()))
        found.append(made)
    return found


def by_server(running: Any, kind: str, prompt: str) -> str:
    answer = running.post("/v1/completions", model=kind, prompt=prompt, max_tokens=TOKENS, temperature=0)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_same(
    kind: str, running: Any, base_directory: Path, adapters: dict[str, Path], tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:  # fmt: skip
    with quiet_peft():
        model: Any = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base_directory), adapters[kind]).eval()
    wanted = [by_transformers(model, prompt, tokenizer) for prompt in PROMPTS]
    with model.disable_adapter():
        assert [by_transformers(model, prompt, tokenizer) for prompt in PROMPTS] != wanted
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in wanted]

    assert [by_server(running, kind, prompt) for prompt in PROMPTS] == texts

    merge(adapters[kind], tmp_path / "merged", base=str(base_directory))
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    assert [by_transformers(merged, prompt, tokenizer) for prompt in PROMPTS] == wanted

    export_gguf(Base(base_directory, str(base_directory)), tmp_path / "gguf", [adapters[kind]])
    files = tmp_path / "gguf" / "model.gguf", tmp_path / "gguf" / f"{kind}.gguf"
    assert by_gguf(*files, tokenizer) == wanted
    if python := os.environ.get("PEFTUNE_LLAMA_PYTHON"):
        for found, ids in zip(by_llama_cpp(python, *files), wanted, strict=True):
            same = [a == b for a, b in zip(found["made"], ids, strict=False)]
            assert all(same) or found["gaps"][same.index(False)] < CLOSE, (found, ids)


def by_llama_cpp(python: str, model: Path, lora: Path) -> list[dict[str, Any]]:
    asked = {"model": str(model), "lora": str(lora), "prompts": PROMPTS, "tokens": TOKENS}
    program = Path(__file__).parents[1] / "adapters" / "llama_greedy.py"
    done = subprocess.run([python, program], input=json.dumps(asked), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]
