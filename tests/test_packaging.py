"""A built wheel holds all that runs: the package, the linked folders as part of it, the configs, nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("longctx", "kernels", "parallel", "configs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build from a copy (a build leaves files behind), without network: setuptools is one of the test requirements."""
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in (*FOLDERS, "tests"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    script = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    built = subprocess.run([sys.executable, "-c", script, str(out)], cwd=copy, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("longctx-*-py3-none-any.whl")
    return zipfile.ZipFile(path)


def test_every_source_and_config_is_in_the_wheel(wheel):
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {"longctx/py.typed"}
    for folder in FOLDERS:
        prefix = "" if folder == "longctx" else "longctx/"
        for path in (ROOT / folder).rglob("*.yaml" if folder == "configs" else "*.py"):
            if not any(parent.is_symlink() for parent in path.parents):
                expected.add(prefix + path.relative_to(ROOT).as_posix())
    assert {"longctx/cli.py", "longctx/__main__.py"} <= expected
    assert packed == expected


def test_metadata(wheel):
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    text = wheel.read(metadata).decode()
    assert "\nName: longctx\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text
    (entry_points,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert "longctx = longctx.cli:run" in wheel.read(entry_points).decode()
