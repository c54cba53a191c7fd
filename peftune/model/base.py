"""The frozen base: one object for all that a command reads of it, each part opened once, when it is first asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftune.console import Console
from peftune.errors import BaseNotFound, UserError, first_line
from peftune.files import read_object_if_present, sha256_of
from peftune.model import architecture, tokenizer, weights
from peftune.model.fingerprint import remembered

if TYPE_CHECKING:
    from transformers import GPT2Config, PreTrainedTokenizerFast

MERGE = "merge.json"
"""What a merge writes beside the model: its figures, and the SHA-256 of every file."""
BUILTIN = {"builtin:small": Path(__file__).with_name("small")}
_TIMEOUT = 5.0  # seconds until the hub counts as out of reach
_WANTED = ["*.json", "merges.txt", "vocab.txt", "*.model"]
_FORMATS = (("model.safetensors", "model-*.safetensors"), ("pytorch_model.bin", "pytorch_model-*.bin"))


@dataclass(frozen=True)
class Base:
    """A GPT-2 checkpoint directory. A command opens one and hands it down; `open_base` finds it by its name.

    Each property raises UserError where its part is missing or broken.
    """

    directory: Path
    name: str = ""
    """What it was asked for by: `gpt2`, a directory, `builtin:small`."""
    fresh: bool = False
    """Fingerprints are computed from the bytes on the disk, not remembered: about a second for each GB of weights."""

    @cached_property
    def _merge(self) -> dict[str, Any]:
        """merge.json, of a model that peftune merged; empty for any other."""
        return read_object_if_present(self.directory / MERGE, f"base {self.directory}: {MERGE}") or {}

    @cached_property
    def parses_special_tokens(self) -> bool:
        """Whether special tokens in prompts are tokens: so for a merge of an adapter that was trained with them."""
        return bool(self._merge.get("special_tokens") == "parse")

    @cached_property
    def merged(self) -> list[dict[str, Any]]:
        """The adapters that are merged into it, the last one first; empty for a model that peftune did not merge.

        Each has `adapter_fingerprint` and the `base` that it went into. Older releases recorded the last one only.
        """
        kept: tuple[str, ...] = ("adapter_fingerprint", "base", "base_fingerprint")
        last = {key: self._merge[key] for key in kept if key in self._merge}
        listed = self._merge.get("merged")
        found = listed if isinstance(listed, list) else [last] if last else []
        return [entry for entry in found if isinstance(entry, dict)]

    @cached_property
    def chat(self) -> str | None:
        """By which template it answers conversations, `plain` or `eos-turns`, as a merge of an adapter that does."""
        merged = read_object_if_present(self.directory / MERGE, f"base {self.directory}: {MERGE}") or {}
        return chat if (chat := merged.get("chat")) in ("plain", "eos-turns") else None

    @cached_property
    def _recorded(self) -> dict[str, str]:
        """sha256 by file name, of a model that peftune merged; empty for any other."""
        hashes = self._merge.get("sha256")
        return hashes if isinstance(hashes, dict) else {}

    def _check(self, files: Iterable[Path]) -> None:
        """UserError where a file is not what merge.json says; large ones are hashed once, until they change."""
        for file in files:
            expected = self._recorded.get(file.name)
            if expected is not None and file.is_file():
                found = remembered("file", [file], partial(sha256_of, file), self.fresh)
                if found != expected:
                    raise UserError(
                        f"base {self.directory}: {file.name} is not the file that was merged (its SHA-256 differs): it "
                        f"was changed or damaged; merge again, or remove {MERGE} if you changed it yourself"
                    )

    @cached_property
    def stored_config(self) -> dict[str, Any]:
        """config.json as it is stored, checked to be that of a GPT-2."""
        self._check([self.directory / "config.json"])
        return architecture.read_values(self.directory)

    @cached_property
    def config(self) -> GPT2Config:
        """Transformers' configuration."""
        architecture.require_transformers()
        from transformers import GPT2Config

        values = self.stored_config | {"_name_or_path": str(self.directory)}
        values.pop("num_labels", None)  # of classifiers; Transformers would make a name for each
        try:
            return GPT2Config.from_dict(values)
        except Exception as error:  # whatever Transformers makes of values that no GPT-2 needs
            raise UserError(
                f"base {self.directory}: config.json: Transformers refuses it: {first_line(error)}"
            ) from None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The fast tokenizer, its vocabulary checked against the embedding's rows."""
        self._check(self.directory / name for name in tokenizer.FILES)
        return tokenizer.load_tokenizer(self.directory, self.config, self.stored_config)

    def block_size(self, asked: int | None) -> int:
        """Tokens of a block: `asked`, or None for all positions; UserError where it has fewer."""
        positions = self.config.n_positions
        if asked is not None and not 8 <= asked <= positions:
            raise UserError(f"block size {asked}: expected 8 to {positions}, the positions of the base")
        return asked or positions

    @cached_property
    def weights(self) -> weights.Weights:
        """The stored tensors by name, read one at a time; none is missing and all have the shapes of `config`."""
        found = weights.open_weights(self.directory, tied=self.config.tie_word_embeddings)
        self._check([self.directory / weights.INDEX, *found.files])
        weights.check_complete(found, self.config)
        return found

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the weights' names, shapes, dtypes and bytes: equal for every layout of files."""
        return weights.fingerprint(self.weights, self.fresh)

    @cached_property
    def config_fingerprint(self) -> str:
        """sha256 of the values of config.json that decide shapes and arithmetic."""
        return architecture.fingerprint(self.config)

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """sha256 of vocabulary, merges and special tokens."""
        return tokenizer.fingerprint(lambda: self.tokenizer, self.directory, self.fresh)

    def identity(self) -> dict[str, str]:
        """What peftune.json records of a base: its name and three fingerprints."""
        return {
            "base": self.name,
            "base_fingerprint": self.fingerprint,
            "config_fingerprint": self.config_fingerprint,
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
        }


