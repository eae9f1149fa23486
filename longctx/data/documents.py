"""Find the files of a corpus and read its documents, always in the same order.

What is not usable as text is never dropped silently: it is counted, with its reason and some names, in a `Skipped`.
"""

import gzip
import json
import os
import re
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from longctx.data.config import DataConfig

# Left out of the standard library: the tests (slim and distribution Pythons do not ship them; some are not UTF-8), what
# is installed into it, applications that distributions package separately, and `encodings`, a fifth of the files, which
# are generated tables of character codes rather than text.
_STDLIB_WITHOUT = frozenset(
    {
        *("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo"),
        *("encodings", "__pycache__"),
    }
)
_DEFAULT_GLOB = {"folder": "**", "txt": "*.txt", "jsonl": "*.jsonl", "stdlib": "*.py"}
_EXAMPLES = 5


@dataclass(frozen=True)
class Document:
    """A text: where it comes from, and its bytes, which are valid UTF-8 and not empty."""

    name: str
    data: bytes


@dataclass(frozen=True)
class CorpusFile:
    """A file of the corpus: name relative to its root, place, size in bytes, time of its last change in ns."""

    name: str
    path: Path
    size: int
    mtime_ns: int


@dataclass
class Skipped:
    """Count what was left out: for each reason how often, and the first few names."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count one more thing left out for a reason."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.examples.setdefault(reason, [])
        if len(names) < _EXAMPLES:
            names.append(name)

    def summary(self) -> str:
        """Return one line, or "" if nothing was left out."""
        parts = []
        for reason, count in sorted(self.counts.items()):
            more = ", ..." if count > len(self.examples[reason]) else ""
            parts.append(f"{count} {reason} ({', '.join(self.examples[reason])}{more})")
        return "; ".join(parts)


def find_files(config: DataConfig, skipped: Skipped) -> list[CorpusFile]:
    """Return the corpus's files, sorted by name, without reading them. Raises ValueError if the path does not exist.

    Hidden files and folders, folders that are symbolic links (they can form loops) and things that are not files are
    left out and counted.
    """
    assert config.source != "bin"
    if config.source == "stdlib":
        root, without = Path(sysconfig.get_path("stdlib")), _STDLIB_WITHOUT
        if not (root / "os.py").is_file():
            raise ValueError(
                f"this Python has no source of its standard library in {root}; choose another data.source, "
                "such as folder"
            )
    else:
        assert config.path is not None
        root, without = Path(config.path).expanduser(), frozenset()
        if not root.exists():
            raise ValueError(f"data.path={config.path!r} does not exist (looked at {root.absolute()})")
        if root.is_file():
            if config.source == "folder":
                raise ValueError(
                    f"data.path={config.path!r} is a file, but data.source='folder' reads a folder; "
                    "set data.source=txt or jsonl to read one file"
                )
            if config.glob is not None:
                raise ValueError(
                    f"data.glob={config.glob!r} chooses among the files of a folder, but data.path={config.path!r} is "
                    "one file; set data.glob=null"
                )
            info = root.stat()
            return [CorpusFile(root.name, root, info.st_size, info.st_mtime_ns)]
    wanted = glob_pattern(config.glob or _DEFAULT_GLOB[config.source])
    return sorted(_walk(root, wanted, without, skipped), key=lambda file: file.name)


def iterate_documents(config: DataConfig, files: list[CorpusFile], skipped: Skipped) -> Iterator[Document]:
    """Yield the documents of some files in order. Raises ValueError for a malformed .jsonl line."""
    for file in files:
        try:
            if config.source == "txt":
                yield from _text_documents(file, config.separator, skipped)
            elif config.source == "jsonl":
                assert config.text_key is not None
                yield from _json_documents(file, config.text_key, skipped)
            else:
                document = _checked(file.name, file.path.read_bytes(), skipped)
                if document is not None:
                    yield document
        except (OSError, EOFError) as error:  # EOFError: a truncated .gz
            skipped.add("unreadable", f"{file.name}: {getattr(error, 'strerror', None) or error}")


def glob_pattern(pattern: str) -> re.Pattern[str]:
    """Return a pattern that matches whole relative paths with `/`: `*` and `?` stop at `/`, `**` does not.

    A pattern without `/` matches the file name at any depth, as in .gitignore. Written out because pathlib matches `**`
    so only from Python 3.13 on.
    """
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    body = "".join(parts.get(token) or re.escape(token) for token in re.findall(r"\*\*/|\*\*|\*|\?|[^*?]+", pattern))
    return re.compile(body if "/" in pattern else f"(?:.*/)?{body}", re.DOTALL)


def _walk(root: Path, wanted: re.Pattern[str], without: frozenset[str], skipped: Skipped) -> Iterator[CorpusFile]:
    def failed(error: OSError) -> None:
        skipped.add("unreadable", f"{error.filename}: {error.strerror}")

    for folder, folders, names in os.walk(root, onerror=failed):
        here = Path(folder)
        kept = []
        for name in sorted(folders):
            relative = (here / name).relative_to(root).as_posix()
            if name in without:
                continue
            if name.startswith("."):
                skipped.add("hidden", relative + "/")
            elif (here / name).is_symlink():
                skipped.add("link to a folder", relative + "/")
            else:
                kept.append(name)
        folders[:] = kept
        for name in names:
            relative = (here / name).relative_to(root).as_posix()
            if not wanted.fullmatch(relative):
                continue
            if name.startswith("."):
                skipped.add("hidden", relative)
                continue
            try:
                info = (here / name).stat()
            except OSError as error:
                skipped.add("unreadable", f"{relative}: {error.strerror}")
                continue
            if stat.S_ISREG(info.st_mode):
                yield CorpusFile(relative, here / name, info.st_size, info.st_mtime_ns)
            else:
                skipped.add("not a file", relative)


def _checked(name: str, data: bytes, skipped: Skipped) -> Document | None:
    """Return a document, or count why these bytes are none."""
    if not data:
        skipped.add("empty", name)
    elif b"\0" in data:
        skipped.add("binary", name)
    else:
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            skipped.add("not UTF-8", f"{name}: byte {error.start}")
        else:
            return Document(name, data)
    return None


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _text_documents(file: CorpusFile, separator: str | None, skipped: Skipped) -> Iterator[Document]:
    """Yield the texts between separator lines. Reads line by line: a file may be larger than memory."""
    mark = None if separator is None else separator.encode("utf-8")
    lines: list[bytes] = []
    first = 1
    with _open(file.path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip() != mark:
                lines.append(line)
                continue
            if lines:  # two separators in a row enclose nothing, which is no document and nothing lost
                document = _checked(f"{file.name}:{first}", b"".join(lines), skipped)
                if document is not None:
                    yield document
            lines, first = [], number + 1
    if lines or first == 1:
        name = file.name if mark is None else f"{file.name}:{first}"
        document = _checked(name, b"".join(lines), skipped)
        if document is not None:
            yield document


def _json_documents(file: CorpusFile, text_key: str, skipped: Skipped) -> Iterator[Document]:
    with _open(file.path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{file.path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:  # also UnicodeDecodeError
                raise ValueError(
                    f"{where}: not valid JSON ({error}); data.source='jsonl' needs one object per line"
                ) from error
            if not isinstance(record, dict):
                raise ValueError(
                    f"{where}: expected a JSON object with the key data.text_key={text_key!r}, found {line[:40]!r}"
                )
            if text_key not in record:
                keys = ", ".join(repr(key) for key in record) or "none"
                raise ValueError(f"{where}: no key {text_key!r} (data.text_key); its keys: {keys}")
            text = record[text_key]
            if not isinstance(text, str):
                kind = type(text).__name__
                raise ValueError(f"{where}: the value of {text_key!r} (data.text_key) must be a string, found {kind}")
            name = f"{file.name}:{number}"
            try:
                data = text.encode("utf-8")
            except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which is no text
                skipped.add("not UTF-8", name)
                continue
            document = _checked(name, data, skipped)
            if document is not None:
                yield document
