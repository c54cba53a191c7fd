"""A byte-level tokenizer of 300 tokens trained here, and the real one of GPT-2 where it lies beside the project."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from peftune.data.documents import Document, ReadStats
from peftune.data.lint.finding import Finding
from peftune.data.lint.text_rules import count_faults, findings_of
from peftune.data.tokens.encode import begin_of_text_id, end_of_text_id, tokenize_batch
from peftune.data.tokens.tiktoken_encoder import backends_of


@dataclass(frozen=True)
class Example:
    """One tokenised document: `ids` and `supervised` (n,), and the UTF-8 length of the scored text."""

    ids: np.ndarray
    supervised: np.ndarray
    supervised_bytes: int


@pytest.fixture
def lint() -> Callable[[Sequence[Document]], list[Finding]]:
    """What the rules about single texts find in documents."""

    def found(documents: Sequence[Document]) -> list[Finding]:
        stats = ReadStats()
        for document in documents:
            count_faults(document, stats.faults)
        return findings_of(stats.faults)

    return found


@pytest.fixture(scope="session")
def shared() -> Path:
    """Data beside the project, which is not part of it; a test skips what is absent."""
    return Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(["The cat sat on the mat. User: Assistant: Hello there.\n\n"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=engine, eos_token="<|endoftext|>", bos_token="<|endoftext|>", model_max_length=64
    )


@pytest.fixture(scope="session")
def gpt2_tokenizer(shared: Path) -> PreTrainedTokenizerFast:
    directory = shared / "gpt2-tokenizer"
    if not directory.is_dir():
        pytest.skip(f"no GPT-2 tokenizer in {directory}")
    return PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.fixture(scope="session")
def tokenize_documents() -> Callable[[Sequence[Document], PreTrainedTokenizerFast, str], list[Example]]:
    """Tokenises documents in one batch and cuts the result into one `Example` per document."""

    def tokenize(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, join: str) -> list[Example]:
        begin, end = begin_of_text_id(tokenizer), end_of_text_id(tokenizer)
        found = tokenize_batch(documents, backends_of(tokenizer), begin, end, join)
        cuts = np.cumsum(found.lengths)[:-1]
        ids, supervised = np.split(found.ids.astype(np.int64), cuts), np.split(found.supervised, cuts)
        return list(map(Example, ids, supervised, found.supervised_bytes.tolist())) if documents else []

    return tokenize


@pytest.fixture(scope="session")
def tokenize_document(tokenize_documents) -> Callable[[Document, PreTrainedTokenizerFast, str], Example]:
    return lambda document, tokenizer, join: tokenize_documents([document], tokenizer, join)[0]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """Writes a file below the test's directory and gives its path."""

    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return write
