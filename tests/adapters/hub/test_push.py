"""What `peftune push` sends, and what it never does; the hub is a fake that keeps what it is given."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peftune.adapters.directory import read_adapter, write_adapter
from peftune.adapters.hub.publishable import publishable
from peftune.adapters.hub.push import push
from peftune.adapters.merge.merge import merge
from peftune.cli import main
from peftune.errors import UserError

Captured = pytest.CaptureFixture[str]
SECRETS = (
    "secret-source",
    "secret-prompt",
    "secret-domain",
    "secret-text",
    "secret-out",
    "123.456",
    "secret-base",
    "secret-first",
)


class FakeHub:
    """Takes repositories and commits as HfApi does."""

    def __init__(self, private: bool | None = None, error: Exception | None = None) -> None:
        self.private, self.error = private, error
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, *, private: bool, repo_type: str, exist_ok: bool) -> None:
        assert repo_type == "model" and exist_ok
        self.private = private if self.private is None else self.private

    def repo_info(self, repo_id: str, *, repo_type: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private)

    def create_commit(self, repo_id: str, operations: Any, *, commit_message: str) -> SimpleNamespace:
        if self.error:
            raise self.error
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def trained(make_adapter: Callable[..., Path], tmp_path: Path) -> Path:
    """An adapter directory as training leaves it, with texts of the person's own all over it."""
    made = read_adapter(make_adapter("made"))
    config = {**made.config, "base_model_name_or_path": "gpt2"}
    recipe = {
        "lora": {"variant": "lora", "rank": 4}, "quantize": None,
        "data": {"train": [{"path": "/home/secret-source.txt"}]},
        "run": {"samples": ["secret-prompt"], "out": "secret-out"},
    }  # fmt: skip
    figures = {"secret-domain": {row: {"loss": 4.0, "perplexity": 123.456} for row in ("base", "adapter")}}
    provenance = {
        "peftune": "0.1.0", "base": "gpt2", "base_fingerprint": "a" * 64, "recipe": recipe, "metrics": figures,
        "identity": {"data.train": ["secret-source"]}, "step": 3, "base_from_adapter": "../secret-base",
        "init": [{"adapter": "secret-first", "adapter_fingerprint": "b" * 64, "base": "/home/secret-base", "step": 2}],
    }  # fmt: skip
    out = tmp_path / "secret-out"
    write_adapter(out, config, made.tensors, provenance, {"README.md": "trained on secret-source", "loss.png": b"png"})
    (out / "checkpoints" / "step-3").mkdir(parents=True)
    (out / "checkpoints" / "step-3" / "state.json").write_text("secret-text")
    for name in ("metrics.jsonl", "train.txt", ".env", "training_args.bin"):
        (out / name).write_text("secret-text")
    return out


def test_weights_card_and_provenance_go_and_nothing_private(trained: Path, tmp_path: Path) -> None:
    hub = FakeHub()
    assert push(publishable(trained, "me/poems"), "me/poems", api=hub).startswith("https://hub/me/poems")
    assert sorted(hub.files) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "peftune.json"]
    assert [s for s in SECRETS if any(s.encode() in content for content in hub.files.values())] == []
    assert hub.private is True
    for name, content in hub.files.items():  # what arrives is an adapter whose hashes hold
        (tmp_path / "down").mkdir(exist_ok=True)
        (tmp_path / "down" / name).write_bytes(content)
    arrived, sent = read_adapter(tmp_path / "down"), read_adapter(trained)
    assert arrived.fingerprint == sent.fingerprint and arrived.base == "gpt2"
    assert arrived.provenance is not None and arrived.provenance["base_fingerprint"] == "a" * 64
    assert arrived.provenance["init"] == [{"adapter_fingerprint": "b" * 64, "step": 2}]


def test_metrics_and_recipe_go_when_told(trained: Path) -> None:
    hub = FakeHub()
    push(publishable(trained, "me/poems", metrics=True), "me/poems", api=hub)
    assert b"123.456" in hub.files["README.md"] and hub.files["loss.png"] == b"png"
    assert not any(b"secret-source" in content or b"secret-text" in content for content in hub.files.values())
    push(publishable(trained, "me/poems", recipe=True), "me/poems", api=hub)
    recorded = json.loads(hub.files["peftune.json"])
    assert recorded["recipe"]["data"]["train"] == [{"path": "/home/secret-source.txt"}] and "metrics" not in recorded
    assert not any(b"secret-text" in content for content in hub.files.values())


