"""Documents in, tokens out, in order: one thread reads while others tokenise, and only a few batches are in memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from peftune.data.documents import Document
from peftune.data.tokens.encode import Examples, begin_of_text_id, end_of_text_id, parts_of, tokenize_batch
from peftune.data.tokens.tiktoken_encoder import backends_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 10_000, 500_000
_WORTH_A_PROOF = 4_000_000  # characters; to prove tiktoken equal costs GPT-2's tokenizer half a second
_MOST_THREADS = 8  # one thread reads 40 MB/s or so, and no more of them would be busy


def tokenized(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast, join: str, parse: bool = False
) -> Iterator[Examples]:
    """Batches of tokenised documents, in the order of the documents.

    tiktoken replaces the tokenizer's own backend once the corpus is long enough to pay for the proof. Both release
    the GIL.
    """
    backends, begin, end = backends_of(tokenizer, parse), begin_of_text_id(tokenizer), end_of_text_id(tokenizer)
    characters = 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(_MOST_THREADS, cores)
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Examples]] = deque()
        for batch, size in _batches(documents):
            if characters <= _WORTH_A_PROOF < characters + size:
                backends.choose([text for document in batch for text, _ in parts_of(document, join)])
            characters += size
            waiting.append(pool.submit(tokenize_batch, batch, backends, begin, end, join))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _batches(documents: Iterable[Document]) -> Iterator[tuple[list[Document], int]]:
    """Documents in groups small enough for memory and large enough for one call, with their characters."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text) + len(document.prompt or "")
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch, characters
            batch, characters = [], 0
    if batch:
        yield batch, characters
