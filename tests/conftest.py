"""One tiny real GPT-2 and its tokenizer for all tests, built once; caches go to a temporary directory."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

    from peftune.inference.bank import AdapterBank


def pytest_configure(config: pytest.Config) -> None:
    """No test sees a GPU, so that all are the same on every machine; but `pytest -m gpu` runs those that need one."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


# What takes most time, in seconds of a core: 190 to 40. Where several tests run at a time, these files come first, so
# that none of them is what the others wait for at the end.
LONGEST = [
    "cli/test_quickstart.py", "distributed/test_same_adapter.py", "distributed/test_lost_ranks.py",
    "guides/test_journeys.py", "distributed/test_two_nodes.py", "test_install_page.py", "launch/test_exit_codes.py",
    "training/fleet/test_train_fleet.py", "gpu_rehearsal/test_training.py", "serve/test_data_parallel.py",
    "gpu_rehearsal/test_ranks.py", "benchmarks/test_commands.py", "launch/test_first_gpu_hour.py", "test_notebook.py",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first; tests marked `gpu` are skipped, by name and with the reason, where torch finds no device."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        turns = {str(Path(__file__).parent / file): turn for turn, file in enumerate(LONGEST)}
        items.sort(key=lambda item: turns.get(str(item.path), len(turns)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no CUDA device; where there is one: pytest -m gpu"))


# Time is measured in benchmarks/; a busy machine is no reason to fail.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

TEXT = ["the cat sat on the mat and the dog sat on the log", "naïve café, straße, 東京, 😀 and a tab\there\n"] * 4


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of a test reaches the user's cache, and no test goes to a hub; subprocesses inherit both."""
    for name in ("SIGINT", "SIGHUP"):  # ignored where the tests run in the background, and in all that they start
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
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


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer made on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<|endoftext|>", unk_token="<|endoftext|>"
    )


def random_gpt2(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> GPT2LMHeadModel:
    """Weights wide enough that no two logits are nearly equal: greedy choices are then a matter of function alone."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.4,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def fresh(tokenizer: PreTrainedTokenizerFast) -> Callable[[int], GPT2LMHeadModel]:
    """Makes a model of its own, to be changed or trained."""
    return lambda seed=0: random_gpt2(tokenizer, seed)


@pytest.fixture(scope="session")
def model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    return random_gpt2(tokenizer)


@pytest.fixture(scope="session")
def base(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a checkpoint directory."""
    directory = tmp_path_factory.mktemp("base")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


LINEAR = ["c_attn", "c_proj", "c_fc"]
KINDS: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"]},
    "wide": {"r": 24, "lora_alpha": 12, "target_modules": LINEAR},
    "rslora": {"r": 8, "lora_alpha": 4, "target_modules": ["c_fc", "mlp.c_proj"], "use_rslora": True},
    "uneven": {"r": 2, "target_modules": LINEAR, "rank_pattern": {"c_fc": 6}, "alpha_pattern": {"c_attn": 3}},
    "one-block": {"r": 3, "target_modules": ["attn.c_proj"], "layers_to_transform": [1]},
    "dora": {"r": 4, "target_modules": ["c_attn"], "use_dora": True},
    "pissa": {"r": 4, "target_modules": ["c_attn"], "init_lora_weights": "pissa"},
    "head": {"r": 4, "target_modules": ["c_attn", "lm_head"]},
    "whole": {"r": 4, "target_modules": ["c_fc"], "modules_to_save": ["ln_f"]},
}


@pytest.fixture(scope="session")
def base_directory(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The random model as a checkpoint."""
    directory = tmp_path_factory.mktemp("wide-base")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def adapters(base_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One plain PEFT adapter of each of `KINDS`, with random values."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2LMHeadModel

    from peftune.model.lora import quiet_peft

    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, settings) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        with quiet_peft(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = LoraConfig(task_type="CAUSAL_LM", **settings)
            peft_model = get_peft_model(GPT2LMHeadModel.from_pretrained(base_directory), config)
            for parameter in peft_model.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.2 * torch.randn_like(parameter)
            peft_model.save_pretrained(root / name)
    return {name: root / name for name in KINDS}


@pytest.fixture(scope="session")
def bank(base_directory: Path, adapters: dict[str, Path]) -> AdapterBank:
    """All of the adapters on their base; tests leave it as they found it."""
    from peftune.inference.bank import AdapterBank

    bank = AdapterBank(str(base_directory), device="cpu")
    for name, directory in adapters.items():
        bank.add(name, directory)
    return bank
