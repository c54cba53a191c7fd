"""Packing places every scored token exactly once, and wastes little."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftune.config.data_section import Source
from peftune.data.batches import NOT_SCORED, Batch, Blocks
from peftune.data.packing import Windows, cut_into_windows, pack
from peftune.data.tokens.store import prepare

LENGTHS = st.lists(st.integers(2, 90), min_size=1, max_size=60).map(np.array)
BLOCK = st.integers(8, 40)


def scored_in(batch: Batch) -> int:
    return int((batch.targets != NOT_SCORED).sum())


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


def plain_best_fit(sizes: list[int], block_size: int) -> list[list[int]]:
    """Best-fit decreasing in so many words: each window into the fullest block with room, of equals the last used."""
    blocks: list[list[int]] = []
    free: list[tuple[int, int, int]] = []  # free space, how long ago it became so (fewer is later), block
    for clock, window in enumerate(sorted(range(len(sizes)), key=lambda i: -sizes[i])):
        fitting = [entry for entry in free if entry[0] >= sizes[window]]
        space, _, block = taken = min(fitting, default=(block_size, 0, len(blocks)))
        if taken in free:
            free.remove(taken)
        else:
            blocks.append([])
        blocks[block].append(window)
        free.append((space - sizes[window], -clock, block))
    return [sorted(block) for block in blocks]


@given(sizes=st.lists(st.integers(2, 40), max_size=80), block_size=st.integers(40, 90))
def test_packing_by_sizes_equals_packing_one_by_one(sizes, block_size):
    stop = np.array(sizes, dtype=np.int64)
    packing, order = pack(Windows(np.arange(len(sizes)), np.zeros_like(stop), stop), block_size)
    assert [order[list(packing.spans(b))].tolist() for b in range(len(packing))] == plain_best_fit(sizes, block_size)


ROWS = st.lists(
    st.tuples(st.text("ab c", max_size=30), st.text("abé", min_size=1, max_size=60)), min_size=1, max_size=9
)


@settings(max_examples=40)
@given(rows=ROWS, block_size=st.integers(4, 40), micro_size=st.integers(1, 4), packed_rows=st.booleans())
def test_batches_are_those_of_a_plain_loop(rows, block_size, micro_size, packed_rows, tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("batches")
    lines = "\n".join(json.dumps({"prompt": prompt, "completion": text}) for prompt, text in rows)
    (directory / "a.jsonl").write_text(lines)
    store = prepare([Source(path=str(directory / "a.jsonl"))], tokenizer, "t", " ", "auto", directory)
    blocks = Blocks.of(store, np.arange(len(store))[::-1], block_size)
    packing = blocks.packing
    chosen = np.arange(len(blocks))[::-1]
    seen = 0
    for batch in blocks.batches(chosen, micro_size, packed_rows):
        seen += scored_in(batch)
        segments = np.zeros(batch.ids.shape, int) if batch.segments is None else batch.segments.numpy()
        for y in range(len(segments)):
            for number in range(segments[y].max() + 1):
                place = np.flatnonzero(segments[y] == number)
                assert (np.diff(place) == 1).all()
                ids, positions, targets = (t[y, place].tolist() for t in (batch.ids, batch.positions, batch.targets))
                spans = [
                    (
                        i,
                        store.window(
                            len(store) - 1 - int(packing.example[i]), int(packing.start[i]), int(packing.stop[i])
                        ),
                    )
                    for i in range(len(packing.example))
                ]
                assert positions == list(range(len(ids)))
                assert any(
                    tokens.tolist() == ids
                    and targets == [*np.where(scored, tokens, NOT_SCORED)[1:].tolist(), NOT_SCORED]
                    for _, (tokens, scored) in spans
                )
            assert (batch.targets[y].numpy()[segments[y] < 0] == NOT_SCORED).all()
    assert seen == blocks.tokens() == blocks.tokens_of(chosen)
    for i in range(len(packing.example)):
        window = int(packing.start[i]), int(packing.stop[i])
        assert blocks.supervised[i] == store.window(len(store) - 1 - int(packing.example[i]), *window)[1][1:].sum()


def test_a_block_may_be_one_document(tokenizer, tmp_path):
    rows = [{"prompt": "cat " * n, "completion": "the dog"} for n in (1, 9, 3, 40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    store = prepare([Source(path=str(tmp_path / "a.jsonl"))], tokenizer, "t", " ", "auto", tmp_path)
    block = int(store.lengths[1])
    blocks = Blocks.of(store, np.arange(4), block, alone=True)
    assert blocks.packing.example.tolist() == [0, 1, 2, 3]  # the beginning of the last, a prompt alone, teaches nothing
    assert blocks.tokens() == Blocks.of(store, np.arange(4), block).tokens()
    (batch,) = blocks.batches([2, 0], 2)
    assert len(batch.ids) == 2 and scored_in(batch) == blocks.tokens_of([0, 2])
    assert batch.ids[0].tolist() == store.window(2, 0, int(store.lengths[2]))[0].tolist()


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
    assert scored_in(next(blocks.batches([0], 1))) == 3
