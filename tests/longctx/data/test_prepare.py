"""Preparing a corpus: made once, reused, remade when something that matters changes, never half there."""

import dataclasses
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from longctx.data.config import DataConfig
from longctx.data.indexed import IndexedWriter, TokenStore
from longctx.data.prepare import PreparedStore, prepare


def corpus(folder: Path, files: dict[str, bytes] | None = None) -> DataConfig:
    root = folder / "text"
    root.mkdir()
    for name, data in (files or {"a.txt": b"one", "b.txt": b"three", "c.txt": b"a\0b"}).items():
        (root / name).write_bytes(data)
    return DataConfig(source="folder", path=str(root), cache_dir=str(folder / "cache"))


def run(config: DataConfig) -> tuple[PreparedStore, list[str]]:
    lines: list[str] = []
    return prepare(config, report=lines.append), lines


def test_store_and_metadata(tmp_path: Path) -> None:
    made, lines = run(corpus(tmp_path))
    store = TokenStore(made.prefix)
    assert [store.document(i).tolist() for i in range(2)] == [[*b"one", 256], [*b"three", 256]]
    assert store.dtype == np.uint16
    assert made.metadata is not None
    details = json.loads(made.metadata.read_text())
    assert (details["files"], details["documents"], details["text_bytes"], details["tokens"]) == (3, 2, 8, 10)
    assert (details["vocab_size"], details["eod_id"]) == (257, 256)
    assert details["skipped"] == {"binary": {"count": 1, "examples": ["c.txt"]}}
    assert len(details["text_sha256"]) == len(details["bin_sha256"]) == 64
    assert "2 documents, 8 bytes, 10 tokens" in lines[0]
    assert lines[1] == "data: left out 1 binary (c.txt)"


def test_second_run_reuses_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = corpus(tmp_path)
    first, _ = run(config)
    monkeypatch.setattr("longctx.data.prepare.iterate_documents", None)  # reading the corpus would fail
    again, lines = run(config)
    assert again == first
    assert lines == [f"data: using {first.prefix.parent} (2 documents, 10 tokens)"]