def open_base(name: str | Path | Base, fresh: bool = False) -> Base:
    """Find a base: `builtin:small`, a directory, or a hub name (downloaded once); `fresh` is `Base.fresh`.

    One that is open already stays as it is. Raises UserError where it is none of these, or where the hub cannot be
    reached and holds no copy.
    """
    if isinstance(name, Base):
        return name
    name = str(name)
    if name.startswith("builtin:"):
        if name not in BUILTIN:
            raise UserError(f"base {name}: there is no such built-in base; known: {', '.join(BUILTIN)}")
        return Base(BUILTIN[name], name, fresh)
    try:
        path = Path(name).expanduser()
        is_directory, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, ~name without such a user
        raise UserError(f"base {name[:200]}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if is_directory:
        return Base(_checked(path, name), name, fresh)
    if exists or name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise BaseNotFound(
            f"base {name}: no such directory; expected a GPT-2 checkpoint directory, a hub name or builtin:small"
        )
    return Base(_from_hub(name), name, fresh)


def _checked(path: Path, name: str) -> Path:
    """A directory with a model in it, and with nothing that Transformers would put on it without a word."""
    adapter = (path / "adapter_config.json").is_file()
    if not (path / "config.json").is_file():
        hint = "; it is an adapter, and goes onto a base" if adapter else ""
        raise UserError(f"base {name}: no config.json in this directory{hint}")
    if adapter:
        raise UserError(
            f"base {name}: holds an adapter beside the model, and Transformers would load both as one; "
            "move adapter_config.json and its weights to a directory of their own"
        )
    return path


def _from_hub(name: str) -> Path:
    """The hub's newest copy; where it gives none within seconds, the one that an earlier download left here."""
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        with Console().waiting(f"downloading {name}"):
            held = HfApi().model_info(name, timeout=_TIMEOUT).siblings or []
            weights = _one_format([file.rfilename for file in held])
            directory = Path(snapshot_download(name, allow_patterns=[*_WANTED, *weights]))
    except errors.HFValidationError:
        raise UserError(f"base {name!r}: neither a directory nor a valid hub name") from None
    except errors.HfHubHTTPError.__bases__ as error:  # type: ignore[misc]  # OSError, and the root of its client
        copy = _copy_here(name)
        if copy is None and isinstance(error, errors.RepositoryNotFoundError):
            raise BaseNotFound(f"base {name}: no such directory, and the hub knows no such model") from None
        if copy is None and isinstance(error, OSError) and error.errno is not None:  # a full disk, no right to write
            raise UserError(f"base {name}: its download cannot be kept: {error}") from None
        if copy is None:
            raise BaseNotFound(
                f"base {name}: no such directory here, and the hub could not be reached "
                f"({first_line(error).partition('. ')[0]}); offline, give a directory or builtin:small"
            ) from None
        directory = copy
    if any(directory.glob("*.safetensors")) or any(directory.glob("*.bin")):
        return _checked(directory, name)
    raise UserError(
        f"base {name}: the hub's copy holds no weights in safetensors or .bin form (TensorFlow's are not read)"
    )


def _one_format(files: Sequence[str]) -> list[str]:
    """Patterns of the weights among these files in one format, the safer that there is."""
    held = ([p for p in patterns if any(fnmatch(file, p) for file in files)] for patterns in _FORMATS)
    return next(filter(None, held), [])


def _copy_here(name: str) -> Path | None:
    """What an earlier download left, which has one format of weights, though the hub may have several."""
    from huggingface_hub import errors, snapshot_download

    copy = None
    for patterns in _FORMATS:
        with suppress(errors.LocalEntryNotFoundError):
            copy = Path(snapshot_download(name, allow_patterns=[*_WANTED, *patterns], local_files_only=True))
            if any(file for pattern in patterns for file in copy.glob(pattern)):
                break
    return copy
