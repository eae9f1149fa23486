"""The command line: help without torch, commands found lazily, errors that list what there is."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from longctx import __version__, cli


def test_help_lists_the_commands(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out and command.summary in out for name, command in cli.COMMANDS.items())


def test_no_command_is_an_error_that_shows_the_help(capsys):
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", cli.usage())


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"longctx {__version__}\n"


def test_an_unknown_command_lists_the_known(capsys):
    assert cli.main(["trian", "attention=ring"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "longctx: unknown command 'trian'; the commands are: train, plan, verify\n"


@pytest.mark.parametrize("argv", [["train", "--help"], ["train", "attention=ring", "-h"]])
def test_train_help(capsys, argv):
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == cli.TRAIN_HELP


@pytest.mark.parametrize("argv", [["verify", "--help"], ["verify", "attention=ring", "-h"]])
def test_verify_help(capsys, argv):
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == cli.VERIFY_HELP


@pytest.mark.parametrize("status", [0, 3])
def test_a_command_gets_its_arguments_and_gives_the_status(monkeypatch, status):
    seen = []
    module = types.ModuleType("longctx.train")
    module.main = lambda argv: seen.append(argv) or status
    monkeypatch.setitem(sys.modules, "longctx.train", module)
    assert cli.main(["train", "attention=ring", "data.seq_len=64"]) == status
    assert seen == [["attention=ring", "data.seq_len=64"]]


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["verify", "--help"]])
def test_help_imports_nothing_heavy(argv):
    code = "import sys; from longctx.cli import main; main(sys.argv[1:]); sys.exit(' '.join(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    loaded = set(done.stderr.split())
    assert {"longctx", "longctx.cli"} <= loaded
    assert not loaded & {"torch", "numpy", "hydra", "omegaconf", "longctx.train", "longctx.verify"}


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "longctx", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown command 'nonsense'" in done.stderr


@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_leaves_ends_the_command_quietly(buffered):
    command = [sys.executable, *([] if buffered else ["-u"]), "-m", "longctx", "--help"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, env=environment, timeout=60)
    assert (done.returncode, done.stderr) == (141, b"")


def test_what_cannot_be_written_is_no_success():
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "longctx", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith(b"error: output could not be written: ")
