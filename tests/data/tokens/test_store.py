"""Tokens are written once, mapped ever after, and never trusted when damaged."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fuzzing import damaged_json, damaged_values, deadline, fuzz
from hypothesis import given
from hypothesis import strategies as st

from peftune.config.data_section import Source
from peftune.data.documents import split_by_digest
from peftune.data.sources.read import read_documents
from peftune.data.sources.text_files import RuleCount
from peftune.data.tokens import pipeline
from peftune.data.tokens import store as store_module
from peftune.data.tokens.store import TokenStore, open_store, prepare
from peftune.errors import UserError
from peftune.files import sha256_of_values

ROWS = [{"text": f"The cat {i} sat. " * (i % 5 + 1)} for i in range(40)]
PAIRS = [{"prompt": f"p {i}", "completion": "äö " * (i % 3) + "c"} for i in range(23)]


@pytest.fixture
def rows(write) -> Source:
    return Source(path=str(write("rows.jsonl", "\n".join(map(json.dumps, ROWS)))))


@pytest.fixture
def pairs(write) -> Source:
    return Source(path=str(write("pairs.jsonl", "\n".join(map(json.dumps, PAIRS)))))


def equal(one: TokenStore, other: TokenStore) -> bool:
    names = ("lengths", "supervised_counts", "supervised_bytes", "digests")
    return (
        one.fingerprint == other.fingerprint
        and all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)
        and all(np.array_equal(one.ids(i), other.ids(i)) for i in range(len(one)))
        and all(np.array_equal(one.supervised(i), other.supervised(i)) for i in range(len(one)))
    )


def test_the_store_holds_exactly_what_the_tokenizer_gives(
    tokenize_document, rows, pairs, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(pipeline, "_BATCH_DOCUMENTS", 7)  # bits of a batch do not end on a byte
    store = prepare([rows, pairs], tokenizer, "t", " ", "auto", tmp_path)
    documents = [*read_documents(rows, "auto"), *read_documents(pairs, "auto")]
    assert len(store) == len(documents) == 63
    for i, document in enumerate(documents):
        example = tokenize_document(document, tokenizer, " ")
        assert np.array_equal(store.ids(i), example.ids)
        assert np.array_equal(store.supervised(i), example.supervised)
        assert store.lengths[i] == len(example.ids)
        assert store.supervised_counts[i] == example.supervised.sum()
        assert store.supervised_bytes[i] == example.supervised_bytes
    assert store.ids(0).dtype == np.int64 and store.supervised(0).dtype == bool


def test_a_window_is_a_slice(pairs, tokenizer, tmp_path):
    store = prepare([pairs], tokenizer, "t", " ", "auto", tmp_path)
    for i in range(len(store)):
        for start in range(int(store.lengths[i])):
            stop = max(start + 1, int(store.lengths[i]) - 2)
            ids, supervised = store.window(i, start, stop)
            assert np.array_equal(ids, store.ids(i)[start:stop])
            assert np.array_equal(supervised, store.supervised(i)[start:stop])


def test_a_second_call_maps_what_the_first_wrote(rows, tokenizer, tmp_path, monkeypatch):
    first = prepare([rows], tokenizer, "t", " ", "auto", tmp_path)

    def refuse(*_: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(store_module, "tokenized", refuse)
    second = prepare([rows], tokenizer, "t", " ", "auto", tmp_path)
    assert equal(first, second)


def test_progress_is_shown_on_a_slow_terminal_only(rows, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("peftune.console._PROGRESS_DELAY", 0.0)
    prepare([rows], tokenizer, "a", " ", "auto", tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    prepare([rows], tokenizer, "b", " ", "auto", tmp_path)
    assert "tokenising: 40 documents" in capsys.readouterr().err


def test_content_decides_not_the_path(rows, tokenizer, tmp_path, write):
    copy = Source(path=str(write("elsewhere/copy.jsonl", Path(rows.path).read_bytes())))
    prepare([rows], tokenizer, "t", " ", "auto", tmp_path)
    prepare([copy], tokenizer, "t", " ", "auto", tmp_path)
    assert len(list((tmp_path / "tokens").iterdir())) == 1


def test_whatever_changes_the_tokens_makes_another_entry(pairs, tokenizer, tmp_path):
    def entries() -> int:
        return len(list((tmp_path / "tokens").iterdir()))

    first = prepare([pairs], tokenizer, "t", " ", "auto", tmp_path)
    assert not equal(first, prepare([pairs], tokenizer, "t", "", "auto", tmp_path)) and entries() == 2
    prepare([pairs], tokenizer, "another", " ", "auto", tmp_path)
    assert entries() == 3
    prepare([pairs.model_copy(update={"text": "prompt"})], tokenizer, "t", " ", "auto", tmp_path)
    assert entries() == 4
    with open(pairs.path, "a") as file:
        file.write('\n{"prompt": "p", "completion": "more"}')
    assert len(prepare([pairs], tokenizer, "t", " ", "auto", tmp_path)) == len(first) + 1


def test_the_fingerprint_is_of_the_tokens_whatever_file_they_came_from(write, tokenizer, tmp_path):
    sources = [write("a.txt", "one\n\ntwo"), write("a.jsonl", '{"text": "one"}\n{"text": "two"}')]
    first, second = (prepare([Source(path=str(p))], tokenizer, "t", " ", "auto", tmp_path) for p in sources)
    assert first.fingerprint == second.fingerprint
    other = prepare([Source(path=str(write("b.txt", "two\n\none")))], tokenizer, "t", " ", "auto", tmp_path)
    assert other.fingerprint != first.fingerprint


@pytest.mark.parametrize("name", ["ids.bin", "supervised.bin", "documents.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "empty"])
def test_a_damaged_entry_is_built_again(name, damage, rows, tokenizer, tmp_path):
    good = prepare([rows], tokenizer, "t", " ", "auto", tmp_path)
    [entry] = (tmp_path / "tokens").iterdir()
    content = (entry / name).read_bytes()
    (entry / name).unlink()  # a new file: the first store stays mapped to the old one
    if damage != "gone":
        changed = {"cut": content[:-3], "flip": bytes([content[0] ^ 1]) + content[1:], "empty": b""}[damage]
        (entry / name).write_bytes(changed)
    assert open_store(entry, entry.name, len(tokenizer)) is None
    assert equal(prepare([rows], tokenizer, "t", " ", "auto", tmp_path), good)
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == [entry.name]
    assert open_store(entry, entry.name, len(tokenizer)) is not None


@pytest.mark.parametrize("there", ["the entry of another text", "an entry without its key", "a file"])
def test_what_stands_under_the_name_of_an_entry_makes_room(there, rows, pairs, tokenizer, tmp_path):
    good = prepare([rows], tokenizer, "t", " ", "auto", tmp_path)
    [entry] = (tmp_path / "tokens").iterdir()
    shutil.rmtree(entry)
    if there == "a file":
        entry.write_text("")
    else:
        prepare([pairs], tokenizer, "t", " ", "auto", tmp_path)
        [other] = (tmp_path / "tokens").iterdir()
        other.rename(entry)
    if there == "an entry without its key":  # as older releases wrote them
        meta = json.loads((entry / "meta.json").read_text())
        del meta["key"], meta["sha256_of_meta"]
        meta["sha256_of_meta"] = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
        (entry / "meta.json").unlink()
        (entry / "meta.json").write_text(json.dumps(meta))
    assert equal(prepare([rows], tokenizer, "t", " ", "auto", tmp_path), good)
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == [entry.name]


@fuzz(40)
@given(data=st.data(), sealed=st.booleans())
def test_any_meta_of_an_entry_is_read_or_built_again(data, sealed, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "fuzzed-entry"
    if not folder.exists():
        (folder.parent / "fuzzed.txt").write_text("one\n\ntwo")
        prepare([Source(path=str(folder.parent / "fuzzed.txt"))], tokenizer, "t", " ", "auto", folder)
        [made] = (folder / "tokens").iterdir()
        (folder / "valid.json").write_bytes((made / "meta.json").read_bytes())
    [entry] = (folder / "tokens").iterdir()
    meta = json.loads((folder / "valid.json").read_bytes())
    key = meta["key"]
    del meta["sha256_of_meta"]
    if sealed:
        changed = data.draw(damaged_values(meta).filter(lambda value: isinstance(value, dict)))
        content = json.dumps(changed | {"sha256_of_meta": sha256_of_values(changed)}).encode()
    else:
        content = data.draw(damaged_json(meta))
    (entry / "meta.json").unlink()
    (entry / "meta.json").write_bytes(content)
    with deadline():
        store = open_store(entry, key, len(tokenizer))
    assert store is None or (len(store) == 2 and type(store.report.blank) is int)


def test_a_failure_leaves_nothing_behind(write, tokenizer, tmp_path):
    source = Source(path=str(write("a.jsonl", '{"text": "a"}\nbroken')))
    with pytest.raises(UserError, match=r"a\.jsonl:2"):
        prepare([source], tokenizer, "t", " ", "auto", tmp_path / "cache")
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def _prepare_in_child(source: Source, tokenizer: object, cache: Path, barrier: object, results: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    store = prepare([source], tokenizer, "t", " ", "auto", cache)  # type: ignore[arg-type]
    results.put((store.fingerprint, int(store.lengths.sum())))  # type: ignore[attr-defined]


def test_processes_that_prepare_the_same_entry_at_once_agree(rows, tokenizer, tmp_path):
    context = multiprocessing.get_context("forkserver")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (rows, tokenizer, tmp_path, barrier, results)
    children = [context.Process(target=_prepare_in_child, args=arguments) for _ in range(2)]
    for child in children:
        child.start()
    found = {results.get(timeout=60) for _ in children}
    for child in children:
        child.join(timeout=60)
    [entry] = (tmp_path / "tokens").iterdir()
    whole = open_store(entry, entry.name, len(tokenizer))
    assert whole is not None and found == {(whole.fingerprint, int(whole.lengths.sum()))}


def test_many_that_find_a_damaged_entry_at_once_mend_it(rows, tokenizer, tmp_path):
    good = prepare([rows], tokenizer, "t", " ", "auto", tmp_path)
    [entry] = (tmp_path / "tokens").iterdir()
    for _ in range(5):
        (entry / "meta.json").write_text("{")
        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(prepare, [rows], tokenizer, "t", " ", "auto", tmp_path) for _ in range(4)]
            assert all(equal(job.result(), good) for job in jobs)
        assert [path.name for path in (tmp_path / "tokens").iterdir()] == [entry.name]
        assert open_store(entry, entry.name, len(tokenizer)) is not None


def test_the_cache_follows_the_environment(rows, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTUNE_CACHE", str(tmp_path / "mine"))
    prepare([rows], tokenizer, "t", " ", "auto")
    assert len(list((tmp_path / "mine" / "tokens").iterdir())) == 1


@pytest.mark.parametrize("why", ["a file is in the way", "its parent is no directory", "no home", "read-only"])
def test_a_cache_that_cannot_be_written_is_done_without(why, rows, tokenizer, write, tmp_path, monkeypatch, capsys):
    store_module._say_there_is_no_cache.cache_clear()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    in_the_way, cache = write("file", "not a directory"), None
    if why == "no home":  # as in a container whose user stands in no list

        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("PEFTUNE_CACHE")
        monkeypatch.setattr(Path, "home", no_home)
    elif why == "read-only":  # root may write in any directory, so the system is asked in its place
        cache = tmp_path / "cache"
        monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(str(cache)))
    else:
        cache = in_the_way if why.startswith("a file") else in_the_way / "below"
    there = prepare([rows], tokenizer, "t", " ", "auto", tmp_path / "good")
    assert equal(prepare([rows], tokenizer, "t", " ", "auto", cache), there)
    assert equal(prepare([rows], tokenizer, "t", " ", "auto", cache), there)
    assert capsys.readouterr().err.count("no cache can be written there, so texts are read again each time") == 1
    assert list((tmp_path / "tmp").iterdir()) == []
    assert in_the_way.read_text() == "not a directory"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no owner and mode in this sense")
def test_a_cache_that_may_be_read_but_not_written_is_used(rows, tokenizer, tmp_path, monkeypatch, capsys):
    good = prepare([rows], tokenizer, "t", " ", "auto", tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(store_module, "tokenized", None)  # it is not tokenised again
    assert equal(prepare([rows], tokenizer, "t", " ", "auto", tmp_path), good)
    assert capsys.readouterr().err == ""


def test_how_files_were_cut_is_known_from_the_cache_too(write, tokenizer, tmp_path):
    for name, text in (("a.txt", "one\n\ntwo"), ("b.txt", "a<|endoftext|>b"), ("c.txt", " ")):
        write(f"x/{name}", text)
    sources = [Source(path=str(tmp_path / "x")), Source(path=str(write("rows.jsonl", '{"text": "r"}')))]
    first, again = (prepare(sources, tokenizer, "t", " ", "auto", tmp_path / "cache") for _ in range(2))
    assert first.cuts == again.cuts
    whole, cut = again.cuts[0]
    assert whole == RuleCount("file", 2, 1, 1, {"file": 1, "wide-gap": 1, "blank-line": 2})
    assert cut == RuleCount("endoftext", 1, 0, 2) and again.cuts[1] == []


def test_several_text_files_are_a_document_each_whichever_way_they_are_named(write, tokenizer, tmp_path):
    paths = [write(f"x/{name}.txt", f"{name}\n\nmore") for name in "ab"]
    one = prepare([Source(path=str(tmp_path / "x"))], tokenizer, "t", " ", "auto", tmp_path / "cache")
    two = prepare([Source(path=str(path)) for path in paths], tokenizer, "t", " ", "auto", tmp_path / "cache")
    assert len(one) == 2 and one.fingerprint == two.fingerprint
    assert len(prepare([Source(path=str(paths[0]))], tokenizer, "t", " ", "auto", tmp_path / "cache")) == 2


def test_blank_documents_are_counted_even_from_the_cache(write, tokenizer, tmp_path):
    source = Source(path=str(write("a.jsonl", '{"text": "a"}\n{"text": " "}')))
    assert [prepare([source], tokenizer, "t", " ", "auto", tmp_path).report.blank for _ in range(2)] == [1, 1]


def test_a_vocabulary_above_65536_is_stored_in_32_bits(write, tokenizer, tmp_path):
    import copy

    large = copy.deepcopy(tokenizer)
    large.add_tokens([f"<{i}>" for i in range(66_000)])
    source = Source(path=str(write("a.txt", "cat <65999>")))
    assert len(large) - 1 in prepare([source], large, "t", " ", "auto", tmp_path).ids(0)


DIGESTS = st.lists(st.integers(0, 2**64 - 1) | st.sampled_from([0, 5, 2**64 - 1]), max_size=50).map(
    lambda values: np.array(values, dtype=np.uint64)
)


@given(digests=DIGESTS, fraction=st.floats(0, 0.999))
def test_the_split_is_by_content(digests, fraction):
    train, validation = split_by_digest(digests, fraction)
    assert sorted([*train, *validation]) == list(range(len(digests)))
    assert list(train) == sorted(train) and list(validation) == sorted(validation)
    assert not set(digests[train].tolist()) & set(digests[validation].tolist())
    if fraction == 0:
        assert len(validation) == 0
    elif len(set(digests.tolist())) > 1:
        assert len(train) and len(validation)


def test_a_document_keeps_its_side_when_others_come():
    digests = np.random.default_rng(0).integers(0, 2**64, 5000, dtype=np.uint64)
    _, few = split_by_digest(digests[:1000], 0.1)
    _, many = split_by_digest(digests, 0.1)
    assert set(few) == {i for i in many if i < 1000}
    assert 0.08 < len(many) / 5000 < 0.12


def test_equal_documents_from_several_files_fall_on_one_side(write, tokenizer, tmp_path):
    a = write("a.txt", "\n\n".join(f"text {i}" for i in range(50)))
    b = write("b.jsonl", "\n".join(json.dumps({"text": f"text {i}"}) for i in range(50)))
    store = prepare([Source(path=str(a)), Source(path=str(b))], tokenizer, "t", " ", "auto", tmp_path)
    _, validation = split_by_digest(store.digests, 0.2)
    assert {i % 50 for i in validation if i < 50} == {i % 50 for i in validation if i >= 50}
