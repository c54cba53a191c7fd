"""The cache is believed only where nobody else can have written it, and what it holds is what was read."""

from __future__ import annotations

import hashlib
import json
import os
import random
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from fuzzing import damaged_json, deadline, fuzz
from hypothesis import given

from peftune.config.data_section import Source
from peftune.data.tokens import store as store_module
from peftune.data.tokens.entry import FILES
from peftune.data.tokens.store import TokenStore, prepare
from peftune.errors import UserError
from peftune.model.base import Base
from peftune.model.fingerprint import remembered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Fill = Callable[[], TokenStore]
NOBODY = 65534
needs_owners = pytest.mark.skipif(os.name == "nt", reason="Windows has no owner and mode in this sense")
needs_root = pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="gives files to another user")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fill(cache: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Fill:
    """Tokenises a small corpus into the cache, or finds it there."""
    (tmp_path / "a.txt").write_text("\n\n".join(f"the cat {i} sat" for i in range(30)))
    return lambda: prepare([Source(path=str(tmp_path / "a.txt"))], tokenizer, "t", " ", "auto")


def entry_of(cache: Path) -> Path:
    [entry] = (cache / "tokens").iterdir()
    return entry


def tokens_of(store: TokenStore) -> list[int]:
    return np.concatenate([store.ids(i) for i in range(len(store))]).tolist()


def overwrite(path: Path, content: bytes) -> None:
    """Other bytes under the old times."""
    before = path.stat()
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(stat.S_IMODE(before.st_mode))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


LEVELS = ["", "tokens", "ENTRY", *(f"ENTRY/{name}" for name in ("meta.json", *FILES))]


@needs_owners
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("how", ["group", "world", pytest.param("owner", marks=needs_root)])
def test_a_cache_that_others_may_write_is_refused(cache: Path, fill: Fill, level: str, how: str) -> None:
    fill()
    path = cache / level.replace("ENTRY", f"tokens/{entry_of(cache).name}")
    if how == "owner":
        os.chown(path, NOBODY, NOBODY)
    else:
        path.chmod(stat.S_IMODE(path.stat().st_mode) | (0o020 if how == "group" else 0o002))
    with pytest.raises(UserError, match="belongs to user" if how == "owner" else "others may write") as caught:
        fill()
    assert str(path) in str(caught.value) and "PEFTUNE_CACHE" in str(caught.value)


@needs_owners
@pytest.mark.parametrize("level", ["tokens", "ENTRY", "ENTRY/meta.json", "ENTRY/ids.bin"])
def test_a_link_in_the_cache_is_refused(cache: Path, fill: Fill, tmp_path: Path, level: str) -> None:
    fill()
    path = cache / level.replace("ENTRY", f"tokens/{entry_of(cache).name}")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link in the cache"):
        fill()


@needs_owners
def test_the_cache_itself_may_lie_elsewhere(cache: Path, fill: Fill, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir(mode=0o755)
    cache.symlink_to(tmp_path / "disk")
    assert fill().fingerprint == fill().fingerprint


@needs_owners
def test_any_umask_makes_a_private_cache(cache: Path, fill: Fill, tiny_base: Path) -> None:
    before = os.umask(0)
    try:
        fill()
        assert Base(tiny_base).fingerprint == Base(tiny_base).fingerprint
    finally:
        os.umask(before)
    fill()
    assert not [path for path in [cache, *cache.rglob("*")] if path.stat().st_mode & 0o022]


def rewrite(entry: Path, ids: bytes, whole: bool) -> None:
    """Other tokens with their hash; `whole`: as somebody would who knows how meta.json is made."""
    overwrite(entry / "ids.bin", ids)
    meta = json.loads((entry / "meta.json").read_text())
    meta["sha256"]["ids.bin"] = hashlib.sha256(ids).hexdigest()
    if whole:
        del meta["sha256_of_meta"]
        meta["sha256_of_meta"] = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    overwrite(entry / "meta.json", json.dumps(meta).encode())


def test_tokens_with_their_own_hash_are_not_believed(cache: Path, fill: Fill) -> None:
    true, entry = fill(), entry_of(cache)
    rewrite(entry, bytes(len((entry / "ids.bin").read_bytes())), whole=False)
    found = fill()
    assert found.fingerprint == true.fingerprint and tokens_of(found)[1] != 0


def test_the_fingerprint_is_of_what_was_read(cache: Path, fill: Fill) -> None:
    """Whoever may write as the user can put other tokens there; they never bear the fingerprint of the true ones."""
    true, entry = fill().fingerprint, entry_of(cache)
    rewrite(entry, bytes(len((entry / "ids.bin").read_bytes())), whole=True)
    found = fill()
    assert not any(tokens_of(found)) and found.fingerprint != true


def test_tokens_that_the_vocabulary_does_not_have_are_built_again(cache: Path, fill: Fill) -> None:
    true, entry = tokens_of(fill()), entry_of(cache)
    rewrite(entry, b"\xff" * len((entry / "ids.bin").read_bytes()), whole=True)
    assert tokens_of(fill()) == true


@pytest.mark.parametrize("key", ["format", "dtype", "documents", "tokens", "report", "sha256", "sha256_of_meta"])
@pytest.mark.parametrize("value", ["<u1", 7, None, [], {}])
def test_everything_in_meta_is_covered(cache: Path, fill: Fill, key: str, value: object) -> None:
    true, entry = fill(), entry_of(cache)
    meta = json.loads((entry / "meta.json").read_text())
    overwrite(entry / "meta.json", json.dumps(meta | {key: value}).encode())
    found = fill()
    assert found.fingerprint == true.fingerprint and found.report.blank == 0 and tokens_of(found) == tokens_of(true)


@pytest.mark.parametrize("name", ["meta.json", *FILES])
def test_a_flipped_byte_changes_nothing(cache: Path, fill: Fill, name: str) -> None:
    true, entry = fill(), entry_of(cache)
    tokens, content = tokens_of(true), (entry / name).read_bytes()
    for seed in range(5):
        dice = random.Random(seed)
        at = dice.randrange(len(content))
        overwrite(entry / name, content[:at] + bytes([content[at] ^ dice.randrange(1, 256)]) + content[at + 1 :])
        found = fill()
        assert found.fingerprint == true.fingerprint and tokens_of(found) == tokens, seed


@pytest.mark.parametrize("name", ["ids.bin", "supervised.bin"])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_file_that_is_changed_in_use_is_one_line(cache: Path, fill: Fill, name: str, damage: str) -> None:
    store, path = fill(), entry_of(cache) / name
    content = path.read_bytes()
    overwrite(path, b"" if damage == "cut" else bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(UserError, match=rf"{name}: was changed while it was in use; start again"):
        store.ids(0)


def test_an_entry_that_is_removed_or_touched_in_use_goes_on(cache: Path, fill: Fill) -> None:
    store, entry = fill(), entry_of(cache)
    true = tokens_of(store)
    os.utime(entry / "ids.bin")
    assert tokens_of(store) == true
    for path in entry.iterdir():
        path.unlink()
    assert tokens_of(store) == true


def test_a_source_that_changes_while_it_is_read_is_refused(
    cache: Path, fill: Fill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = store_module.identity

    def changed_after(source: Source) -> list[str | None]:
        found = true(source)
        overwrite(tmp_path / "a.txt", (tmp_path / "a.txt").read_bytes().replace(b"cat", b"dog"))
        return found

    monkeypatch.setattr(store_module, "identity", changed_after)
    with pytest.raises(UserError, match=r"a\.txt: was changed while it was read"):
        fill()
    assert list((cache / "tokens").iterdir()) == []


def test_the_next_run_removes_what_killed_tokenising_left(cache: Path, fill: Fill) -> None:
    """Of any content, not only of its own."""
    program = (
        "import os, sys; from pathlib import Path; from peftune.files import staging_directory\n"
        "with staging_directory(Path(sys.argv[1]) / 'tokens' / ('0' * 40)) as d: (d / 'ids.bin').touch(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(cache)]).returncode == 9
    for path in [cache, cache / "tokens"]:
        path.chmod(0o700)
    assert len(list((cache / "tokens").iterdir())) == 1
    fill()
    assert [path.name.startswith(".") for path in (cache / "tokens").iterdir()] == [False]


def test_rules_that_cut_words_otherwise_make_another_entry(
    cache: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    from tokenizers import Tokenizer, normalizers
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "a.txt").write_text("The Cat")
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Lowercase()
    other = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    found = {tuple(prepare([Source(path=str(tmp_path / "a.txt"))], t, "t", " ", "auto").ids(0).tolist())
             for t in (tokenizer, other)}  # fmt: skip
    assert len(found) == 2


@needs_owners
@pytest.mark.parametrize("level", ["", "fingerprints.json"])
def test_remembered_fingerprints_that_others_may_write_are_refused(cache: Path, tiny_base: Path, level: str) -> None:
    assert Base(tiny_base).fingerprint
    (cache / level).chmod(0o722)
    with pytest.raises(UserError, match="others may write to it"):
        assert Base(tiny_base).fingerprint


def test_a_remembered_fingerprint_that_was_changed_is_computed_again(cache: Path, tiny_base: Path) -> None:
    true = Base(tiny_base).fingerprint
    path = cache / "fingerprints.json"
    content = path.read_bytes()
    for seed in range(10):
        dice = random.Random(seed)
        at = dice.randrange(len(content))
        overwrite(path, content[:at] + bytes([content[at] ^ dice.randrange(1, 256)]) + content[at + 1 :])
        assert Base(tiny_base).fingerprint == true, seed
    overwrite(path, content.replace(true.encode(), b"0" * 64))
    assert Base(tiny_base).fingerprint == true


@pytest.mark.skipif(os.name == "nt", reason="st_ctime is the time of creation there")
def test_a_base_that_changed_under_its_old_time_has_another_fingerprint(
    cache: Path, tiny_base: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in tiny_base.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    true = Base(base).fingerprint
    content = (base / "model.safetensors").read_bytes()
    overwrite(base / "model.safetensors", content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    assert Base(base).fingerprint != true


@fuzz(40)
@given(content=damaged_json({"0" * 64: "1" * 64 + ":" + "2" * 16}))
def test_any_remembered_fingerprints_are_used_or_passed_over(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed-cache"
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / "file").write_bytes(b"")
    (folder / "fingerprints.json").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch, deadline():
        patch.setenv("PEFTUNE_CACHE", str(folder))
        assert [remembered("file", [folder / "file"], lambda: "right") for _ in range(2)] == ["right"] * 2
