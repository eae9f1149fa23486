"""Lint, formatting and types, with the settings of pyproject.toml."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["ruff", "check", "--quiet", "--output-format", "concise", "."], id="ruff-check"),
        pytest.param(["ruff", "format", "--quiet", "--diff", "."], id="ruff-format"),
        pytest.param(["mypy"], id="mypy"),
    ],
)
def test_style(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
