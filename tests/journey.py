"""Follows a guide as a reader would: writes the files it shows, and runs its commands in their order."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from peftune.cli import main

GUIDES = Path(__file__).parents[1] / "docs" / "guides"
PROGRAMS = {"peftune": "-m peftune", "python": "", "torchrun": "-m torch.distributed.run"}
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# ([\w./-]+\.(?:py|yaml))\n")
_LOOP = re.compile(r"^for (\w+) in ([^\n;]+); do\n(.*?)^done\n", re.MULTILINE | re.DOTALL)
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_TEXTS = re.compile(r"^(<\|endoftext\|>|  sample ).*\n", re.MULTILINE)
_WORD = re.compile(r"[^\W\d_]{2,}")


@dataclass
class Journey:
    """One guide at small size.

    `smaller`: texts of files and commands, and what stands in their place here (`PORT` is a free one).
    `elsewhere`: commands that are only parsed here, with the reason. `leaves`: what is there at its end.
    """

    page: str
    smaller: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)
    leaves: tuple[str, ...] = ()

    def blocks(self) -> list[tuple[str, str]]:
        """Language and text of each fenced block, made small."""
        blocks: list[tuple[str, str]] = _FENCE.findall((GUIDES / f"{self.page}.md").read_text(encoding="utf-8"))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        for long, short in self.smaller.items():
            assert any(long in text for _, text in blocks), f"{self.page}.md has no {long!r}"
            short = short.replace("PORT", port)
            blocks = [(kind, text if kind == "console" else text.replace(long, short)) for kind, text in blocks]
        return blocks


def commands(block: str) -> list[str]:
    """Its lines without comments; continued lines are one, and a loop is what it does."""
    flat = _LOOP.sub(
        lambda loop: "".join(loop[3].replace(f"${loop[1]}", word) for word in loop[2].split()), block
    ).replace("\\\n", " ")
    lines = [
        shlex.join(shlex.split(line, comments=True)) if _plain(line) else line
        for line in map(str.strip, flat.splitlines())
    ]
    return [line for line in lines if line]


def _plain(line: str) -> bool:
    """Whether a line calls peftune or a Python file and asks nothing of the shell; servers and ranks need processes."""
    bare = _QUOTED.sub("", line.partition(" #")[0])
    if re.match("peftune (serve|launch) ", line) and "--dry-run" not in line:
        return False
    return line.startswith(("peftune ", "python ", "#")) and not re.search(r"[|&;<>$*`]", bare)


class Reader:
    """Somebody in an empty directory; `printed` is all that they have seen."""

    def __init__(self, output: pytest.CaptureFixture[str], programs: Path) -> None:
        self.output = output
        self.printed = ""
        self.server: subprocess.Popen[str] | None = None
        programs.mkdir()
        for name, arguments in PROGRAMS.items():
            (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n', encoding="utf-8")
            (programs / name).chmod(0o755)
        self.environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}

    def follow(self, journey: Journey) -> None:
        """Do all that the page says; AssertionError at the first command that fails, or text that was not printed."""
        skipped = set()
        for language, text in journey.blocks():
            if named := _FILE.match(text):
                Path(named[1]).write_text(text, encoding="utf-8")
            elif language == "console":
                self.saw(text)
            elif language == "bash":
                lines = commands(text)
                if lines[0] in journey.elsewhere:
                    skipped.update(lines)
                    for line in lines:
                        parse(line)
                elif lines[0].startswith("peftune serve "):
                    self.serve(text)
                elif all(_plain(line) for line in lines):
                    for line in lines:
                        self.call(shlex.split(line))
                else:
                    self.shell(text)
            else:
                assert language in ("text", "json"), f"a block of {language} that names no file"
        assert skipped == set(journey.elsewhere)
        assert [path for path in journey.leaves if not Path(path).exists()] == []

    def call(self, words: list[str]) -> None:
        """Call peftune, or run a Python file, in this process: a start of Python and torch takes seconds."""
        code = 0
        if words[0] == "python":
            runpy.run_path(words[1], run_name="__main__")
        else:
            code = main.run(words[1:])
        out, err = self.output.readouterr()
        self.printed += out + err
        assert code == 0, f"{shlex.join(words)} ended with {code}:\n{out}{err}"

    def shell(self, text: str) -> None:
        """Run what asks something of the shell as it stands."""
        line = ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(line, env=self.environment, capture_output=True, text=True, timeout=600, check=False)
        self.printed += done.stdout + done.stderr
        refused = done.returncode or '{"error"' in done.stdout  # curl ends with 0 where a server refuses
        assert not refused, f"{text}\nended with {done.returncode}:\n{done.stdout}{done.stderr}"

    def serve(self, text: str) -> None:
        """Start a server, as in a second terminal, and wait for the line that says it is ready."""
        line = ["bash", "-euc", f"exec {text}"]
        self.server = subprocess.Popen(line, env=self.environment, text=True, stdout=subprocess.PIPE)
        assert self.server.stdout is not None
        ready = self.server.stdout.readline()
        assert "serves" in ready, f"the server ended with {self.server.wait(60)}"
        self.printed += ready

    def leave(self) -> None:
        """Stop the server, which ends with exit code 0 if all was well."""
        if self.server is not None:
            self.server.send_signal(signal.SIGTERM)
            out, _ = self.server.communicate(timeout=60)
            assert self.server.returncode == 0, out
            self.server = None

    def saw(self, excerpt: str) -> None:
        """Assert that each word of an excerpt has been printed; numbers, texts and samples may differ at small size."""
        excerpt = _TEXTS.sub("", excerpt)
        missing = set(_WORD.findall(excerpt)) - set(_WORD.findall(self.printed))
        assert not missing, f"{sorted(missing)} of this excerpt are not printed:\n{excerpt}"


def parse(line: str) -> None:
    """Have the command line read a call that is not run: verbs, options and values are known, files are there."""
    words = shlex.split(line)
    for word in words:
        assert not word.startswith("launch/") or (GUIDES.parents[1] / word).is_file(), word
    if "peftune" in words:
        verb, *rest = words[words.index("peftune") + 1 :]
        group = get_command(main.app)
        command = group.get_command(typer.Context(group), verb)  # type: ignore[attr-defined]
        assert command is not None, f"peftune has no verb {verb}"
        command.make_context(verb, rest)
