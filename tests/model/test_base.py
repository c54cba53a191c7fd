"""A base is found, checked and loaded, or refused in one line that names it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftune.errors import UserError
from peftune.model import architecture
from peftune.model.base import BUILTIN, Base, open_base
from peftune.model.load import KERNELS_KEPT, load_model

WEIGHTS = "model.safetensors"


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base that a test may spoil."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


@pytest.fixture
def hub(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds the tiny base as `someone/tiny`, as huggingface_hub lays it out, and no network."""
    from huggingface_hub import constants

    repository = tmp_path / "cache" / "models--someone--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = repository / "snapshots" / commit
    for folder in ("refs", "blobs"):
        (repository / folder).mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for number, path in enumerate(sorted(tiny_base.iterdir())):
        shutil.copy(path, repository / "blobs" / f"{number:040d}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:040d}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return snapshot


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 420, message
    return message


def edit_config(base: Path, **values: Any) -> None:
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def spoil(base: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(base / WEIGHTS)
    change(tensors)
    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})


def same_model(first: Path, second: Path) -> bool:
    """Whether all tensors are equal; logits need not be, since sums may depend on where a file puts a tensor."""
    one, other = (load_model(Base(base)).state_dict() for base in (first, second))
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_builtin_base_a_directory_and_a_hub_name_are_found(tiny_base: Path, hub: Path) -> None:
    assert open_base("builtin:small").directory == BUILTIN["builtin:small"]
    assert open_base(str(tiny_base)).directory == tiny_base
    assert open_base("someone/tiny").directory.samefile(hub)


@pytest.mark.parametrize(
    ("held", "wanted", "left"),
    [
        (["model.safetensors", "pytorch_model.bin", "onnx/model.safetensors"],
         ["model.safetensors"], ["pytorch_model.bin"]),
        (["model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin"],
         ["model-00001-of-00002.safetensors", "model.safetensors.index.json"], ["pytorch_model.bin"]),
        (["pytorch_model.bin", "training_args.bin", "tf_model.h5"],
         ["pytorch_model.bin"], ["training_args.bin", "tf_model.h5"]),
        (["pytorch_model-00001-of-00001.bin", "vocab.txt", "spiece.model"],
         ["pytorch_model-00001-of-00001.bin", "vocab.txt", "spiece.model"], ["rust_model.ot"]),
    ],
)  # fmt: skip
def test_the_hub_is_asked_for_one_weight_format(
    hub: Path, monkeypatch: pytest.MonkeyPatch, held: list[str], wanted: list[str], left: list[str]
) -> None:
    import huggingface_hub
    from huggingface_hub import ModelInfo
    from huggingface_hub.utils import filter_repo_objects

    asked: list[str] = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(hub)

    def listing(api: object, name: str, timeout: float) -> ModelInfo:
        return ModelInfo(id=name, siblings=[{"rfilename": file} for file in held])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", listing)
    assert open_base("someone/tiny").directory == hub
    assert list(filter_repo_objects([*wanted, *left], allow_patterns=asked)) == wanted


def test_a_base_from_the_hub_loads_and_computes_the_same(tiny_base: Path, hub: Path) -> None:
    found = open_base("someone/tiny").directory
    assert same_model(found, tiny_base)
    assert Base(found).tokenizer.encode("the cat") == Base(tiny_base).tokenizer.encode("the cat")


