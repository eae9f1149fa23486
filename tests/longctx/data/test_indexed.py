"""The token store: Megatron's bytes exactly, and a clear error for everything else."""

import struct
from pathlib import Path

import numpy as np
import pytest

from longctx.data.indexed import IndexedWriter, TokenStore, bin_path, idx_path, token_dtype

GOLDEN_IDX = bytes.fromhex(
    "4d4d49444944580000 0100000000000000 08 0300000000000000 0400000000000000"
    "030000000200000001000000 0000000000000000 0600000000000000 0a00000000000000"
    "0000000000000000 0100000000000000 0200000000000000 0300000000000000"
)
GOLDEN_BIN = bytes.fromhex("010002000300 04000500 0600")


def write(prefix: Path, documents: list[list[int]], dtype: str = "<u2") -> TokenStore:
    with IndexedWriter(prefix, dtype=np.dtype(dtype)) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype=np.int64))
    return TokenStore(prefix)


def golden(folder: Path) -> Path:
    prefix = folder / "golden"
    idx_path(prefix).write_bytes(GOLDEN_IDX)
    bin_path(prefix).write_bytes(GOLDEN_BIN)
    return prefix


def index(lengths: list[int], bounds: list[int], *, code: int = 8, size: int = 2, version: int = 1) -> bytes:
    """Build an .idx by hand, independently of the writer."""
    pointers = [size * sum(lengths[:i]) for i in range(len(lengths))]
    return (
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", version, code, len(lengths), len(bounds))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(pointers)}q", *pointers)
        + struct.pack(f"<{len(bounds)}q", *bounds)
    )


def test_writer_gives_the_golden_bytes(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1, 2, 3], [4, 5], [6]])
    assert len(GOLDEN_IDX) == 102
    assert (tmp_path / "x.idx").read_bytes() == GOLDEN_IDX
    assert (tmp_path / "x.bin").read_bytes() == GOLDEN_BIN


def test_reader_reads_the_golden_bytes(tmp_path: Path) -> None:
    store = TokenStore(golden(tmp_path))
    assert (store.num_sequences, store.num_documents, store.num_tokens) == (3, 3, 6)
    assert store.document_offsets.tolist() == [0, 3, 5, 6]
    assert store.document_offsets.dtype == np.int64
    assert [store.document(i).tolist() for i in range(3)] == [[1, 2, 3], [4, 5], [6]]
    assert store.read(2, 4).tolist() == [3, 4]


