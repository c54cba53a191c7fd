"""Merge an adapter into its base: an ordinary GPT-2 checkpoint, verified to compute what base + adapter compute.

Tensors stream one at a time through `fold` into `shards`. `verify` compares logits on real text before the directory
gets its name. What cannot be merged exactly is refused with the reason.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from peftune.adapters.base_of import base_of, read_for
from peftune.adapters.directory import Adapter, check_free, new_directory
from peftune.adapters.fold import MergedTensors
from peftune.adapters.layout import refuse_biased_head
from peftune.adapters.merge.report import MergeReport
from peftune.adapters.merge.shards import write_weights
from peftune.adapters.merge.tokenizer_files import begins_texts, write_tokenizer
from peftune.adapters.merge.verify import base_quantization, verify_merge
from peftune.adapters.provenance import INIT, chat_of, parses_special_tokens, recorded_list
from peftune.console import Console
from peftune.data.sources.builtin import documents
from peftune.data.sources.chat_exports import jinja_template
from peftune.data.tokens.encode import begin_of_text_id, encode_texts
from peftune.errors import CheckFailed, UserError, refuse_bare_string
from peftune.files import hashes_of, write_json
from peftune.model.base import MERGE, Base, open_base

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 5_000_000_000
_COPIED_VALUES = 1_000_000  # read and written at a time of tensors that are not adapted
_TEMPLATE = "chat_template.jinja"
_GENERATION = "generation_config.json"
_SEQUENCES, _LENGTH = 8, 64


def merge(
    adapter: Path | str,
    out: Path | str,
    base: str | Path | None = None,
    dtype: str = "float32",
    verify: bool = True,
    texts: Sequence[str] | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> MergeReport:
    """Fold `adapter` into its base and write `out`, an ordinary GPT-2 directory with merge.json.

    `base` overrides the name that the adapter records; `dtype` is what weights are stored in: float32, bfloat16 or
    float16. With `verify` the files are read back, and logits compared with those of base and adapter on `texts`
    (default: Python's language reference; the first 64 tokens of the first 8). `max_shard_bytes` cuts the weights into
    files of at most so many. Raises UserError for input that cannot be merged, CheckFailed where the result is not the
    model that was trained; then there is no `out`.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype}: expected one of {', '.join(DTYPES)}")
    refuse_bare_string(texts, "texts")
    adapter, out = Path(adapter), Path(out)
    if out.resolve() == adapter.resolve():
        raise UserError(f"{out}: is the adapter itself; choose another directory")
    check_free(out, "the merged model")
    found = open_base(base if base is not None else base_of(adapter), fresh=True)
    read, layout = read_for(adapter, found)
    refuse_biased_head(layout, str(adapter))
    merged = MergedTensors(found.weights, layout)
    with new_directory(out, "the merged model") as staging, Console().progress as progress:
        written = Base(staging)
        _write_settings(staging, found, read, merged, dtype)
        sequences = _sequences(written, texts) if verify else []
        blocks = written.config.n_layer if verify else 0
        task = progress.add_task("merging", total=len(merged.shapes()) + blocks, note="")

        def advance(*_: str) -> None:
            progress.advance(task)

        chunks = partial(merged.chunks, elements=_COPIED_VALUES)
        write_weights(staging, merged.shapes(), DTYPES[dtype], chunks, max_shard_bytes, advance)
        if unused := sorted(layout.tensors() - merged.used):
            raise CheckFailed(f"merge: {len(unused)} tensors of the adapter were not applied, such as {unused[0]}")
        _check_loadable(staging)
        figures = verify_merge(written, read, merged, dtype, sequences, advance) if verify else {}
        report = _report(written, found, read, merged, dtype, figures)
        hashes = hashes_of(staging, [path.name for path in staging.iterdir()])  # `model.base` checks them
        write_json(staging / MERGE, {**vars(report), "sha256": hashes})
    return report


def _report(
    written: Base, base: Base, adapter: Adapter, merged: MergedTensors, dtype: str, figures: dict[str, Any]
) -> MergeReport:
    layout, tokenizer = merged.layout, written.tokenizer
    return MergeReport(
        len(layout.modules()), len(layout.modules()), dtype, base.fingerprint, adapter.fingerprint, base.name,
        merged.tied, layout.vocabulary, trained_on=base_quantization(adapter), left_out=base.weights.left_out,
        special_tokens="parse" if parses_special_tokens(adapter.provenance) else "text",
        begin_of_text=str(tokenizer.convert_ids_to_tokens(begin_of_text_id(tokenizer))),
        tokenizer_begins_texts=begins_texts(written), changes_nothing=not merged.changes_a_weight,
        merged=(_merged_entry(adapter, base), *base.merged), chat=chat_of(adapter.provenance), **figures,
    )  # fmt: skip


def _merged_entry(adapter: Adapter, base: Base) -> dict[str, Any]:
    """What merge.json records of an adapter; with those that it went on from, if any."""
    chain = recorded_list(adapter.provenance, INIT)
    origin = adapter.origin() | {"base": base.name, "base_fingerprint": base.fingerprint}
    return origin | ({INIT: chain} if chain else {})


def _write_settings(staging: Path, base: Base, adapter: Adapter, merged: MergedTensors, dtype: str) -> None:
    """config.json, generation_config.json and the tokenizer's files."""
    values = {key: value for key, value in base.stored_config.items() if key != "torch_dtype"} | {
        "architectures": ["GPT2LMHeadModel"], "dtype": dtype, "vocab_size": merged.layout.vocabulary,
        "tie_word_embeddings": merged.tied,
    }  # fmt: skip
    write_json(staging / "config.json", dict(sorted(values.items())))
    write_tokenizer(staging, base, adapter, merged.layout)
    if (base.directory / _GENERATION).is_file():
        shutil.copyfile(base.directory / _GENERATION, staging / _GENERATION)
    else:
        GenerationConfig.from_model_config(base.config).save_pretrained(staging)
    if (chat := chat_of(adapter.provenance)) is not None:
        begin = "eos_token" if base.tokenizer.bos_token is None else "bos_token"
        (staging / _TEMPLATE).write_text(jinja_template(chat, begin), encoding="utf-8")


def _sequences(merged: Base, texts: Sequence[str] | None) -> list[torch.Tensor]:
    """Token ids (at most 64,) of each text on which logits are compared."""
    if texts is None:
        texts = [document.text for document in documents("docs", "heldout")[:_SEQUENCES]]
    chosen = [text for text in texts if text]
    if not chosen:
        raise UserError("merge: no text to compare logits on; give some, or none at all for the default")
    encoded = encode_texts(chosen[:_SEQUENCES], merged.tokenizer)
    start, length = begin_of_text_id(merged.tokenizer), min(_LENGTH, merged.config.n_positions)
    return [torch.tensor([start, *ids][:length]) for ids in encoded]


def _check_loadable(directory: Path) -> None:
    """Transformers finds every tensor that its GPT-2 has, and no other, in the files as they were written."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, device_map={"": "meta"}, output_loading_info=True)
    info = loaded[1]
    wrong: list[Any] = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise CheckFailed(f"merge: Transformers does not find {wrong[0]} as it expects; nothing was written")
