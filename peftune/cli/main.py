"""The command line: verbs and their options, no logic; what is heavy is imported in the verbs, so --help is instant."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from peftune.cli import adapters, cache
from peftune.cli.export import export, push
from peftune.cli.launcher.launch import configs, launch
from peftune.cli.measure.perplexity_matrix import evaluate
from peftune.cli.measure.score import score
from peftune.cli.options import BASE_HELP, Adapters, BlockSize, Columns, Json, columns_of, named, source_of, writable
from peftune.cli.output.text_output import echo
from peftune.cli.serve import serve
from peftune.cli.stop import end_with
from peftune.errors import PeftuneError, ReportedElsewhere, UserError, record_for_launcher, report_once_per_machine
from peftune.model.quantized import quiet
from peftune.version import __version__

app = typer.Typer(
    name="peftune",
    help="Fine-tune GPT-2 with LoRA adapters, and trust the numbers that are printed.",
    epilog="Begin with: peftune quickstart (three minutes on two CPU cores, nothing downloaded).",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(adapters.app)
app.add_typer(cache.app)

SplitOn = Annotated[
    Literal["auto", "blank-line", "endoftext", "file", "line"], typer.Option(help="How a txt file becomes documents.")
]
SpecialTokens = Annotated[Literal["parse", "text"], typer.Option(help="How a token that a text spells out is read.")]


@app.command()
def quickstart(
    files: Annotated[list[Path] | None, typer.Argument(help="Your own text files: one more adapter each.")] = None,
    out: Annotated[Path, typer.Option(help="Directory for everything that is made.")] = Path("quickstart"),
) -> None:
    """Train, measure, merge and sample adapters on a built-in base: the whole journey, offline.

    Example:  peftune quickstart my.txt
    """
    from peftune.cli.quickstart import quickstart

    quickstart(out, files or [])


@app.command()
def data(
    sources: Annotated[list[str], typer.Argument(help="Files, globs, builtin:DOMAIN/PART, or hub data sets.")],
    base: Annotated[str, typer.Option(help=f"Whose tokenizer counts. {BASE_HELP}")] = "builtin:small",
    column: Columns = None,
    split_on: SplitOn = "auto",
    special_tokens: SpecialTokens = "text",
    block_size: BlockSize = None,
    json_path: Json = None,
) -> None:
    """Show what is in a corpus: documents, tokens, lengths, how full blocks get, and what is scored.

    Example:  peftune data answers.jsonl --column prompt=question --column completion=answer --base gpt2
    """
    columns = columns_of(column)
    from peftune.cli.output.data import run
    from peftune.model.base import open_base

    run(
        [source_of(path, columns) for path in sources], open_base(base), block_size, split_on, json_path, special_tokens
    )


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file; docs/recipe.md lists every key.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Win over the file.")] = None,
) -> None:
    """Train the adapter that a recipe describes; the same command goes on after an interruption.

    Example:  peftune train launch/recipes/poems.yaml optim.lr=1e-4 run.out=adapters/slow

    This is one process on at most one GPU. `peftune launch` starts several.
    """
    from peftune.config.recipe import load_recipe

    with report_once_per_machine():
        checked = load_recipe(recipe, overrides)  # before torch is imported: a wrong recipe is refused at once
    from peftune.training.distributed.start import process_group
    from peftune.training.run import train

    with process_group():
        train(checked)


app.command("eval")(evaluate)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter directory, of peftune or of PEFT.")],
    out: Annotated[Path, typer.Option(help="Directory for the merged model; must not exist.")],
    base: Annotated[str | None, typer.Option(help=f"{BASE_HELP} Default: what the adapter names.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="What to store.")] = "float32",
    verify: Annotated[bool, typer.Option(help="Compare with base + adapter, on the files read back.")] = True,
) -> None:
    """Fold an adapter into its base: an ordinary GPT-2 checkpoint, verified before it appears.

    Example:  peftune merge adapters/poems --out models/poems
    """
    from peftune.adapters.merge.merge import merge

    report = merge(adapter, out, base=base, dtype=dtype, verify=verify)
    applied = f"{report.modules_applied} of {report.modules_in_adapter} modules"
    echo(f"{out}: {applied} folded into {report.base}, stored as {report.dtype}")
    if report.max_abs_logit_difference is None:
        echo("not verified: merge.json says so too")
    else:
        echo(
            f"read back, against base + adapter: logits differ by at most {report.max_abs_logit_difference:.1e}, "
            f"mean KL {report.mean_kl:.1e} nats per token, the same likeliest token in {report.argmax_agreement:.2%}"
        )
    if report.left_out:
        echo(f"left out, heads of other tasks than language modelling: {', '.join(report.left_out)}")
    if report.trained_on is not None and verify:
        echo(report.quantized_summary())
    if report.rounding_mean_kl is not None:
        echo(
            f"rounding to {report.dtype} costs {report.rounding_mean_kl:.1e} nats per token; before it logits differed "
            f"by at most {report.float32_max_abs_logit_difference:.1e}"
        )


@app.command()
def generate(
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue. May be repeated.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File with one prompt a line.")] = None,
    test_set: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Prompts with references, read as in training.")
    ] = None,
    column: Columns = None,
    out: Annotated[
        list[Path] | None,
        typer.Option(
            callback=writable,
            help="File for the texts: .jsonl with prompts and references, else one a line. May be repeated.",
        ),
    ] = None,
    adapters: Adapters = None,
    use: Annotated[str | None, typer.Option(help="Which adapter; `base` for none. Default: the only one.")] = None,
    base: Annotated[str | None, typer.Option(help=f"{BASE_HELP} Default: what the adapter names.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.")] = 128,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token. Default: 0.8.")] = None,
    top_k: Annotated[int, typer.Option(help="Choose among the k likeliest; 0 is all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Choose among the likeliest that hold this share.")] = 0.95,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 repeats less; 1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Choose among those this many times the likeliest; 0 is all.")] = 0.0,
    presence_penalty: Annotated[float, typer.Option(help="Off the logit of what the text holds; 0 is off.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, each time that it does; 0 is off.")] = 0.0,
    min_new_tokens: Annotated[int, typer.Option(help="At least so many tokens.")] = 0,
    beams: Annotated[int, typer.Option(help="Beam search with so many beams; 1 is off.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string. May be repeated.")] = None,
    precision: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="What to compute in.")] = "fp32",
    interactive: Annotated[bool, typer.Option("--interactive", help="Prompts at the terminal; /help there.")] = False,
    json_path: Json = None,
) -> None:
    """Continue prompts with the base or with an adapter on it, printed as it is written.

    Example:  peftune generate --adapter adapters/poems --prompt "The sea" --temperature 0.7
    """
    from peftune.cli.generate import generate_texts
    from peftune.inference.settings import GenerationSettings

    settings = GenerationSettings(
        max_new_tokens, temperature, top_k, top_p, repetition_penalty, beams, seed, tuple(stop or ()), min_new_tokens,
        min_p, presence_penalty, frequency_penalty,
    )  # fmt: skip
    folders = {name: Path(folder) for name, folder in named("--adapter", adapters).items()}
    if test_set is not None and (prompt or prompts):
        raise UserError("--test-set has prompts of its own; drop --prompt and --prompts")
    if column and test_set is None:
        raise UserError("--column names columns of --test-set; give it, or in --prompts FILE call the column prompt")
    if not interactive:
        source = source_of(test_set, columns_of(column)) if test_set is not None else None
        generate_texts(base, folders, use, prompt or [], prompts, settings, json_path, precision, source, out or [])
        return
    if prompt or prompts or json_path or test_set or out:
        raise UserError("--interactive reads its prompts from the terminal; drop other prompts, --out and --json")
    from peftune.cli.repl import start_repl

    start_repl(base, folders, use, settings, precision)


for _verb in (score, serve, launch, configs, export, push):
    app.command()(_verb)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False
) -> None:
    if version:
        echo(f"peftune {__version__}")
    elif context.invoked_subcommand is None:
        echo(context.get_help())


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the program and leave with its exit code; an error that a person can mend is one line on stderr."""
    quiet()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    end_with(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """The exit code of one call (errors.py lists them); anything not raised on purpose is a bug and passes through."""
    try:
        code = int(app(arguments, prog_name="peftune", standalone_mode=False) or 0)
        sys.stdout.flush()  # here, where what fails is told in one line
    except ReportedElsewhere as error:
        record_for_launcher(f"peftune: {error.reason}")
        return error.exit_code
    except PeftuneError as error:
        return _complain(str(error), error.exit_code)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)  # of the verb that was called in a wrong way
        verb = context.command_path if context is not None else "peftune"
        return _complain(f"{error.format_message()} See: {verb} --help", UserError.exit_code)
    except typer.Abort:
        return _complain("stopped", _STOPPED)
    except BrokenPipeError:  # the reader of our output has gone (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except RuntimeError as error:
        if str(error) != "can't start new thread":
            raise
        return _complain("the system starts no more threads (ulimit -u); end other processes", UserError.exit_code)
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what it could not take is not tried again
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror}; nothing unfinished was kept", UserError.exit_code)
    except Exception as error:
        if not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        return _complain("out of memory; free some, or use a machine with more", UserError.exit_code)
    return _complain("stopped", code) if code == _STOPPED else code


_OF_THE_MACHINE = {
    getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "EMFILE", "ENFILE", "ENOMEM")
} - {None}  # fmt: skip
"""Errors that the machine's limits cause and no path of ours explains; any other is a bug."""
_NO_MEMORY = re.compile("(?i)can(no|')t allocate memory|failed to map segment from shared object$|out of memory")
_STOPPED = 130  # what a shell reports for Ctrl-C


def _complain(message: str, exit_code: int) -> int:
    line = f"peftune: {' '.join(message.split())}"
    record_for_launcher(line)
    echo(line, err=True)
    return exit_code
