"""Reading a corpus: a fixed order, and everything that is left out is counted."""

import gzip
import json
import sysconfig
from pathlib import Path

import pytest

from longctx.data.config import DataConfig
from longctx.data.documents import Skipped, find_files, glob_pattern, iterate_documents


def read(skipped: Skipped | None = None, **options: str) -> list[tuple[str, bytes]]:
    config = DataConfig(**options)
    config.validate()
    skipped = Skipped() if skipped is None else skipped
    return [(d.name, d.data) for d in iterate_documents(config, find_files(config, skipped), skipped)]


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def test_folder_is_sorted_by_path(tmp_path: Path) -> None:
    write(tmp_path, {"b.txt": b"2", "a/z.md": b"1", "a.txt": b"0\r\n", "c/d/e": "é".encode()})
    assert read(source="folder", path=str(tmp_path)) == [
        ("a.txt", b"0\r\n"),
        ("a/z.md", b"1"),
        ("b.txt", b"2"),
        ("c/d/e", "é".encode()),
    ]


def test_folder_counts_what_it_leaves_out(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"ok": b"text", "empty": b"", "binary": b"a\0b", "latin": b"caf\xe9", ".hidden": b"x", ".git/HEAD": b"x"},
    )
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    skipped = Skipped()
    assert read(skipped, source="folder", path=str(tmp_path)) == [("ok", b"text")]
    assert skipped.counts == {
        "empty": 1,
        "binary": 1,
        "not UTF-8": 1,
        "hidden": 2,
        "unreadable": 1,
        "link to a folder": 1,
    }
    assert "latin: byte 3" in skipped.summary()


def test_a_file_that_disappears_is_counted(tmp_path: Path) -> None:
    write(tmp_path, {"a": b"1", "b": b"2"})
    config, skipped = DataConfig(source="folder", path=str(tmp_path)), Skipped()
    files = find_files(config, skipped)
    (tmp_path / "a").unlink()
    assert [d.name for d in iterate_documents(config, files, skipped)] == ["b"]
    assert skipped.summary() == "1 unreadable (a: No such file or directory)"


def test_summary_shows_a_few_names() -> None:
    skipped = Skipped()
    assert skipped.summary() == ""
    for i in range(7):
        skipped.add("binary", f"f{i}")
    assert skipped.summary() == "7 binary (f0, f1, f2, f3, f4, ...)"


@pytest.mark.parametrize(
    ("pattern", "matches", "others"),
    [
        ("*.py", ["a.py", "x/y/a.py"], ["a.pyc", "a.py/b"]),
        ("**/*.py", ["a.py", "x/y/a.py"], ["a.pyc"]),
        ("docs/*.md", ["docs/a.md"], ["docs/x/a.md", "x/docs/a.md"]),
        ("docs/**/*.md", ["docs/a.md", "docs/x/y/a.md"], ["a.md"]),
        ("**", ["a", "x/y"], []),
        ("?[1].txt", ["a[1].txt", "x/a[1].txt"], ["a1.txt", "ab[1].txt"]),
    ],
)
def test_glob(pattern: str, matches: list[str], others: list[str]) -> None:
    compiled = glob_pattern(pattern)
    assert all(compiled.fullmatch(name) for name in matches)
    assert not any(compiled.fullmatch(name) for name in others)


def test_stdlib_is_this_pythons_source() -> None:
    documents = dict(read(source="stdlib"))
    root = Path(sysconfig.get_path("stdlib"))
    assert documents["json/decoder.py"] == (root / "json" / "decoder.py").read_bytes()
    assert len(documents) > 300
    assert all(name.endswith(".py") for name in documents)
    unwanted = {"site-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo", "encodings"}
    assert not any(unwanted & set(name.split("/")) for name in documents)


def test_txt_without_separator_is_one_document_per_file(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": b"one\n\ntwo", "b.md": b"no", "c/d.txt": b"three"})
    assert read(source="txt", path=str(tmp_path)) == [("a.txt", b"one\n\ntwo"), ("c/d.txt", b"three")]
    assert read(source="txt", path=str(tmp_path / "b.md")) == [("b.md", b"no")]


def test_txt_separator_lines(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": b"<s>\none\ntwo <s>\n <s> \r\n<s>\nthree\n<s>\nb\0d\n<s>\nfour"})
    skipped = Skipped()
    assert read(skipped, source="txt", path=str(tmp_path / "a.txt"), separator="<s>") == [
        ("a.txt:2", b"one\ntwo <s>\n"),
        ("a.txt:6", b"three\n"),
        ("a.txt:10", b"four"),
    ]
    assert skipped.summary() == "1 binary (a.txt:8)"


def test_txt_blank_lines_as_separator(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": b"one\nmore\n\n\ntwo\n"})
    documents = read(source="txt", path=str(tmp_path / "a.txt"), separator="")
    assert documents == [("a.txt:1", b"one\nmore\n"), ("a.txt:5", b"two\n")]


@pytest.mark.parametrize("separator", [None, "<s>"])
def test_empty_txt_is_counted(tmp_path: Path, separator: str | None) -> None:
    write(tmp_path, {"a.txt": b""})
    skipped = Skipped()
    config = DataConfig(source="txt", path=str(tmp_path / "a.txt"), separator=separator)
    assert list(iterate_documents(config, find_files(config, skipped), skipped)) == []
    assert skipped.counts == {"empty": 1}


def test_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(b"hello\n" * 1000)
    write(tmp_path, {"a.txt.gz": whole, "b.txt.gz": whole[:-12]})
    skipped = Skipped()
    documents = read(skipped, source="txt", path=str(tmp_path), glob="*.gz")
    assert documents == [("a.txt.gz", b"hello\n" * 1000)]
    assert skipped.counts == {"unreadable": 1}


def test_jsonl(tmp_path: Path) -> None:
    lines = [json.dumps({"body": "one", "id": 1}), "", json.dumps({"body": ""}), '{"body": "\\ud800"}', '{"body": "é"}']
    write(tmp_path, {"a.jsonl": "\n".join(lines).encode()})
    skipped = Skipped()
    documents = read(skipped, source="jsonl", path=str(tmp_path), text_key="body")
    assert documents == [("a.jsonl:1", b"one"), ("a.jsonl:5", "é".encode())]
    assert skipped.counts == {"empty": 1, "not UTF-8": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', r"a\.jsonl, line 2: not valid JSON"),
        (b'{"text": "\xff"}', r"a\.jsonl, line 2: not valid JSON"),
        (b'["text"]', r"a\.jsonl, line 2: expected a JSON object with the key data.text_key='text'"),
        (b'{"body": "x", "id": 3}', r"line 2: no key 'text' \(data.text_key\); its keys: 'body', 'id'"),
        (b'{"text": 3}', r"line 2: the value of 'text' \(data.text_key\) must be a string, found int"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path: Path, line: bytes, message: str) -> None:
    write(tmp_path, {"a.jsonl": b'{"text": "fine"}\n' + line + b"\n"})
    with pytest.raises(ValueError, match=message):
        read(source="jsonl", path=str(tmp_path / "a.jsonl"), text_key="text")


def test_impossible_paths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path='.*nowhere' does not exist"):
        read(source="folder", path=str(tmp_path / "nowhere"))
    write(tmp_path, {"a.txt": b"x"})
    with pytest.raises(ValueError, match=r"is a file, but data\.source='folder' reads a folder"):
        read(source="folder", path=str(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match=r"data\.glob='\*\.md' chooses among the files of a folder"):
        read(source="txt", path=str(tmp_path / "a.txt"), glob="*.md")