def test_a_recipe_with_a_hub_name_trains(hub: Path) -> None:
    from peftune.config.recipe import recipe_from
    from peftune.training.run import train

    Path("t.txt").write_text("the cat sat on the mat\n\na dog ran to my log\n")
    values = {
        "base": "someone/tiny", "data": {"train": "t.txt", "validation": 0}, "lora": {"rank": 2},
        "optim": {"steps": 1}, "batch": {"global_size": 1}, "run": {"out": "out", "precision": "fp32"},
    }  # fmt: skip
    train(recipe_from(values, []))
    assert json.loads(Path("out/adapter_config.json").read_text())["base_model_name_or_path"] == "someone/tiny"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("builtin:large", "no such built-in base; known: builtin:small"),
        ("./nowhere", "no such directory; expected a GPT-2 checkpoint directory"),
        ("/nowhere/at/all", "no such directory"),
        ("a/b/c", "no such directory"),
        ("models/", "no such directory"),
        ("a file.txt", "neither a directory nor a valid hub name"),
        ("x" * 5000, "cannot be read: File name too long"),
        ("~nosuchuser/x", "cannot be read"),
        ("someone/else", "no such directory here, and the hub could not be reached"),
        ("gpt3", "no such directory here, and the hub could not be reached"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_line(hub: Path, name: str, expected: str) -> None:
    message = refusal(lambda: open_base(name))
    assert (expected in message and message.startswith(f"base {name[:200]}")) or message.startswith(f"base {name!r}")


def test_without_a_network_a_hub_name_is_answered_within_seconds_by_the_copy_here_or_a_line(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub of the first call refuses connections; that of the second takes them and never answers."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("peftune.model.base._TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (1, silent.getsockname()[1]):
            monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
            began = time.monotonic()
            assert open_base("someone/tiny").directory == hub
            message = refusal(lambda: open_base("someone/else"))
            assert "the hub could not be reached" in message and "offline, give a directory" in message
            assert time.monotonic() - began < 15


def test_a_download_that_cannot_be_kept_is_no_hub_out_of_reach(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import ModelInfo, errors

    def full(*_: object, local_files_only: bool = False, **__: object) -> str:
        raise errors.LocalEntryNotFoundError("none") if local_files_only else OSError(28, "No space left", "/cache")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: ModelInfo(id="a", siblings=[]))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    assert "cannot be kept: [Errno 28] No space left: '/cache'" in refusal(lambda: open_base("someone/else"))


def test_without_a_network_a_copy_has_one_format_of_the_several_that_the_hub_has(hub: Path) -> None:
    """A download lists beside its copy all that the hub holds, and takes the safer format only."""
    names = [*(path.name for path in hub.iterdir()), "pytorch_model.bin", "flax_model.msgpack"]
    listing = {"format_version": 1, "files": {name: {"size": 1, "blob_id": "0" * 40} for name in names}}
    trees = hub.parents[1] / "trees"
    trees.mkdir()
    (trees / f"{hub.name}.json").write_text(json.dumps(listing))
    assert open_base("someone/tiny").directory == hub


def test_a_directory_without_a_model_or_with_an_adapter_is_explained(base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refusal(lambda: open_base(str(tmp_path / "empty")))
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    assert "it is an adapter" in refusal(lambda: open_base(str(tmp_path / "empty")))
    (base / "adapter_config.json").write_text("{}")
    assert "holds an adapter beside the model" in refusal(lambda: open_base(str(base)))
    assert "no such directory" in refusal(lambda: open_base(str(base / "config.json")))


def test_a_hub_copy_without_weights_is_refused(hub: Path) -> None:
    (hub / WEIGHTS).unlink()
    assert "holds no weights in safetensors or .bin form" in refusal(lambda: open_base("someone/tiny"))


@pytest.mark.parametrize("kind", ["llama", "gpt_neo", "openai-gpt", None])
def test_another_architecture_is_refused_by_name(base: Path, kind: str | None) -> None:
    edit_config(base, model_type=kind, architectures=["LlamaForCausalLM"])
    for load in (lambda: Base(base).config, lambda: load_model(Base(base))):
        assert f"model_type is {kind}, peftune trains GPT-2 models only" in refusal(load)


@pytest.mark.parametrize("content", [b"{", b"[]", b"5", b"", b"\xff\xfe", b"null"])
def test_a_config_that_is_no_config_is_one_line(base: Path, content: bytes) -> None:
    (base / "config.json").write_bytes(content)
    assert f"base {base}" in refusal(lambda: Base(base).config)


@pytest.mark.parametrize(
    "values",
    [
        {"n_head": 5}, {"n_embd": "x"}, {"n_layer": -1}, {"n_positions": None}, {"vocab_size": 0}, {"n_head": 0},
        {"n_layer": 1.5}, {"activation_function": "nope"}, {"layer_norm_epsilon": "small"}, {"n_inner": "wide"},
    ],
)  # fmt: skip
def test_impossible_numbers_in_the_config_are_one_line(base: Path, values: dict[str, Any]) -> None:
    edit_config(base, **values)
    assert f"base {base}: config.json: " in refusal(lambda: Base(base).config)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"n_positions": 128}, "wpe.weight has shape (64, 32), config.json says (128, 32)"),
        ({"vocab_size": 310}, "wte.weight has shape (300, 32), config.json says (310, 32)"),
        ({"n_embd": 64}, "has shape"),
        ({"n_inner": 64}, "mlp.c_fc"),
        ({"n_layer": 3}, "tensors are missing from the weights, such as transformer.h.2."),
    ],
)
def test_weights_of_other_shapes_than_the_config_says_are_refused(
    base: Path, values: dict[str, Any], expected: str
) -> None:
    edit_config(base, **values)
    message = refusal(lambda: load_model(Base(base)))
    assert expected in message and f"base {base}" in message


def test_missing_tensors_are_named(base: Path) -> None:
    spoil(base, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".h.1." in name])
    message = refusal(lambda: load_model(Base(base)))
    assert "12 tensors are missing from the weights, such as transformer.h.1.ln_1.weight" in message


def test_weights_that_are_cut_short_or_absent_are_one_line(base: Path) -> None:
    whole = (base / WEIGHTS).read_bytes()
    for content in (whole[:-100], whole[:20], b"", b"\xff" * 100):
        (base / WEIGHTS).write_bytes(content)
        assert "model.safetensors: not a whole safetensors file" in refusal(lambda: load_model(Base(base)))
    (base / WEIGHTS).unlink()
    assert "no weights here; expected one of model.safetensors" in refusal(lambda: load_model(Base(base)))
    (base / "pytorch_model.bin").write_bytes(b"\x80\x04nothing")
    assert "pytorch_model.bin: not a whole weights-only file" in refusal(lambda: load_model(Base(base)))