@pytest.mark.parametrize(
    ("code", "dtype"),
    [(1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (6, "<f8"), (7, "<f4"), (8, "<u2")],
)
def test_every_dtype_code_both_ways(tmp_path: Path, code: int, dtype: str) -> None:
    values = [[1, 2], [3], [100]]
    store = write(tmp_path / "x", values, dtype)
    assert (tmp_path / "x.idx").read_bytes() == index([2, 1, 1], [0, 1, 2, 3], code=code, size=np.dtype(dtype).itemsize)
    assert store.dtype == np.dtype(dtype)
    assert [store.document(i).tolist() for i in range(3)] == values


def test_several_sequences_per_document_and_empty_ones(tmp_path: Path) -> None:
    # Documents: sequences 0-1, none, 2-3 (the first of them empty), 4 (empty).
    (tmp_path / "x.idx").write_bytes(index([2, 3, 0, 1, 0], [0, 2, 2, 4, 5]))
    (tmp_path / "x.bin").write_bytes(np.arange(6, dtype="<u2").tobytes())
    store = TokenStore(tmp_path / "x")
    assert (store.num_sequences, store.num_documents) == (5, 4)
    assert [store.document(i).tolist() for i in range(4)] == [[0, 1, 2, 3, 4], [], [5], []]


def test_writer_groups_sequences(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", dtype=np.dtype("<u2")) as writer:
        writer.add_sequence(np.array([1, 2]))
        writer.add_sequence(np.array([3]))
        writer.end_document()
        writer.add_document(np.array([4]))
    assert (tmp_path / "x.idx").read_bytes() == index([2, 1, 1], [0, 2, 3])


def test_empty_store_round_trips(tmp_path: Path) -> None:
    store = write(tmp_path / "x", [])
    assert (store.num_documents, store.num_tokens, store.read(0, 0).size) == (0, 0, 0)


def test_prefix_with_dots(tmp_path: Path) -> None:
    write(tmp_path / "corpus.v1.2", [[7]])
    assert (tmp_path / "corpus.v1.2.bin").is_file()
    assert TokenStore(str(tmp_path / "corpus.v1.2")).document(0).tolist() == [7]


def test_writer_refuses_what_the_dtype_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"5\.\.65536 do not fit the store's uint16 \(0\.\.65535\)"):
        write(tmp_path / "x", [[5, 65536]])
    assert not (tmp_path / "x.idx").exists()


@pytest.mark.parametrize(
    ("vocab_size", "name"), [(1, "uint16"), (257, "uint16"), (65499, "uint16"), (65500, "int32"), (152064, "int32")]
)
def test_token_dtype_is_megatrons_choice(vocab_size: int, name: str) -> None:
    assert token_dtype(vocab_size).name == name


@pytest.mark.parametrize("size", range(1, 102))
def test_truncated_idx(tmp_path: Path, size: int) -> None:
    prefix = golden(tmp_path)
    idx_path(prefix).write_bytes(GOLDEN_IDX[:size])
    with pytest.raises(ValueError, match=rf"golden\.idx is truncated.* found {size}"):
        TokenStore(prefix)


def test_empty_idx(tmp_path: Path) -> None:
    prefix = golden(tmp_path)
    idx_path(prefix).write_bytes(b"")
    with pytest.raises(ValueError, match="not a Megatron index"):
        TokenStore(prefix)


@pytest.mark.parametrize("size", [0, 5, 10])
def test_truncated_bin(tmp_path: Path, size: int) -> None:
    prefix = golden(tmp_path)
    bin_path(prefix).write_bytes(GOLDEN_BIN[:size])
    with pytest.raises(
        ValueError, match=rf"golden\.bin is truncated.* expects 12 bytes \(6 uint16 tokens\), found {size}"
    ):
        TokenStore(prefix)


def test_bin_longer_than_its_index(tmp_path: Path) -> None:
    prefix = golden(tmp_path)
    bin_path(prefix).write_bytes(GOLDEN_BIN + b"\1\0")
    with pytest.raises(ValueError, match=r"longer than its index says.* expects 12 bytes.* found 14"):
        TokenStore(prefix)


BAD_INDEXES = {
    "version": (index([1], [0, 1], version=2), "has index version 2; supported: 1"),
    "dtype": (index([1], [0, 1], code=9), r"dtype code 9; supported: 1 \(uint8\)"),
    "legacy": (b"TNTIDX\0\0" + bytes(60), "older"),
    "foreign": (b"\x93NUMPY" + bytes(60), "not a Megatron index"),
    "modes": (index([1, 1], [0, 1, 2]) + b"\0\1", "multimodal"),
    "longer": (index([1], [0, 1]) + bytes(7), "inconsistent: expected 62 bytes, found 69"),
    "no bounds": (index([1], []), "no document bounds"),
    "first bound": (index([1, 1], [1, 2]), "must rise from 0 to 2.* found 1 to 2"),
    "last bound": (index([1, 1], [0, 1]), "must rise from 0 to 2.* found 0 to 1"),
    "falling bound": (index([1, 1], [0, 2, 1, 2]), "falling after entry 1"),
    "negative length": (index([3, -1], [0, 1, 2]), "sequence 1 has length -1"),
    "pointer": (
        index([1, 1], [0, 1, 2]).replace(struct.pack("<qq", 0, 2), struct.pack("<qq", 0, 4)),
        "sequence 1 should",
    ),
}


@pytest.mark.parametrize("name", BAD_INDEXES)
def test_bad_index(tmp_path: Path, name: str) -> None:
    content, message = BAD_INDEXES[name]
    (tmp_path / "x.idx").write_bytes(content)
    (tmp_path / "x.bin").write_bytes(b"\1\0\2\0")
    with pytest.raises(ValueError, match=message):
        TokenStore(tmp_path / "x")


def test_missing_file_is_named(tmp_path: Path) -> None:
    prefix = golden(tmp_path)
    bin_path(prefix).unlink()
    with pytest.raises(ValueError, match=r"golden\.bin does not exist"):
        TokenStore(prefix)


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    """A sparse .bin of 6 GB: the pointers, offsets and reads must be 64-bit."""
    lengths = [1_500_000_000, 1_500_000_000, 3]
    (tmp_path / "x.idx").write_bytes(index(lengths, [0, 1, 2, 3]))
    with (tmp_path / "x.bin").open("wb") as file:
        file.seek(2 * 3_000_000_000)
        file.write(np.array([7, 8, 9], dtype="<u2").tobytes())
    store = TokenStore(tmp_path / "x")
    assert store.num_tokens == 3_000_000_003
    assert store.document(2).tolist() == [7, 8, 9]


def test_fingerprint_depends_on_the_bytes_alone(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first = write(tmp_path / "a", [[1, 2], [3]])
    assert write(tmp_path / "other" / "b", [[1, 2], [3]]).fingerprint() == first.fingerprint()
    assert write(tmp_path / "c", [[1], [2, 3]]).fingerprint() != first.fingerprint()
    assert write(tmp_path / "d", [[1, 2], [4]]).fingerprint() != first.fingerprint()


def test_interchange_with_megatron(tmp_path: Path) -> None:
    """Ours is read by Megatron's own reader, and Megatron's own builder writes the same bytes."""
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    documents = [[1, 2, 3], [4, 5], [6]]
    write(tmp_path / "ours", documents)
    theirs = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert [theirs[i].tolist() for i in range(3)] == documents
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"theirs{suffix}").read_bytes() == (tmp_path / f"ours{suffix}").read_bytes()
