"""`peftune generate`: load a base and at most one adapter, continue the prompts, print and record the texts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from peftune.adapters.base_of import base_of
from peftune.adapters.directory import load_onto
from peftune.adapters.provenance import check_base
from peftune.cli.prompts import gather
from peftune.cli.text_output import TextPrinter, as_json
from peftune.console import Console
from peftune.errors import UserError
from peftune.files import check_writable, write_json
from peftune.inference.bank import AdapterBank
from peftune.inference.decode import OnText, slide
from peftune.inference.generate import Generation, GenerationSettings, context_ids, generate
from peftune.model.base import open_base
from peftune.model.load import DTYPES, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from peftune.inference.decode import Model

_TOGETHER = 8  # prompts in one batch


def run(
    base: str | None,
    adapters: Mapping[str, Path],
    use: str | None,
    prompts: Sequence[str],
    prompts_file: Path | None,
    settings: GenerationSettings,
    json_path: Path | None = None,
    precision: str = "fp32",
    stream: bool = True,
) -> None:
    """Continue the prompts given and those of the file, on stdout; with `json_path` as JSON too.

    `use` names the adapter, "base" is none of them; None takes the only one. `base` None is the one that the adapter
    was trained on. `precision` is fp32, bf16 or fp16. With `stream` a single prompt's text appears as it is written.
    When nobody reads stdout any more, the work ends, or goes on for the JSON. Raises UserError for input that cannot
    be used, CheckFailed where the logits are not finite.
    """
    if precision not in DTYPES:
        raise UserError(f"precision is {precision}, expected one of {', '.join(DTYPES)}")
    if json_path is not None:
        check_writable(json_path)
    texts = gather(prompts, prompts_file)
    name = choose_adapter(adapters, use)
    base = base or recorded_base(adapters, name)
    writer = _writer(base, name, adapters[name] if name else None, precision, settings)
    _warn_of_cut_prompts(texts, writer)
    printer = TextPrinter(outlives_pipe=json_path is not None)
    with suppress(BrokenPipeError):  # nobody reads any more: done
        generations = [_one(writer, texts[0], printer, stream)] if len(texts) == 1 else _several(writer, texts, printer)
        if json_path is not None:
            used = dataclasses.asdict(settings) | {"temperature": settings.sampling_temperature, "precision": precision}
            write_json(json_path, as_json({"base": base, "adapter": name, "settings": used}, generations))


def choose_adapter(adapters: Mapping[str, Path], use: str | None) -> str | None:
    """The name of the adapter to use, None for the base alone; UserError for a name that nothing has."""
    if "base" in adapters:
        raise UserError("an adapter is named base, which stands for no adapter; use --adapter OTHER=DIR")
    known = ", ".join([*adapters, "base"])
    if use is None and len(adapters) > 1:
        raise UserError(f"{len(adapters)} adapters and no choice; expected --use with one of {known}")
    if use is not None and use != "base" and use not in adapters:
        raise UserError(f"--use {use}: no adapter has this name; known: {known}")
    if use is None:
        return next(iter(adapters), None)
    return None if use == "base" else use


@dataclass(frozen=True)
class _Writer:
    """What continues prompts: `write(prompts, on_text)`, of a model that has so many positions."""

    write: Callable[[Sequence[str], OnText | None], list[Generation]]
    tokenizer: PreTrainedTokenizerFast
    positions: int


def _writer(base: str, name: str | None, adapter: Path | None, precision: str, settings: GenerationSettings) -> _Writer:
    """A bank with the one adapter on it; beam search, which a bank has not, goes through Transformers."""
    if settings.beams > 1:
        model, tokenizer = load(base, adapter, precision)
        return _Writer(
            lambda prompts, on_text: generate(model, tokenizer, prompts, settings, on_text),
            tokenizer,
            model.config.n_positions,
        )
    bank = AdapterBank(base, precision)
    if name is not None and adapter is not None:
        bank.add(name, adapter)
    return _Writer(
        lambda prompts, on_text: bank.generate(prompts, settings, name, on_text, slots=_TOGETHER),
        bank.tokenizer,
        bank.config.n_positions,
    )


def load(base: str, adapter: Path | None, precision: str) -> tuple[Model, PreTrainedTokenizerFast]:
    """The base (a merged model is one too) with the adapter on it, in `precision` on the GPU if there is one.

    The adapter is put on in full precision, so that one which changes the base (PiSSA) is rounded once, at the end.
    """
    found = open_base(base)
    if adapter is not None:
        check_base(adapter, found)
    tokenizer = found.tokenizer
    model: Model = load_model(found)
    if adapter is not None:
        model = load_onto(model, adapter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device, DTYPES[precision])  # type: ignore[arg-type]
    return model.eval(), tokenizer


def recorded_base(adapters: Mapping[str, Path], name: str | None) -> str:
    """The base that the adapter of this name was trained on, or all of them; UserError where that is not one."""
    named = sorted({base_of(adapters[name])} if name else {base_of(directory) for directory in adapters.values()})
    if len(named) != 1:
        found = f"the adapters name {', '.join(named)}" if named else "no base and no adapter"
        raise UserError(f"{found}; expected --base with a hub name, a directory or builtin:small")
    return named[0]


def _warn_of_cut_prompts(prompts: list[str], writer: _Writer) -> None:
    for number, prompt in enumerate(prompts, 1):
        ids = context_ids(writer.tokenizer, prompt)
        read = len(slide(ids, writer.positions))
        if read < len(ids):
            has = f"the model has {writer.positions} positions"
            Console().say(f"prompt {number}: {len(ids)} tokens, {has}: it reads the last {read}")


def _one(writer: _Writer, prompt: str, printer: TextPrinter, stream: bool) -> Generation:
    printer.prompt(prompt)
    began = time.monotonic()
    on_text = (lambda _, piece: printer.continuation(piece)) if stream else None
    (generation,) = writer.write([prompt], on_text)
    if not stream:
        printer.continuation(generation.text)
    printer.end()
    display, seconds = Console(), time.monotonic() - began
    if display.console.is_terminal:
        reason = {"stop": "stop string", "length": "length reached", "end": "document ended"}[generation.finish_reason]
        seed = f", seed {generation.seed}" if generation.seed is not None else ""
        display.say(f"{len(generation.ids)} tokens in {seconds:.1f} s, {reason}{seed}")
    return generation


def _several(writer: _Writer, prompts: list[str], printer: TextPrinter) -> list[Generation]:
    generations: list[Generation] = []
    progress = Console().progress
    progress.disable = progress.disable or printer.is_terminal  # there the texts themselves are the progress
    with progress:
        task = progress.add_task("generate", total=len(prompts), note="")
        for first in range(0, len(prompts), _TOGETHER):
            group = writer.write(prompts[first : first + _TOGETHER], None)
            for generation in group:
                generations.append(generation)
                printer.header(len(generations), len(prompts))
                printer.prompt(generation.prompt)
                printer.continuation(generation.text)
                printer.end()
            progress.advance(task, len(group))
    return generations
