"""One tiny real GPT-2 and its tokenizer for all tests, built once; caches go to a temporary directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, by name and with the reason, where torch finds no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


TEXT = ["the cat sat on the mat and the dog sat on the log", "naïve café, straße, 東京, 😀 and a tab\there\n"] * 4


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of a test reaches the user's cache, and no test goes to a hub; subprocesses inherit both."""
    before = dict(os.environ)
    os.environ["PEFTUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["HF_HUB_OFFLINE"] = "1"
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory: GPT-2 of 2 layers x 32, 64 positions, 300 tokens, random weights, dropouts as shipped."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=299, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens(["<|endoftext|>"])
    end = backend.token_to_id("<|endoftext|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.1,
        bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("tiny")
    GPT2LMHeadModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def distance() -> Callable[[Path, Path], float]:
    """`distance(out, other)`: relative distance of two adapters over all their elements, in float64."""
    from safetensors.torch import load_file

    def between(out: Path, other: Path) -> float:
        a, b = (load_file(path / "adapter_model.safetensors") for path in (out, other))
        assert a.keys() == b.keys()
        squares = sum(float((a[name].double() - b[name].double()).square().sum()) for name in a)
        return float((squares / sum(float(tensor.double().square().sum()) for tensor in a.values())) ** 0.5)

    return between