def test_bare_keys_with_mask_buffers_load_as_the_same_model(tiny_base: Path, base: Path) -> None:
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(base / WEIGHTS).items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in (0, 1)}
    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})
    assert same_model(base, tiny_base)


def test_a_bin_checkpoint_loads_as_the_same_model_and_runs_no_code(tiny_base: Path, base: Path) -> None:
    torch.save(load_file(base / WEIGHTS), base / "pytorch_model.bin")
    (base / WEIGHTS).unlink()
    assert same_model(base, tiny_base)
    torch.save({"code": torch.nn.Linear(2, 2)}, base / "pytorch_model.bin")
    assert "pytorch_model.bin: not a whole weights-only file" in refusal(lambda: load_model(Base(base)))


def test_an_untied_head_stays_apart(base: Path) -> None:
    head = torch.randn(300, 32)
    spoil(base, lambda tensors: tensors.update({"lm_head.weight": head}))
    edit_config(base, tie_word_embeddings=False)
    model = load_model(Base(base))
    assert torch.equal(model.lm_head.weight, head) and model.lm_head.weight is not model.transformer.wte.weight


def test_dropout_is_what_was_asked_whatever_the_checkpoint_says(base: Path) -> None:
    edit_config(base, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    for asked in (0.0, 0.25):
        model = load_model(Base(base), dropout=asked)
        found = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
        assert found == {asked} and not model.training
    assert load_model(Base(base), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_missing_or_broken_tokenizer_is_one_line(base: Path) -> None:
    (base / "tokenizer.json").write_text("{")
    assert "tokenizer.json: cannot be read" in refusal(lambda: Base(base).tokenizer)
    (base / "tokenizer.json").unlink()
    assert "no tokenizer here" in refusal(lambda: Base(base).tokenizer)


def test_vocabulary_and_merges_make_the_whole_tokenizer_and_not_one_token(tiny_base: Path, base: Path) -> None:
    inner = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocabulary = {**inner["vocab"], "<|endoftext|>": len(inner["vocab"])}
    (base / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in inner["merges"]]
    (base / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    found, known = Base(base).tokenizer, Base(tiny_base).tokenizer
    text = "the cat sat, naïve café 東京"
    assert len(found) == len(known) and found.encode(text) == known.encode(text)


def test_a_tokenizer_of_one_token_is_refused(base: Path) -> None:
    """What a vocabulary without its merges, or an empty one, turns into: every text would be nothing."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    (base / "vocab.json").write_text('{"<|endoftext|>": 0}')
    (base / "merges.txt").write_text("#version: 0.2\n")
    assert "the tokenizer knows 0 tokens; expected its full vocabulary" in refusal(lambda: Base(base).tokenizer)


def test_a_tokenizer_of_another_model_is_refused_and_an_added_pad_is_not(base: Path) -> None:
    tokenizer = Base(base).tokenizer
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(base)
    assert len(Base(base).tokenizer) == 301
    tokenizer.add_tokens(["domain"])
    tokenizer.save_pretrained(base)
    assert "its tokenizer knows token 301, but the embedding has 300 rows" in refusal(lambda: Base(base).tokenizer)


def test_a_transformers_that_computes_wrongly_is_refused(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture.require_transformers.cache_clear()
    for version, refused in (("5.3.0", True), ("4.57.1", True), ("5.4.0rc1", False), ("5.23.0", False), ("6.0", False)):
        monkeypatch.setattr(architecture.metadata, "version", lambda name, found=version: found)
        if refused:
            with pytest.raises(UserError, match=rf"transformers {version} is installed, expected 5\.4") as caught:
                assert Base(tiny_base).config
            assert "\n" not in str(caught.value)
        else:
            assert Base(tiny_base).config.n_layer == 2
            architecture.require_transformers.cache_clear()


@pytest.mark.parametrize("values", [{"n_layer": 1_000_000}, {"n_embd": 1 << 40}, {"vocab_size": 1 << 50}])
def test_sizes_that_no_gpt2_has_are_refused_at_once(tiny_base: Path, tmp_path: Path, values: dict[str, int]) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    stored = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(stored | values))
    with pytest.raises(UserError, match=r"config.json: .*expected a number less than or equal to \d+"):
        assert Base(base).config


def test_labels_without_number_are_not_made(tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    stored = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(stored | {"num_labels": 10**9}))
    assert len(Base(base).config.id2label) == 2


def test_a_process_keeps_few_kernels_unless_its_user_says_how_many(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in KERNELS_KEPT:
        monkeypatch.setenv(variable, "")  # so that what the load sets is gone after the test
        monkeypatch.delenv(variable)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    load_model(Base(tiny_base))
    assert {variable: os.environ[variable] for variable in KERNELS_KEPT} == KERNELS_KEPT | {"LRU_CACHE_CAPACITY": "7"}
