"""The command line: verbs and their options, no logic; what is heavy is imported in the verbs, so --help is instant."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from contextvars import copy_context
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from peftune.cli import adapters, cache
from peftune.cli.doctor import doctor
from peftune.cli.export import export, push
from peftune.cli.launcher.launch import configs, launch
from peftune.cli.measure.perplexity_matrix import evaluate
from peftune.cli.measure.score import score
from peftune.cli.measure.sweep import sweep
from peftune.cli.options import (
    BASE_HELP,
    BlockSize,
    Columns,
    Json,
    columns_of,
    data_section_of,
    save_json,
    source_of,
    told,
)
from peftune.cli.output.text_output import echo
from peftune.cli.output.verbosity import one_call, with_verbosity
from peftune.cli.plan import plan
from peftune.cli.report import report, watch
from peftune.cli.serve import serve
from peftune.cli.stop import end_with
from peftune.cli.train import train
from peftune.cli.writing.generation import generate
from peftune.config.choices import Chat, SpecialTokens, SplitOn
from peftune.errors import PeftuneError, ReportedElsewhere, UserError, record_for_launcher
from peftune.model.quantized import quiet
from peftune.version import __version__

app = typer.Typer(
    name="peftune",
    help="Fine-tune GPT-2 with LoRA adapters, and trust the numbers that are printed.",
    epilog="Begin with: peftune quickstart (three minutes on two CPU cores, nothing downloaded).",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(adapters.app)
app.add_typer(cache.app)


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
    split_on: Annotated[SplitOn, typer.Option(help="How a text file becomes documents.")] = "auto",
    special_tokens: Annotated[SpecialTokens, typer.Option(help="How a token that a text spells out is read.")] = "text",
    chat: Annotated[Chat, typer.Option(help="How the messages of a chat become one text.")] = "plain",
    block_size: BlockSize = None,
    fix: Annotated[Path | None, typer.Option(help="Write a cleaned copy and a report there; must not exist.")] = None,
    json_path: Json = None,
) -> None:
    """Show what is in a corpus: documents, tokens, lengths, what is scored, and what is probably wrong with it.

    Example:  peftune data answers.jsonl --column prompt=question --column completion=answer --base gpt2
    """
    how = data_section_of(sources, columns_of(column), split_on=split_on, special_tokens=special_tokens, chat=chat)
    from peftune.cli.output.data import run
    from peftune.model.base import open_base

    run(how, open_base(base), block_size, json_path, fix)


app.command()(train)


app.command("eval")(evaluate)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter directory, of peftune or of PEFT.")],
    out: Annotated[Path, typer.Option(help="Directory for the merged model; must not exist.")],
    base: Annotated[str | None, typer.Option(help=f"{BASE_HELP} Default: what the adapter names.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="What to store.")] = "float32",
    verify: Annotated[bool, typer.Option(help="Compare with base + adapter, on the files read back.")] = True,
    data: Annotated[str | None, typer.Option(help="Text of yours to measure what merging costs on.")] = None,
    column: Columns = None,
    json_path: Json = None,
) -> None:
    """Fold an adapter into its base: an ordinary GPT-2 checkpoint, verified before it appears.

    Example:  peftune merge adapters/poems --out models/poems
    """
    text = None if data is None else source_of(data, columns_of(column))
    from peftune.adapters.merge.merge import merge
    from peftune.adapters.provenance import merged_text
    from peftune.cli.output.merge_cost import losses, print_losses

    before = None if text is None else losses(base, text, adapter)  # here, where a mistake costs no merge
    report = merge(adapter, out, base=base, dtype=dtype, verify=verify)
    save_json(json_path, vars(report))
    applied = f"{report.modules_applied} of {report.modules_in_adapter} modules"
    echo(f"{out}: {applied} folded into {report.base}, stored as {report.dtype}")
    if report.changes_nothing:
        echo("warning: the adapter changes no weight, so the merged model is the base")
    echo(report.summary())
    echo(report.how_to_call())
    if report.merged[1:]:
        echo(f"{report.base} is {merged_text(report.merged[1:])}: {out} holds all of them")
    if report.left_out:
        echo(f"left out, heads of other tasks than language modelling: {', '.join(report.left_out)}")
    if report.trained_on is not None and verify:
        echo(report.quantized_summary())
    if report.rounding_mean_kl is not None:
        echo(report.rounding_summary())
    if text is not None and before is not None:
        print_losses(text.path, {**before, "merged": losses(str(out), text)["base"]})


for _verb in (sweep, generate, score, serve, launch, plan, report, watch, doctor, configs, export, push):
    app.command()(_verb)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False
) -> None:
    if version:
        echo(f"peftune {__version__}")
    elif context.invoked_subcommand is None:
        echo(context.get_help())


for _group in (app, adapters.app, cache.app):
    for _command in (*_group.registered_commands, _group.registered_callback):
        if _command is not None and _command.callback is not None:
            _command.callback = with_verbosity(_command.callback)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the program and leave with its exit code; an error that a person can mend is one line on stderr."""
    quiet()
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else each attempt to reach the hub is three lines
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    end_with(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """The exit code of one call (errors.py lists them); anything not raised on purpose is a bug and passes through."""
    try:
        with one_call():
            code = int(copy_context().run(app, arguments, prog_name="peftune", standalone_mode=False) or 0)
            sys.stdout.flush()  # here, where what fails is told in one line
    except ReportedElsewhere as error:
        record_for_launcher(f"peftune: {error.reason}")
        return error.exit_code
    except PeftuneError as error:
        return _complain(told(error, arguments), error.exit_code)
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
    getattr(errno, f"E{name}", None)
    for name in ("NOSPC", "DQUOT", "FBIG", "IO", "ROFS", "MFILE", "NFILE", "NOMEM", "ACCES", "PERM")
} - {None}
"""Errors that the machine's limits or permissions cause and no path of ours explains; any other is a bug."""
_NO_MEMORY = re.compile("(?i)can(no|')t allocate memory|failed to map segment from shared object$|out of memory")
_STOPPED = 130  # what a shell reports for Ctrl-C


def _complain(message: str, exit_code: int) -> int:
    line = f"peftune: {' '.join(message.split())}"
    record_for_launcher(line)
    echo(line, err=True)
    return exit_code
