"""Where the key comes from, and that no server stands open to others unless its operator says so."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from peftune.cli import main
from peftune.errors import UserError
from peftune.serve import server
from peftune.serve.key import VARIABLE, check_reach, find_key
from peftune.serve.settings import ServeSettings


@pytest.fixture(autouse=True)
def _no_key_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def refusal(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main.run(["serve", "--base", "builtin:small", "--port", "0", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("peftune: ") and err.count("\n") == 1, (out, err)
    return err


@pytest.mark.parametrize("host", ["0.0.0.0", "0"])
def test_an_address_that_others_reach_needs_a_key_or_a_word_that_it_has_none(
    host: str, capfd: pytest.CaptureFixture[str]
) -> None:
    told = refusal(capfd, "--host", host)
    assert f"{host} is reached from other machines (0.0.0.0) and no API key is set" in told
    assert "--api-key-file" in told and "PEFTUNE_API_KEY" in told and "--no-auth" in told


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_every_address_of_ipv6_is_one_that_others_reach() -> None:
    with server.listen("::", 0) as listener, pytest.raises(UserError, match="no API key"):
        check_reach(listener, ServeSettings(host="::"))


def test_a_name_is_judged_by_the_address_that_it_means(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("0.0.0.0", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with server.listen("localhost", 0) as listener, pytest.raises(UserError, match="localhost is reached from"):
        check_reach(listener, ServeSettings(host="localhost"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    with server.listen(host, 0) as listener:
        check_reach(listener, ServeSettings(host=host))


@pytest.mark.parametrize("settings", [{"api_key": "k"}, {"no_auth": True}])
def test_a_key_or_the_word_opens_every_address(settings: dict[str, Any]) -> None:
    with server.listen("0.0.0.0", 0) as listener:
        check_reach(listener, ServeSettings(host="0.0.0.0", **settings))


def test_a_key_comes_from_the_command_line_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key"
    file.write_text("of the file\n")
    file.chmod(0o600)
    assert find_key(None, None) is None
    monkeypatch.setenv(VARIABLE, "of the environment")
    assert find_key(None, None) == "of the environment"
    assert find_key(None, file) == "of the file"
    assert find_key("of the line", None) == "of the line"


def test_a_key_from_a_pipe_is_read() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"piped\r\n")
    os.close(writer)
    try:
        assert find_key(None, Path(f"/dev/fd/{reader}")) == "piped"
    finally:
        os.close(reader)


@pytest.mark.parametrize("content", [b"", b"\n", b" \n", b"two\nlines\n", b"x" * 5000, "schlüssel".encode(), b"\xff"])
def test_a_file_without_one_printable_line_is_refused_and_not_quoted(
    content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_bytes(content)
    (tmp_path / "key").chmod(0o600)
    told = refusal(capfd, "--api-key-file", str(tmp_path / "key"))
    assert "expected" in told
    assert not any(part in told for part in ("two", "xxxxx", "schl"))


@pytest.mark.parametrize("name", ["nothing", "."])
def test_a_file_that_cannot_be_read_is_named(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert str(tmp_path / name) in refusal(capfd, "--api-key-file", str(tmp_path / name))


def test_an_empty_key_is_refused_wherever_it_comes_from(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "the key is set and empty" in refusal(capfd, "--api-key", "")
    monkeypatch.setenv(VARIABLE, "")
    assert "PEFTUNE_API_KEY is set and empty" in refusal(capfd)


def test_what_contradicts_itself_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text("k")
    assert "keep the file" in refusal(capfd, "--api-key", "s3cret", "--api-key-file", str(tmp_path / "key"))
    monkeypatch.setenv(VARIABLE, "s3cret")
    told = refusal(capfd, "--no-auth")
    assert "no_auth" in told and "s3cret" not in told


def test_a_file_that_every_user_can_read_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "key"
    file.write_text("k\n")
    for mode, told in ((0o644, True), (0o640, False), (0o600, False)):
        file.chmod(mode)
        assert find_key(None, file) == "k"
        assert ("can be read by every user" in capfd.readouterr().err) is told


def test_a_key_is_in_no_text_of_the_settings() -> None:
    assert "s3cret" not in repr(ServeSettings(api_key="s3cret"))
