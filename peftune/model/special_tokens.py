"""What Transformers leaves open, or gets wrong, in the tokenizers that GPT-2s other than OpenAI's are published with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_OTHER_NAMES = (("eos_token", "sep_token"), ("bos_token", "cls_token"))  # BertTokenizer has [SEP] and [CLS] alone


def name_ends(tokenizer: PreTrainedTokenizerFast, configs: Sequence[dict[str, Any]], rows: int) -> None:
    """Set `eos_token` and `bos_token` where the tokenizer names none that an embedding of so many rows has.

    They are then what one of the configurations says, if that is a special token, or `[SEP]` and `[CLS]`, or what a
    configuration says.
    """
    for name, other in _OTHER_NAMES:
        own = getattr(tokenizer, f"{name}_id")
        if isinstance(own, int) and own < rows:
            continue
        numbers = list(_numbers(configs, f"{name}_id", min(rows, len(tokenizer))))
        texts = [str(tokenizer.convert_ids_to_tokens(number)) for number in numbers]
        special = [text for text in texts if text in _special_texts(tokenizer)]
        if found := [*special, *filter(None, [getattr(tokenizer, other)]), *texts]:
            setattr(tokenizer, name, str(found[0]))


def _numbers(configs: Sequence[dict[str, Any]], key: str, below: int) -> Iterator[int]:
    for config in configs:
        value = config.get(key)
        for number in value if isinstance(value, list) else [value]:
            if type(number) is int and 0 <= number < below:
                yield number


def _special_texts(tokenizer: PreTrainedTokenizerFast) -> set[str]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def repair_unknown(tokenizer: PreTrainedTokenizerFast) -> None:
    """Text that no piece covers becomes the unknown token, wherever that stands in a Unigram vocabulary.

    `T5Tokenizer` of Transformers 5 takes token 2 for it, in rinna's vocabularies the end of text.
    """
    from tokenizers.models import Unigram

    backend: Tokenizer = tokenizer.backend_tokenizer
    unknown = tokenizer.unk_token_id
    if not isinstance(backend.model, Unigram) or not isinstance(unknown, int):
        return
    model = json.loads(backend.to_str())["model"]
    if model["unk_id"] != unknown and unknown < len(model["vocab"]):
        vocabulary = [(piece, score) for piece, score in model["vocab"]]
        backend.model = Unigram(vocabulary, unk_id=unknown, byte_fallback=model.get("byte_fallback", False))


def cuts_as(backend: Tokenizer, state: dict[str, Any]) -> bool:
    """Whether a tokenizer that was built cuts texts by steps of the same kinds as its tokenizer.json says.

    `GPT2Tokenizer` of Transformers 5 builds GPT-2's own steps, whatever the file says (KoGPT2's are others).
    """
    model = state.get("model")
    if isinstance(model, dict) and model.get("type", "BPE") != type(backend.model).__name__:
        return False
    built = [json.loads(part.__getstate__()) if part else None for part in (backend.normalizer, backend.pre_tokenizer)]
    return [_kinds(part) for part in built] == [_kinds(state.get(key)) for key in ("normalizer", "pre_tokenizer")]


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether every text has tokens, and they give it back to the byte, as in GPT-2's own vocabulary."""
    decoder = tokenizer.decoder
    kinds = _kinds(json.loads(decoder.__getstate__()) if decoder else None)
    return kinds == ["ByteLevel"] and tokenizer.normalizer is None


def _kinds(part: Any) -> list[str]:
    """The kinds of the steps in a normalizer, pre-tokenizer or decoder, in order."""
    if not isinstance(part, dict):
        return []
    inner = next((part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part), None)
    return [str(part.get("type"))] if inner is None else [kind for step in inner for kind in _kinds(step)]
