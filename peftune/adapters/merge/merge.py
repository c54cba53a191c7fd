"""Fold an adapter into its base: an ordinary GPT-2 checkpoint, proven to compute what base + adapter compute.

`copied` writes what has the base's layout as a copy with changes; all else streams one tensor at a time through `fold`
into `shards`. `verify` compares logits on real text before the directory appears under its name. What cannot be
folded exactly is refused with the reason.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from peftune.adapters.base_of import base_of
from peftune.adapters.directory import Adapter, check_free, read_adapter
from peftune.adapters.fold import MergedTensors
from peftune.adapters.layout import layout_of, refuse_biased_head
from peftune.adapters.merge import quantized_reference
from peftune.adapters.merge import verify as verification
from peftune.adapters.merge.file_copy import why_rewritten, write_copy
from peftune.adapters.merge.report import MergeReport, judged, with_trained
from peftune.adapters.merge.shards import write_weights
from peftune.adapters.provenance import check_base, tensors_fingerprint
from peftune.data.tokens.encode import encode_texts, end_of_text_id
from peftune.errors import CheckFailed, UserError
from peftune.model.base import Base, open_base
from peftune.model.weights import HEAD, WTE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 5_000_000_000
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
_SEQUENCES, _LENGTH = 8, 64


def merge(
    adapter: Path,
    out: Path,
    base: str | None = None,
    dtype: str = "float32",
    verify: bool = True,
    texts: Sequence[str] | None = None,
    max_shard_bytes: int | None = None,
) -> MergeReport:
    """Fold `adapter` into its base and write `out`, an ordinary GPT-2 directory with merge.json.

    `base` wins over the name that the adapter records; `texts` are what logits are compared on (default: the
    language reference); `max_shard_bytes` cuts the weights into files of at most so many (default: the base's own
    files where they can be copied, or 5 GB). Raises UserError for input that cannot be merged, CheckFailed where
    the result is not the model that was trained; then there is no `out`.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype}: expected one of {', '.join(DTYPES)}")
    _check_out(out, adapter)
    found = open_base(base if base is not None else base_of(adapter))
    if out.resolve() == found.directory.resolve():
        raise UserError(f"{out}: is the base itself; choose another directory")
    read = read_adapter(adapter)
    check_base(adapter, found)
    job = _Job(read, found, dtype, max_shard_bytes)
    with _beside(out) as staging:
        return job.run(staging, verify, texts)


