"""`peftune generate`: load a base and at most one adapter, continue the prompts, print and record the texts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from peftune.adapters.attach import fit
from peftune.adapters.base_of import base_of
from peftune.adapters.provenance import chat_of, parses_special_tokens, read_provenance
from peftune.cli.options import save_json
from peftune.cli.output.text_output import CONTINUATION, HEADER, PROMPT, TextPrinter
from peftune.config.data_section import Source
from peftune.console import Console
from peftune.data.references import Item, as_line, read_items, read_prompts, write_hypotheses
from peftune.data.sources.chat_template import EOS_TURNS, STOPS
from peftune.device import choose_device, inference_precision
from peftune.errors import UserError
from peftune.inference.generate import TextGenerator, check_search, text_generator
from peftune.inference.request import Generation, context_ids, slide
from peftune.inference.settings import GenerationSettings
from peftune.model.base import Base, open_base

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BATCH = 8  # prompts


def generate_texts(
    base: str | None,
    adapters: Mapping[str, Path],
    use: str | None,
    prompts: Sequence[str],
    prompts_file: Path | None,
    settings: GenerationSettings,
    json_path: Path | None = None,
    precision: str = "auto",
    test_set: Source | None = None,
    out: Sequence[Path] = (),
    device: str = "auto",
) -> None:
    """Continue the prompts given and those of the file, on stdout; with `json_path` as JSON too.

    The prompts of a `test_set` are continued one by one in a line of their own on stdout, or in the files `out`
    (`write_hypotheses`), which may take those of the other prompts too.

    `use` names the adapter, "base" is none of them; None takes the only one. `base` None is the one that the adapter
    was trained on. `precision` is auto, fp32, bf16 or fp16. A single prompt's text appears as it is generated.
    When nobody reads stdout any more, the work ends, or goes on for the JSON. Raises UserError for input that cannot
    be used, CheckFailed where the logits are not finite.
    """
    items = [Item(text) for text in gather(prompts, prompts_file)] if test_set is None else read_items(test_set)
    texts = [str(item.prompt) for item in items]
    if (test_set is not None or out) and settings.num_return_sequences > 1:
        raise UserError("a test set, and a file of texts, takes one text for each prompt; drop --num-return-sequences")
    name = choose_adapter(adapters, use)
    found = open_base(base or base_of(*([adapters[name]] if name else adapters.values())))
    chosen = adapters[name] if name else None
    if any(item.is_chat for item in items):
        if chosen and chat_of(read_provenance(chosen)) == EOS_TURNS:
            raise UserError(f"{chosen}: a test set of conversations is for data.chat: plain, and this has eos-turns")
        settings = dataclasses.replace(settings, stop=(*settings.stop, *STOPS))
    parse = parses_special_tokens(read_provenance(chosen)) if chosen else found.parses_special_tokens
    tokenizer = fit(chosen, found)[2] if chosen else found.tokenizer
    if settings.beams > 1:
        check_search(settings, texts, tokenizer, found.config.n_positions, parse)
    settings.check_ids(len(tokenizer))
    used = choose_device(device)
    precision = inference_precision(precision, used)
    generator = text_generator(found, chosen, settings, precision, used.type)
    _warn_of_cut_prompts(texts, found, tokenizer, parse)
    printer = TextPrinter(outlives_pipe=json_path is not None)
    with suppress(BrokenPipeError):  # nobody reads any more: done
        several = settings.num_return_sequences
        if test_set is not None or out:
            generations = _all_at_once(generator, texts)
            hypotheses = [generation.text for generation in generations]
            for path in out:
                write_hypotheses(path, items, hypotheses)
            for text in () if out else hypotheses:
                printer.write(f"{as_line(text)}\n")
        elif len(texts) == several == 1:
            generations = [_one(generator, texts[0], printer)]
        else:
            generations = _several(generator, texts, several, printer)
        told = dataclasses.asdict(settings) | {"temperature": settings.sampling_temperature, "precision": precision}
        facts = {"base": found.name, "adapter": name, "settings": told}
        save_json(json_path, facts | {"generations": list(map(vars, generations))})


def choose_adapter(adapters: Mapping[str, Path], use: str | None) -> str | None:
    """The name of the adapter to use, None for the base alone; UserError for a name that nothing has."""
    if "base" in adapters:
        raise UserError("an adapter is named base, which stands for no adapter; use --adapter OTHER=DIR")
    known = ", ".join([*adapters, "base"])
    if use is None and len(adapters) > 1:
        raise UserError(f"{len(adapters)} adapters and no choice; expected --use with one of {known}")
    name = next(iter(adapters), "base") if use is None else use
    if name != "base" and name not in adapters:
        raise UserError(f"--use {use}: no adapter has this name; known: {known}")
    return None if name == "base" else name


def _warn_of_cut_prompts(prompts: list[str], base: Base, tokenizer: PreTrainedTokenizerFast, parse: bool) -> None:
    positions = base.config.n_positions
    for number, prompt in enumerate(prompts, 1):
        ids = context_ids(tokenizer, prompt, parse)
        if (kept := len(slide(ids, positions))) < len(ids):
            has = f"{len(ids)} tokens, the model has {positions} positions"
            Console().say(f"prompt {number}: {has}: it reads the last {kept}")


def _one(generator: TextGenerator, prompt: str, printer: TextPrinter) -> Generation:
    printer.write(prompt, PROMPT)
    display, began = Console(), time.monotonic()
    (generation,) = generator([prompt], lambda _, text: printer.write(text, CONTINUATION))
    printer.end()
    if display.console.is_terminal:
        reason = {"stop": "stop string", "length": "length reached", "end": "document ended"}[generation.finish_reason]
        seed = f", seed {generation.seed}" if generation.seed is not None else ""
        display.say(f"{len(generation.ids)} tokens in {time.monotonic() - began:.1f} s, {reason}{seed}")
    return generation


def _several(generator: TextGenerator, prompts: list[str], each: int, printer: TextPrinter) -> list[Generation]:
    """Print `each` texts for every prompt, under a heading that counts the prompts and, of several, the texts."""
    generations: list[Generation] = []
    progress = Console().progress
    progress.disable = progress.disable or printer.is_terminal  # there the texts themselves are the progress
    with progress:
        task = progress.add_task("generate", total=len(prompts), note="")
        for first in range(0, len(prompts), _BATCH):
            group = generator(prompts[first : first + _BATCH], None)
            for index, generation in enumerate(group, first * each):
                number, text = index // each + 1, f", text {index % each + 1} of {each}" if each > 1 else ""
                blank = "" if index == 0 else "\n"
                printer.write(f"{blank}=== {number} of {len(prompts)}{text} ===\n", HEADER)
                printer.write(generation.prompt, PROMPT)
                printer.write(generation.text, CONTINUATION)
                printer.end()
            generations += group
            progress.advance(task, len(group) / each)
    return generations


def _all_at_once(generator: TextGenerator, prompts: list[str]) -> list[Generation]:
    """All prompts in one call: a text that ends makes room for the next. The bar shows how many have begun."""
    begun: set[int] = set()
    with Console().progress as progress:
        task = progress.add_task("generate", total=len(prompts), note="")

        def listen(index: int, _: str) -> None:
            begun.add(index)
            progress.update(task, completed=len(begun))

        return generator(prompts, listen)


def gather(given: Sequence[str], file: Path | None) -> list[str]:
    """The prompts given, then those of the file; UserError where there is none, or one is not valid Unicode."""
    prompts = [*given, *(read_prompts(file) if file is not None else ())]
    if not prompts:
        source = f"{file}: holds no prompt" if file is not None else "no prompt"
        raise UserError(f'{source}; give --prompt TEXT (--prompt "" begins a document) or --prompts FILE')
    for number, prompt in enumerate(prompts, 1):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"prompt {number}: not valid UTF-8 at character {error.start + 1}; expected text") from None
    return prompts
