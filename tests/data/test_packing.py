"""Packing places every scored token exactly once, and wastes little."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftune.config import Source
from peftune.data.batches import Blocks
from peftune.data.packing import cut_into_windows, pack
from peftune.data.store import prepare

LENGTHS = st.lists(st.integers(2, 90), min_size=1, max_size=60).map(np.array)
BLOCK = st.integers(8, 40)


def packed(lengths, block_size):
    return pack(cut_into_windows(lengths, block_size), block_size)[0]


@given(lengths=LENGTHS, block_size=BLOCK)
def test_windows_continue_each_other_with_one_token_of_context(lengths, block_size):
    windows = cut_into_windows(lengths, block_size)
    example, start, stop = windows.example, windows.start, windows.stop
    for i, length in enumerate(lengths.tolist()):
        mine = example == i
        assert start[mine][0] == 0 and stop[mine][-1] == length
        assert np.array_equal(start[mine][1:], stop[mine][:-1] - 1)
    assert (stop - start >= 2).all() and (stop - start <= block_size).all()


@given(lengths=LENGTHS, block_size=BLOCK)
def test_every_target_is_predicted_exactly_once(lengths, block_size):
    packing = packed(lengths, block_size)
    targets = [np.zeros(length, dtype=int) for length in lengths.tolist()]
    for block in range(len(packing)):
        used = 0
        for span in packing.spans(block):
            used += int(packing.stop[span] - packing.start[span])
            targets[packing.example[span]][packing.start[span] + 1 : packing.stop[span]] += 1
        assert 2 <= used <= block_size
    assert packing.first[-1] == len(packing.example)
    for counts in targets:
        assert counts[0] == 0 and (counts[1:] == 1).all()


@given(lengths=LENGTHS, block_size=BLOCK)
def test_packing_is_best_fit(lengths, block_size):
    """No two blocks could be one: what opened the later of them would have gone into the earlier."""
    packing = packed(lengths, block_size)
    used = np.add.reduceat(packing.stop - packing.start, packing.first[:-1])
    assert len(used) < 2 or np.sort(used)[:2].sum() > block_size
    again = packed(lengths, block_size)
    assert np.array_equal(packing.example, again.example) and np.array_equal(packing.first, again.first)


def test_e2e_fills_its_blocks(gpt2_tokenizer, shared, write, tmp_path):
    source = shared / "e2e" / "valid.txt"
    if not source.is_file():
        pytest.skip(f"no {source}")
    pairs = [line.split("||") for line in source.read_text(encoding="utf-8").splitlines()]
    rows = "\n".join(json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs)
    path = write("e2e.jsonl", rows)
    store = prepare([Source(path=str(path))], gpt2_tokenizer, "gpt2", " ", "auto", tmp_path)
    assert len(store) == 4672
    assert packed(store.lengths, 1024).fill() >= 0.97


def test_a_window_in_which_nothing_is_scored_is_left_out(gpt2_tokenizer, write, tmp_path):
    prompt, completion = "word " * 100, "two words"
    path = write("long.jsonl", json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    store = prepare([Source(path=str(path))], gpt2_tokenizer, "gpt2", " ", "auto", tmp_path)
    blocks = Blocks.of(store, np.arange(1), 16)
    assert len(cut_into_windows(store.lengths, 16).example) > 5
    assert len(blocks) == 1 and blocks.tokens() == int(store.supervised_counts.sum()) == 3
    assert next(blocks.batches([0], 1)).supervised() == 3
