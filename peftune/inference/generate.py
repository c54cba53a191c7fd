"""Prompts in, continuations out: with a bank, or with Transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftune.adapters.attach import fit, load_with_rows
from peftune.adapters.base_of import base_of
from peftune.adapters.provenance import parses_special_tokens
from peftune.data.tokens.encode import begin_of_text_id, end_of_text_id
from peftune.device import choose_device, inference_precision
from peftune.errors import CheckFailed, UserError, refuse_bare_string
from peftune.inference.bank import AdapterBank
from peftune.inference.detokenize import Detokenizer
from peftune.inference.request import Generation, OnText, context_ids, slide
from peftune.inference.settings import GenerationSettings
from peftune.model.base import Base, open_base
from peftune.model.load import dtype_of, load_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

    Model = GPT2LMHeadModel | PeftModel

TextGenerator = Callable[[Sequence[str], OnText | None], list[Generation]]


def generate(
    prompts: str | Sequence[str],
    base: str | Path | Base | None = None,
    adapter: Path | str | None = None,
    settings: GenerationSettings | None = None,
    precision: str = "auto",
    on_text: OnText | None = None,
    device: str = "auto",
) -> list[Generation]:
    """Continue every prompt with the base, or with an adapter on it; `AdapterBank.generate` has the rules.

    `base` None is the one that the adapter was trained on. The model is loaded at every call; a bank keeps it.
    Beam search is Transformers' (`generate_with_transformers`). Raises UserError for input that cannot be used,
    CheckFailed where the logits are not finite.
    """
    if base is None:
        base = base_of(*([] if adapter is None else [Path(adapter)]))
    generator = text_generator(base, adapter, settings, precision, device)
    return generator([prompts] if isinstance(prompts, str) else prompts, on_text)


def text_generator(
    base: str | Path | Base,
    adapter: Path | str | None = None,
    settings: GenerationSettings | None = None,
    precision: str = "auto",
    device: str = "auto",
) -> TextGenerator:
    """Load the model; the function that is returned continues prompts with it, call after call."""
    base, chosen = open_base(base), settings or GenerationSettings()
    if chosen.beams > 1:
        used = choose_device(device)  # before anything is loaded
        parse, tokenizer = base.parses_special_tokens, base.tokenizer
        if adapter is None:
            model: Model = load_model(base)
        else:  # in full precision, so that one which changes the base (PiSSA) is rounded once
            read, layout, tokenizer = fit(Path(adapter), base)
            parse = parses_special_tokens(read.provenance)
            model = load_with_rows(base, read, layout)
        model.to(used, dtype_of(inference_precision(precision, used)))  # type: ignore[arg-type]
        return lambda prompts, on_text: generate_with_transformers(model, tokenizer, prompts, chosen, on_text, parse)
    bank, name = AdapterBank(base, precision, device), "adapter" if adapter is not None else None
    if adapter is not None:
        bank.add("adapter", adapter)
    return lambda prompts, on_text: bank.generate(prompts, chosen, name, on_text)


def generate_with_transformers(
    model: Model,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    settings: GenerationSettings,
    on_text: OnText | None = None,
    parse: bool = False,
) -> list[Generation]:
    """Greedy or beam search with a model of Transformers or PEFT, such as one that is being trained.

    One prompt after the other, and `on_text` gets a text at once. Beam search has no sliding window, and what counts
    repetitions counts those in the window. With `parse` special tokens in prompts are tokens. A model in training mode
    is put into evaluation mode meanwhile. Raises UserError for settings that only sampling has and where prompt and
    beams do not fit the model, CheckFailed where the logits are not finite.
    """
    refuse_bare_string(prompts, "prompts")
    check_search(settings, prompts, tokenizer, model.config.n_positions, parse)
    training = model.training
    model.eval()
    try:
        results: list[Generation] = []
        for index, prompt in enumerate(prompts):
            found = _continue(model, tokenizer, prompt, settings, parse)
            for number, generation in enumerate(found, index * len(found)):
                if on_text is not None and generation.text:
                    on_text(number, generation.text)
            results += found
        return results
    finally:
        model.train(training)


def check_search(
    settings: GenerationSettings,
    prompts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    positions: int,
    parse: bool = False,
) -> None:
    """UserError for settings that greedy and beam search do not have, and for prompts that beams do not fit behind."""
    settings.check_ids(len(tokenizer))
    settings.refuse_sampling()
    for number, prompt in enumerate(prompts if settings.beams > 1 else (), 1):
        length, new = len(context_ids(tokenizer, prompt, parse)), settings.max_new_tokens
        if length + new > positions:
            raise UserError(
                f"prompt {number}: {length} tokens and max_new_tokens {new} exceed the model's {positions} positions, "
                "and beam search has no sliding window; shorten one, or use beams 1"
            )


def _continue(
    model: Model, tokenizer: PreTrainedTokenizerFast, prompt: str, settings: GenerationSettings, parse: bool
) -> list[Generation]:
    from transformers import GenerationConfig, LogitsProcessorList, NoRepeatNGramLogitsProcessor

    end, positions = end_of_text_id(tokenizer), model.config.n_positions
    config = GenerationConfig(  # type: ignore[no-untyped-call]  # all is given: generation_config.json changes nothing
        num_beams=settings.beams,
        repetition_penalty=float(settings.repetition_penalty),
        no_repeat_ngram_size=None if settings.repeat_prompt else settings.no_repeat_ngram_size or None,
        do_sample=False,
        num_return_sequences=settings.num_return_sequences,
        length_penalty=float(settings.length_penalty),
        early_stopping=False,
        suppress_tokens=list(range(len(tokenizer), model.config.vocab_size)) or None,  # rows without a token
        eos_token_id=sorted(settings.end_ids(end)) or None,
        bos_token_id=begin_of_text_id(tokenizer),
        pad_token_id=end,
        output_logits=True,
        return_dict_in_generate=True,
    )
    unrepeated = NoRepeatNGramLogitsProcessor(settings.no_repeat_ngram_size) if settings.repeat_prompt else None
    context = context_ids(tokenizer, prompt, parse)
    outputs = [Detokenizer(tokenizer, settings, context) for _ in range(settings.num_return_sequences)]
    texts = [""] * len(outputs)
    window = slide(context, positions)
    while outputs[0].finish_reason is None:  # once for beams, which fit
        room, written = positions + 1 - len(window), len(outputs[0].ids)  # the last token needs no position
        config.max_new_tokens = min(room, settings.max_new_tokens - written)
        config.min_new_tokens = min(config.max_new_tokens, max(0, settings.min_new_tokens - written)) or None
        ids, asked = torch.tensor([window], device=model.device), max(0, len(window) - written)
        processors = LogitsProcessorList()
        if unrepeated is not None:  # only of what was written, not of the first `asked` tokens
            processors.append(lambda seen, scores, asked=asked: unrepeated(seen[:, asked:], scores))
        found: Any = model.generate(  # type: ignore[misc]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            logits_processor=processors,
        )
        if not all(bool(torch.isfinite(logits).all()) for logits in found.logits):
            raise CheckFailed(f"the model's logits are not finite in {model.dtype}; try fp32")
        rows = found.sequences[:, len(window) :].tolist()
        for number, (output, tokens) in enumerate(zip(outputs, rows, strict=True)):
            for token in tokens:
                if output.finish_reason is None:
                    texts[number] += output.push(token, end)
        window = slide(window + rows[0], positions)
    results = []
    for output, text in zip(outputs, texts, strict=True):
        assert output.finish_reason is not None, "beams are of full length, or ended"
        results.append(Generation(prompt, text, tuple(output.ids), output.finish_reason, len(context), None))
    return results
