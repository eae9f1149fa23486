"""The walls of the code base: who may import whom, where the environment may be read, how long a file may be.

Each rule is a small function from a source to complaints, so that it can be shown to fail on a planted violation.
Folders are read under their own names (`kernels/`, not `longctx/kernels/`): each file is seen once.
"""

import ast
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("configs", "kernels", "parallel")
# kernels <- parallel <- longctx <- launch: a file may import from its own layer and from those before it.
LAYERS = ("kernels", "parallel", "longctx", "launch")
# What sees everything and is seen by none of the layers.
OUTSIDE = ("tests", "benchmarks", "examples")
CONFIG_READERS = ("longctx/config.py", "longctx/train.py", "longctx/cli.py")
ENVIRONMENT_READERS = ("parallel/mesh.py",)
MAX_LINES, MAX_LINES_TRITON, MAX_MEDIAN = 400, 600, 200


@dataclass(frozen=True)
class Source:
    """A Python file: its path relative to the root, with slashes, and its text."""

    path: str
    text: str

    @property
    def folder(self) -> str:
        return self.path.split("/", 1)[0]

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.path)


@dataclass(frozen=True)
class Import:
    """One imported name. `names` is the dotted name, then for `from a import b` also `a.b`."""

    line: int
    level: int
    names: tuple[str, ...]

    def of(self, *packages: str) -> bool:
        """Say whether this imports one of the packages or something inside of it."""
        return any(name == p or name.startswith(p + ".") for name in self.names for p in packages)


def sources(*folders: str) -> list[Source]:
    """Read every Python file of the folders; links are not followed."""
    paths = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    own = (path for path in paths if not any(parent.is_symlink() for parent in path.parents))
    return [Source(path.relative_to(ROOT).as_posix(), path.read_text()) for path in own]