@dataclass
class _Job:
    """One merge, from what was read to a checked directory."""

    adapter: Adapter
    base: Base
    dtype: str
    max_shard_bytes: int | None

    def __post_init__(self) -> None:
        self.directory, self.config = self.base.directory, self.base.config
        self.layout = layout_of(self.adapter.config, self.adapter.tensors, self.config, str(self.adapter.directory))
        self.folded = MergedTensors(self.base.weights, self.layout)
        refuse_biased_head(self.layout, str(self.adapter.directory))

    def run(self, staging: Path, verify: bool, texts: Sequence[str] | None) -> MergeReport:
        self._write_settings(staging)
        sequences = self._sequences(staging, texts) if verify else []
        rounds = 1 + (self.dtype != "float32") + quantized_reference.can_be_measured(self.adapter)
        with _progress(len(self.folded.shapes()) + (self.config.n_layer * rounds if verify else 0)) as advance:
            self._write_tensors(staging, advance)
            report = self._report()
            if verify:
                report = self._verified(report, staging, sequences, advance)
        (staging / "merge.json").write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n", encoding="utf-8")
        return report

    def _write_settings(self, staging: Path) -> None:
        values = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))
        values.pop("torch_dtype", None)
        values |= {
            "architectures": ["GPT2LMHeadModel"], "dtype": self.dtype, "vocab_size": self.layout.vocabulary,
            "tie_word_embeddings": self.folded.tied,
        }  # fmt: skip
        (staging / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        source = self._tokenizer_directory()
        for name in _TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, staging / name)
        if (self.directory / "generation_config.json").is_file():
            shutil.copyfile(self.directory / "generation_config.json", staging / "generation_config.json")
        else:
            GenerationConfig.from_model_config(self.config).save_pretrained(staging)

    def _tokenizer_directory(self) -> Path:
        """The base's tokenizer, or the adapter's own where the adapter brings more tokens than the base has."""
        if self.layout.vocabulary == self.config.vocab_size:
            return self.directory
        own = self.adapter.directory
        if not any((own / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise UserError(
                f"adapter {own}: has {self.layout.vocabulary} tokens, the base has {self.config.vocab_size}, "
                "and the adapter holds no tokenizer; copy the tokenizer that it was trained with into its directory"
            )
        return own

    def _sequences(self, staging: Path, texts: Sequence[str] | None) -> list[torch.Tensor]:
        merged = Base(staging)
        length = min(_LENGTH, self.config.n_positions)
        chosen = _default_texts() if texts is None else [text for text in texts if text]
        if not chosen:
            raise UserError("merge: no text to compare logits on; give some, or none at all for the default")
        encoded = encode_texts(chosen[:_SEQUENCES], merged.tokenizer)
        rows = [[end_of_text_id(merged.tokenizer), *ids][:length] for ids in encoded]
        return [torch.tensor(row) for row in rows]

    def _write_tensors(self, staging: Path, advance: Callable[[], None]) -> None:
        dtype = DTYPES[self.dtype]
        copied = why_rewritten(self.folded, dtype, self.max_shard_bytes) is None
        if copied:
            write_copy(staging, self.folded, dtype, lambda _: advance())
        else:
            limit = self.max_shard_bytes or SHARD_BYTES
            write_weights(staging, self.folded.shapes(), dtype, self.folded.chunks, limit, lambda _: advance())
        unused = sorted(self.layout.tensors() - self.folded.used)
        if unused:
            raise CheckFailed(f"merge: {len(unused)} tensors of the adapter were not applied, such as {unused[0]}")
        if not copied:  # a copy has the base's own headers
            _check_loadable(staging)

    def _report(self) -> MergeReport:
        return MergeReport(
            modules_in_adapter=len(self.layout.modules()),
            modules_applied=self.folded.modules_applied(),
            max_abs_logit_difference=None,
            mean_kl=None,
            argmax_agreement=None,
            dtype=self.dtype,
            base_fingerprint=self.base.fingerprint,
            adapter_fingerprint=tensors_fingerprint(self.adapter.config, self.adapter.tensors),
            base=self.base.name,
            tie_word_embeddings=self.folded.tied,
            vocabulary=self.layout.vocabulary,
            trained_on=quantized_reference.quantised_as(self.adapter),
        )

    def _verified(
        self, report: MergeReport, staging: Path, sequences: list[torch.Tensor], advance: Callable[[], None]
    ) -> MergeReport:
        merged = Base(staging)
        config = merged.config
        config._attn_implementation = "sdpa"
        pieces = self.folded.pieces(WTE if self.folded.tied else HEAD)
        delivered = verification.Plain(merged.weights, config, pieces)
        exact = verification.Plain(MergedTensors(self.folded.weights, self.layout), config, pieces)
        full = verification.WithAdapter(self.folded.weights, self.layout, config, pieces)
        candidates: dict[str, verification.Stream] = {"delivered": delivered}
        if self.dtype != "float32":
            candidates["exact"] = exact
        found = verification.compare(full, candidates, config, sequences, advance)
        rounding = None
        if self.dtype != "float32":
            rounding = verification.compare(exact, {"delivered": delivered}, config, sequences, advance)[
                "delivered"
            ].mean_kl
        report = judged(report, found["delivered"], found.get("exact", found["delivered"]), rounding)
        if not quantized_reference.can_be_measured(self.adapter):
            return report
        learnt = quantized_reference.stream(self.adapter, self.folded.weights, self.layout, config, pieces)
        return with_trained(
            report, verification.compare(learnt, {"delivered": delivered}, config, sequences, advance)["delivered"]
        )


def _default_texts() -> list[str]:
    from peftune.data.sources.builtin import documents

    return [document.text for document in documents("docs", "heldout")[:_SEQUENCES]]


def _check_out(out: Path, adapter: Path) -> None:
    if out.resolve() == adapter.resolve():
        raise UserError(f"{out}: is the adapter itself; choose another directory")
    check_free(out, "the merged model")


def _check_loadable(directory: Path) -> None:
    """Transformers finds every tensor that its GPT-2 has, and no other, in the files as they were written."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, device_map={"": "meta"}, output_loading_info=True)
    info = loaded[1]
    wrong: list[Any] = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise CheckFailed(f"merge: Transformers does not find {wrong[0]} as it expects; nothing was written")


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A directory beside `out` that takes its name at the end, and is gone if anything goes wrong."""
    staging = out.parent / f".{out.name}.merging-{os.getpid()}"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        if out.exists():
            raise UserError(f"{out}: appeared while merging and is not overwritten; choose another directory")
        staging.rename(out)
    except OSError as error:
        raise UserError(f"{out}: cannot write the merged model: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error, where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("merge", total=total)
        yield lambda: bar.advance(task)