@pytest.mark.parametrize("change", ["content", "new file", "eod", "tokenizer"])
def test_changes_make_another_store(tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = corpus(tmp_path)
    first, _ = run(config)
    if change == "content":
        (tmp_path / "text" / "a.txt").write_bytes(b"two")  # of the same size
        os.utime(tmp_path / "text" / "a.txt", ns=(1, 1))
    elif change == "new file":
        (tmp_path / "text" / "d.txt").write_bytes(b"four")
    elif change == "eod":
        config = dataclasses.replace(config, append_eod=False)
    else:
        monkeypatch.setattr("longctx.data.tokenizer.ByteTokenizer.fingerprint", lambda self: "another")
    second, _ = run(config)
    assert second.prefix != first.prefix
    assert TokenStore(first.prefix).num_tokens == 10
    expected = {"content": 10, "new file": 15, "eod": 8, "tokenizer": 10}
    assert TokenStore(second.prefix).num_tokens == expected[change]


def test_what_does_not_change_the_tokens_shares_a_store(tmp_path: Path) -> None:
    config = corpus(tmp_path)
    first, _ = run(config)
    assert run(dataclasses.replace(config, seq_len=16, seed=9, held_out=0.5))[0] == first


def test_fingerprint_is_that_of_the_tokens(tmp_path: Path) -> None:
    first, _ = run(corpus(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    second, _ = run(corpus(tmp_path / "elsewhere"))
    assert second.fingerprint == first.fingerprint
    assert run(dataclasses.replace(corpus_bin(first), cache_dir="unused"))[0].fingerprint == first.fingerprint


def corpus_bin(made: PreparedStore) -> DataConfig:
    return DataConfig(source="bin", path=str(made.prefix), append_eod=False)


def test_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = corpus(tmp_path)

    def full(self: IndexedWriter) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(IndexedWriter, "close", full)
        with pytest.raises(ValueError, match=r"data\.cache_dir=.*No space left on device"):
            run(config)
    assert list((tmp_path / "cache").iterdir()) == []
    assert TokenStore(run(config)[0].prefix).num_tokens == 10


def test_unfinished_folders_are_not_used_and_old_ones_removed(tmp_path: Path) -> None:
    config = corpus(tmp_path)
    name = run(config)[0].prefix.parent.name
    store = tmp_path / "cache" / name
    old, live = (tmp_path / "cache" / f".{name}.unfinished-host-{pid}" for pid in (1, 2))
    store.rename(old)
    live.mkdir()
    hours_ago = time.time() - 7200
    for path in (*old.iterdir(), old):
        os.utime(path, (hours_ago, hours_ago))
    _, lines = run(config)
    assert any(f"removed {old}" in line for line in lines)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == sorted([live.name, name])


def _prepare_in_a_process(config: DataConfig, start: float) -> None:
    time.sleep(max(0.0, start - time.time()))
    prepare(config, report=lambda line: None)


def test_processes_may_race(tmp_path: Path) -> None:
    config = corpus(tmp_path, {f"{i}.txt": bytes([65 + i]) * 50_000 for i in range(20)})
    context = multiprocessing.get_context("fork")
    start = time.time() + 0.3
    workers = [context.Process(target=_prepare_in_a_process, args=(config, start)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert TokenStore(run(config)[0].prefix).num_tokens == 20 * 50_001


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokens.bin", b"\1\0", r"tokens\.bin is truncated: .* expects 20 bytes .* found 2"),
        ("tokens.idx", b"MMIDIDX\0\0", r"tokens\.idx is truncated"),
        ("metadata.json", b"{", "damaged"),
        ("metadata.json", b"[]", "damaged"),
        (
            "metadata.json",
            b'{"documents": 3, "tokens": 10}',
            "metadata.json says 3 documents and 10 tokens, the store has 2",
        ),
    ],
)
def test_damaged_store(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    config = corpus(tmp_path)
    made, _ = run(config)
    (made.prefix.parent / file).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        run(config)
    assert f"delete {made.prefix.parent} to have it made again" in str(caught.value)


def test_empty_corpora(tmp_path: Path) -> None:
    config = corpus(tmp_path, {"a.bin": b"\0", "b": b""})
    with pytest.raises(
        ValueError, match=r"holds no documents \(left out: 1 binary \(a.bin\); 1 empty \(b\)\); set data.path"
    ):
        run(config)
    with pytest.raises(ValueError, match=r"holds no file to read; set data.path or data.glob"):
        run(dataclasses.replace(config, glob="*.md"))
    with pytest.raises(ValueError, match=r"data.path='.*nowhere' does not exist"):
        run(dataclasses.replace(config, path=str(tmp_path / "nowhere")))
    assert not (tmp_path / "cache").exists() or list((tmp_path / "cache").iterdir()) == []


def test_corpus_without_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(corpus(tmp_path), append_eod=False)
    nothing = np.empty(0, dtype=np.uint16)
    monkeypatch.setattr(
        "longctx.data.tokenizer.ByteTokenizer.encode_batch", lambda self, texts: [nothing for _ in texts]
    )
    with pytest.raises(ValueError, match=r"gives no tokens with data.tokenizer='byte'"):
        run(config)


def test_config_is_validated(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.source='x' is unknown"):
        run(DataConfig(source="x"))


def test_bin(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", dtype=np.dtype("<i4")) as writer:
        writer.add_document(np.array([1, 256]))
    config = DataConfig(source="bin", path=str(tmp_path / "x"), append_eod=False, cache_dir=str(tmp_path / "cache"))
    made, lines = run(config)
    assert (made.prefix, made.metadata) == (tmp_path / "x", None)
    assert lines == [f"data: using {tmp_path / 'x'} (1 documents, 2 tokens)"]
    assert not (tmp_path / "cache").exists()


def test_impossible_bin(tmp_path: Path) -> None:
    def write(values: list[int], dtype: str = "<i4") -> DataConfig:
        with IndexedWriter(tmp_path / "x", dtype=np.dtype(dtype)) as writer:
            writer.add_document(np.array(values, dtype=np.int64))
        return DataConfig(source="bin", path=str(tmp_path / "x"), append_eod=False)

    with pytest.raises(
        ValueError, match=r"token ids 3\.\.257, but data.tokenizer='byte' has ids 0\.\.256; set data.tokenizer"
    ):
        run(write([3, 257]))
    with pytest.raises(ValueError, match=r"token ids -1\.\.3"):
        run(write([3, -1]))
    with pytest.raises(ValueError, match="holds no tokens"):
        run(write([]))
    with pytest.raises(ValueError, match="float64 values"):
        run(write([1], "<f8"))
    config = write([1])
    with pytest.raises(ValueError, match=r"data.path='.*x\.bin' is one of the two files; .* without \.bin"):
        run(dataclasses.replace(config, path=str(tmp_path / "x.bin")))
    with pytest.raises(ValueError, match=r"data.path='.*none': .*none\.idx does not exist"):
        run(dataclasses.replace(config, path=str(tmp_path / "none")))


def test_many_batches_keep_the_order(tmp_path: Path) -> None:
    config = corpus(tmp_path, {f"{i:04}": f"{i:04}".encode() for i in range(600)})
    store = TokenStore(run(config)[0].prefix)
    assert [bytes(store.document(i)[:-1].astype(np.uint8)).decode() for i in range(600)] == [
        f"{i:04}" for i in range(600)
    ]


def test_tokenizer_json(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 70_000}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["</s>"])
    words.save(str(tmp_path / "tokenizer.json"))
    config = corpus(tmp_path, {"x": b"a b c", "y": b"b"})
    config = dataclasses.replace(config, tokenizer=str(tmp_path / "tokenizer.json"))
    made, _ = run(config)
    store = TokenStore(made.prefix)
    eod = int(store.document(1)[-1])
    assert store.dtype == np.int32
    assert [store.document(i).tolist() for i in range(2)] == [[0, 1, 70_000, eod], [1, eod]]
    assert made.metadata is not None
    assert json.loads(made.metadata.read_text())["vocab_size"] == max(eod, 70_000) + 1