def imports(source: Source) -> Iterator[Import]:
    """Yield what a file imports, wherever in the file, `importlib.import_module("...")` included."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, 0, (alias.name,))
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            for alias in node.names:
                yield Import(node.lineno, node.level, (module, f"{module}.{alias.name}"))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called in ("importlib.import_module", "import_module", "__import__"):
                yield Import(node.lineno, 0, (str(node.args[0].value),))


def layer_of(imported: Import) -> str | None:
    """Return the layer that an import reaches into, None for other packages."""
    for layer in ("kernels", "parallel"):
        if imported.of(f"longctx.{layer}"):
            return layer
    if imported.of("longctx.configs") or not imported.of("longctx", "launch"):
        return None
    return "launch" if imported.of("launch") else "longctx"


def backward_arrows(source: Source) -> list[str]:
    own = LAYERS.index(source.folder)
    complaints = []
    for imported in imports(source):
        layer = layer_of(imported)
        if layer is not None and LAYERS.index(layer) > own:
            complaints.append(f"{source.path}:{imported.line}: {source.folder} must not import {layer}")
        if imported.of(*OUTSIDE):
            complaints.append(f"{source.path}:{imported.line}: {source.folder} must not import {imported.names[-1]}")
    return complaints


def distributed_in_kernels(source: Source) -> list[str]:
    if source.folder != "kernels":
        return []
    lines = [imported.line for imported in imports(source) if imported.of("torch.distributed")]
    lines += [
        node.lineno
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed"
    ]
    return [f"{source.path}:{line}: torch.distributed in kernels/, which knows one device only" for line in lines]


def config_library_outside_config(source: Source) -> list[str]:
    if source.path in CONFIG_READERS:
        return []
    return [
        f"{source.path}:{imported.line}: {imported.names[0]} outside {', '.join(CONFIG_READERS)}"
        for imported in imports(source)
        if imported.of("hydra", "omegaconf")
    ]


def environment_reads(source: Source) -> list[str]:
    if source.path in ENVIRONMENT_READERS or source.folder == "launch":
        return []
    names = ("environ", "environb", "getenv", "getenvb", "putenv", "unsetenv")
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "os"
    }
    lines = [imported.line for imported in imports(source) if imported.of(*(f"os.{name}" for name in names))]
    lines += [
        node.lineno
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute)
        and node.attr in names
        and isinstance(node.value, ast.Name)
        and node.value.id in aliases
    ]
    return [f"{source.path}:{line}: the environment is read outside launch/ and parallel/mesh.py" for line in lines]


def import_names(source: Source) -> list[str]:
    """Complain about relative imports, and about ours by a name that another package may have."""
    complaints = [f"{source.path}:{i.line}: relative import" for i in imports(source) if i.level]
    complaints += [
        f"{source.path}:{i.line}: bare import of {i.names[0]}; write longctx.{i.names[0]}"
        for i in imports(source)
        if not i.level and i.of("kernels", "parallel", "configs")
    ]
    return complaints


def length(source: Source) -> list[str]:
    lines, limit = source.text.count("\n"), MAX_LINES_TRITON if "triton" in source.path else MAX_LINES
    return [f"{source.path}: {lines} lines, the limit is {limit}"] if lines > limit else []


def roots_with_init(root: Path) -> list[str]:
    """Complain about `__init__.py` directly in a linked folder: it would shadow an installed package of that name."""
    return [f"{name}/__init__.py must not exist" for name in LINKS if (root / name / "__init__.py").exists()]


def bad_links(root: Path) -> list[str]:
    complaints = []
    for name in LINKS:
        link, target = root / "longctx" / name, root / name
        if not link.is_symlink():
            complaints.append(f"longctx/{name} is not a symbolic link (a ZIP download turns links into text files)")
        elif link.readlink().is_absolute():
            complaints.append(f"longctx/{name} -> {link.readlink()} is absolute")
        elif not link.is_dir() or link.resolve() != target.resolve():
            complaints.append(f"longctx/{name} -> {link.readlink()} does not lead to {name}/")
    return complaints


LAYER_RULES = [
    backward_arrows,
    distributed_in_kernels,
    config_library_outside_config,
    environment_reads,
    import_names,
    length,
]
OUTSIDE_RULES = [import_names, length]


@pytest.mark.parametrize("rule", LAYER_RULES, ids=lambda rule: rule.__name__)
def test_layers(rule):
    found = sources(*LAYERS)
    assert found, "no sources: the rule has nothing to look at"
    assert not [complaint for source in found for complaint in rule(source)]


@pytest.mark.parametrize("rule", OUTSIDE_RULES, ids=lambda rule: rule.__name__)
def test_outside(rule):
    assert not [complaint for source in sources(*OUTSIDE) for complaint in rule(source)]


def test_median_length():
    lengths = [source.text.count("\n") for source in sources(*LAYERS)]
    assert statistics.median(lengths) <= MAX_MEDIAN


def test_links():
    assert not bad_links(ROOT)
    assert not roots_with_init(ROOT)


def test_each_file_is_read_once_and_under_its_own_name():
    paths = [source.path for source in sources(*LAYERS, *OUTSIDE)]
    assert len(paths) == len(set(paths))
    assert "longctx/cli.py" in paths
    assert "tests/test_architecture.py" in paths
    assert not [path for path in paths if path.startswith(tuple(f"longctx/{name}/" for name in LINKS))]


PLANTED = [
    (backward_arrows, "kernels/a.py", "from longctx.parallel.mesh import Mesh"),
    (backward_arrows, "kernels/a.py", "from longctx import parallel"),
    (backward_arrows, "kernels/a.py", "def f():\n    import longctx.config"),
    (backward_arrows, "parallel/a.py", "from longctx.config import Config"),
    (backward_arrows, "parallel/a.py", "from longctx import __version__"),
    (backward_arrows, "parallel/a.py", "import importlib\nimportlib.import_module('longctx.train')"),
    (backward_arrows, "longctx/a.py", "import launch.submit"),
    (backward_arrows, "longctx/a.py", "from tests.support.tolerance import max_error"),
    (backward_arrows, "longctx/a.py", "import benchmarks.ring_cpu"),
    (distributed_in_kernels, "kernels/a.py", "import torch.distributed as dist"),
    (distributed_in_kernels, "kernels/a.py", "from torch import distributed"),
    (distributed_in_kernels, "kernels/a.py", "from torch.distributed.tensor import DTensor"),
    (distributed_in_kernels, "kernels/a.py", "import torch\ntorch.distributed.get_rank()"),
    (config_library_outside_config, "longctx/model.py", "from omegaconf import OmegaConf"),
    (config_library_outside_config, "longctx/data/config.py", "import hydra.core"),
    (environment_reads, "longctx/a.py", "import os\nos.environ['RANK']"),
    (environment_reads, "parallel/plan.py", "import os as o\no.getenv('RANK')"),
    (environment_reads, "kernels/a.py", "from os import environ"),
    (import_names, "kernels/a.py", "from . import mask"),
    (import_names, "longctx/a.py", "from ..kernels import mask"),
    (import_names, "tests/test_a.py", "from kernels.mask import Causal"),
    (import_names, "benchmarks/a.py", "import parallel"),
    (length, "kernels/softmax/cpu.py", "\n" * 401),
    (length, "kernels/linear/triton_chunk.py", "\n" * 601),
]

ALLOWED = [
    (backward_arrows, "longctx/a.py", "from longctx.kernels.mask import Causal\nimport longctx.parallel.mesh"),
    (backward_arrows, "parallel/a.py", "from longctx.kernels import positions\nimport longctx.parallel.plan"),
    (backward_arrows, "kernels/a.py", "import torch\nfrom longctx.kernels.softmax.op import attention"),
    (backward_arrows, "longctx/a.py", "from longctx import __version__"),
    (distributed_in_kernels, "parallel/a.py", "import torch.distributed as dist"),
    (config_library_outside_config, "longctx/config.py", "import omegaconf"),
    (config_library_outside_config, "longctx/train.py", "import hydra"),
    (environment_reads, "parallel/mesh.py", "import os\nos.environ['RANK']"),
    (environment_reads, "longctx/a.py", "import os\nos.replace('a', 'b')"),
    (import_names, "kernels/a.py", "from longctx.kernels import mask\nimport parallelism"),
    (length, "kernels/linear/triton_chunk.py", "\n" * 600),
]


@pytest.mark.parametrize(("rule", "path", "text"), PLANTED)
def test_rule_finds_a_planted_violation(rule, path, text):
    assert len(rule(Source(path, text))) >= 1


@pytest.mark.parametrize(("rule", "path", "text"), ALLOWED)
def test_rule_allows_what_is_meant(rule, path, text):
    assert rule(Source(path, text)) == []


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "longctx").mkdir()
    for name in LINKS:
        (tmp_path / name).mkdir()
        (tmp_path / "longctx" / name).symlink_to(Path("..", name))
    assert bad_links(tmp_path) == []
    return tmp_path


def test_link_rule_finds_a_file_instead_of_a_link(checkout):
    (checkout / "longctx/kernels").unlink()
    (checkout / "longctx/kernels").write_text("../kernels")
    assert "not a symbolic link" in bad_links(checkout)[0]


def test_link_rule_finds_absolute_broken_and_wrong_links(checkout):
    for target, complaint in [(checkout / "kernels", "absolute"), ("../x", "not lead"), ("../parallel", "not lead")]:
        (checkout / "longctx/kernels").unlink()
        (checkout / "longctx/kernels").symlink_to(target)
        assert complaint in bad_links(checkout)[0]


def test_init_rule_finds_a_planted_file(checkout):
    assert roots_with_init(checkout) == []
    (checkout / "parallel/__init__.py").touch()
    assert roots_with_init(checkout) == ["parallel/__init__.py must not exist"]