def test_the_default_is_a_list_and_no_network(trained: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: pytest.fail("it went to the hub"))
    assert main.run(["push", str(trained), "me/poems"]) == 0
    out = capsys.readouterr().out
    size = (trained / "adapter_model.safetensors").stat().st_size
    assert f"adapter_model.safetensors  {size:,} bytes" in out and "nothing was sent" in out and "(private)" in out
    assert (
        "left out: metrics.jsonl, holds sample texts" in out and "left out: checkpoints, checkpoints are never" in out
    )
    assert "left out: train.txt" in out and "left out: .env" in out


@pytest.mark.parametrize(("offline", "words"), [(True, "HF_HUB_OFFLINE is set"), (False, "hf auth login")])
def test_offline_and_without_a_login_it_says_so_in_a_line(
    trained: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, offline: bool, words: str
) -> None:
    monkeypatch.setattr("peftune.adapters.hub.push.is_offline_mode", lambda: offline)
    monkeypatch.setattr("peftune.adapters.hub.push.get_token", lambda: None)
    assert main.run(["push", str(trained), "me/poems", "--yes"]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_a_public_repository_gets_nothing_unless_told(trained: Path) -> None:
    hub = FakeHub(private=False)
    with pytest.raises(UserError, match="is public already, and nothing was sent"):
        push(publishable(trained, "me/poems"), "me/poems", api=hub)
    assert hub.files == {}
    push(publishable(trained, "me/poems"), "me/poems", public=True, api=hub)
    assert hub.files


@pytest.mark.parametrize("error", [OSError("no route\nto host"), ValueError("bad"), RuntimeError("closed")])
def test_what_the_hub_says_is_one_line(trained: Path, error: Exception) -> None:
    with pytest.raises(UserError, match="repository me/poems: the hub could not be reached, or refused: ") as caught:
        push(publishable(trained, "me/poems"), "me/poems", api=FakeHub(error=error))
    assert "\n" not in str(caught.value) and "give files" not in str(caught.value)  # as it is told to who reads data


def test_a_merged_model_goes_without_paths(tiny_base: Path, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    merge(make_adapter("made"), tmp_path / "merged", base=str(tiny_base))
    path = tmp_path / "merged" / "config.json"
    (tmp_path / "merged" / "merge.json").unlink()
    path.write_text(json.dumps({**json.loads(path.read_text()), "_name_or_path": "/home/secret-source"}))
    (tmp_path / "merged" / "train.txt").write_text("secret-text")
    hub = FakeHub()
    push(publishable(tmp_path / "merged", "me/merged"), "me/merged", api=hub)
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= hub.files.keys()
    assert not any(secret.encode() in content for content in hub.files.values() for secret in SECRETS)
    assert hub.files["model.safetensors"] == (tmp_path / "merged" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["vocab.txt", "model"])
def test_a_link_is_not_followed(tiny_base: Path, tmp_path: Path, name: str) -> None:
    """A directory of somebody else's must not send a file of ours under an innocent name."""
    model = shutil.copytree(tiny_base, tmp_path / "model")
    (tmp_path / "key").write_text("secret-text")
    if name == "model":
        (model / "model.safetensors").rename(tmp_path / "weights")
        (model / "model.safetensors").symlink_to(tmp_path / "weights")
    else:
        (model / name).symlink_to(tmp_path / "key")
    with pytest.raises(UserError, match="is a link"):
        publishable(model, "me/model")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a b/c"], "expected a name on the hub"),
        (["../../etc"], "expected a name on the hub"),
        (["me/poems", "--base", "/tmp"], "which nobody else can load"),
    ],
)
def test_what_cannot_be_sent_is_refused(trained: Path, capsys: Captured, arguments: list[str], words: str) -> None:
    assert main.run(["push", str(trained), *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_a_directory_of_something_else_is_refused(tmp_path: Path, capsys: Captured) -> None:
    assert main.run(["push", str(tmp_path), "me/poems"]) == 2
    assert "no adapter_config.json in this directory" in capsys.readouterr().err
