"""The tokenizer of a merged model: the base's files, which put the begin of text before a text as training did.

Other programs call `tokenizer(text)` and no more: Transformers' pipeline, vLLM, llama.cpp's converter. In version 5 of
Transformers a post-processor in tokenizer.json decides, without that file `add_bos_token` in tokenizer_config.json.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from peftune.adapters.directory import Adapter
from peftune.adapters.layout import AdapterLayout
from peftune.data.tokens.encode import begin_of_text_id, encode_texts
from peftune.errors import UserError
from peftune.files import read_object, read_object_if_present, write_json
from peftune.model.base import Base
from peftune.model.tokenizer import VOCABULARIES

_FILES = (
    "tokenizer_config.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    *VOCABULARIES,
)  # fmt: skip
_PROBE = "a b"


def write_tokenizer(staging: Path, base: Base, adapter: Adapter, layout: AdapterLayout) -> None:
    """Copy the files that the merged model's tokenizer is read from, and have it begin texts where they can say so."""
    from transformers import PreTrainedTokenizerFast

    directory = _directory(base, adapter, layout)
    for file in (directory / name for name in _FILES):
        if file.is_file():
            shutil.copyfile(file, staging / file.name)
    whole, config = staging / "tokenizer.json", staging / "tokenizer_config.json"
    if whole.is_file():
        begin = begin_of_text_id(base.tokenizer)
        state = read_object(whole, str(whole))
        text = str(base.tokenizer.convert_ids_to_tokens(begin))
        write_json(whole, state | {"post_processor": _template(text, begin)})
    if whole.is_file() or (staging / "vocab.json").is_file():
        stored = read_object_if_present(config, str(config)) or {}
        if whole.is_file() and type(base.tokenizer) is PreTrainedTokenizerFast:  # GPT-2's own class would cut otherwise
            stored["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_json(config, stored | {"add_bos_token": True})


def begins_texts(merged: Base) -> bool:
    """Whether Transformers, asked for the ids of a text, puts the begin of text before it and nothing else."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(merged.directory, trust_remote_code=False)
        theirs: Any = tokenizer(_PROBE)["input_ids"]
    except Exception:  # whatever it makes of a tokenizer that it does not know: nobody gets ids from it then
        return False
    ours = [begin_of_text_id(merged.tokenizer), *encode_texts([_PROBE], merged.tokenizer)[0]]
    return bool(theirs == ours)


def _template(token: str, number: int) -> dict[str, Any]:
    """tokenizers' post-processor that puts a token before a text, and before each of a pair."""
    parts = {
        key: [{"SpecialToken": {"id": token, "type_id": kind}}, {"Sequence": {"id": key, "type_id": kind}}]
        for kind, key in enumerate("AB")
    }
    return {
        "type": "TemplateProcessing", "single": parts["A"], "pair": parts["A"] + parts["B"],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }  # fmt: skip


def _directory(base: Base, adapter: Adapter, layout: AdapterLayout) -> Path:
    """The base's tokenizer, or the adapter's own where it has rows for new tokens, or more tokens than the base."""
    own, vocabulary = adapter.directory, layout.vocabulary
    has_own = any((own / name).is_file() for name in VOCABULARIES)
    if vocabulary == base.config.vocab_size and not (layout.rows and has_own):
        return base.directory
    if not has_own:
        raise UserError(
            f"adapter {own}: has {vocabulary} tokens, the base has {base.config.vocab_size}, "
            "and the adapter holds no tokenizer; copy the tokenizer that it was trained with into its directory"
        )
    return own
