"""Read and write token stores in Megatron's `.bin` / `.idx` format, byte for byte.

`.bin` holds the tokens back to back. `.idx` is, little-endian: 9 bytes magic, uint64 version, uint8 dtype code, uint64
number of sequences N, uint64 number M of document bounds, int32[N] lengths in tokens, int64[N] byte offsets into
`.bin`, int64[M] bounds: document d holds the sequences bounds[d] to bounds[d + 1]. Multimodal stores add int8[N] modes
and are not read here.
"""

import hashlib
import os
import struct
from array import array
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_LEGACY_MAGIC = b"TNTIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # "<" also means no padding: 34 bytes
_DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name)
    for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}.items()
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_MAX_SEQUENCE = 2**31 - 1  # lengths are int32
_CHUNK = 1 << 20  # sequences checked at a time, so that checking costs no memory per sequence
_PROBE = 1 << 20  # bytes at each end of a file that go into a fingerprint


def bin_path(prefix: Path) -> Path:
    """Return `<prefix>.bin`; a prefix may itself contain dots."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """Return `<prefix>.idx`; a prefix may itself contain dots."""
    return prefix.with_name(prefix.name + ".idx")


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype that Megatron's preprocessing picks: uint16 below 65500 ids, else int32.

    Hazard: one of Megatron's own fast read paths does not look at the dtype code of the file but assumes uint16 up to
    65536 ids. For a vocabulary of 65500 to 65536 it misreads the int32 that its preprocessing (and this) writes. Our
    reader always goes by the file's code.
    """
    return _DTYPES[8] if vocab_size < 65500 else _DTYPES[4]


class IndexedWriter:
    """Write a `.bin` / `.idx` pair. A context manager: the `.idx` is written only if the block does not raise.

    Not atomic by itself: write under a temporary name and rename.
    """

    def __init__(self, prefix: Path, *, dtype: np.dtype) -> None:
        assert dtype in _CODES, dtype
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        self._lengths = array("q")
        self._bounds = array("q", [0])
        self._digest = hashlib.sha256()
        self._bin: BinaryIO = bin_path(prefix).open("wb")
        self.num_tokens = 0

    def add_sequence(self, tokens: np.ndarray) -> None:
        """Append one sequence, 1-D integers, to the open document; raise ValueError for an id that does not fit."""
        assert tokens.ndim == 1, tokens.shape
        if tokens.size > _MAX_SEQUENCE:
            raise ValueError(
                f"a sequence of {tokens.size} tokens is too long: the .idx format holds at most {_MAX_SEQUENCE} per "
                "sequence; split this document"
            )
        if tokens.size and self._dtype.kind in "iu" and tokens.dtype != self._dtype:
            low, high, limits = int(tokens.min()), int(tokens.max()), np.iinfo(self._dtype)
            if low < limits.min or high > limits.max:
                raise ValueError(
                    f"token ids {low}..{high} do not fit the store's {self._dtype.name} ({limits.min}..{limits.max})"
                )
        data = tokens.astype(self._dtype, copy=False).tobytes()
        self._bin.write(data)
        self._digest.update(data)
        self._lengths.append(int(tokens.size))
        self.num_tokens += int(tokens.size)

    def end_document(self) -> None:
        """Close the open document."""
        self._bounds.append(len(self._lengths))

    def add_document(self, tokens: np.ndarray) -> None:
        """Append one document of one sequence."""
        self.add_sequence(tokens)
        self.end_document()

    @property
    def num_documents(self) -> int:
        return len(self._bounds) - 1

    def bin_sha256(self) -> str:
        """Return the sha256, in hex, of the `.bin` bytes written so far."""
        return self._digest.hexdigest()

    def close(self) -> None:
        """Flush `.bin` and write `.idx`, both to the disk itself and not only to the page cache."""
        assert self._bounds[-1] == len(self._lengths), "sequences after the last end_document()"
        self._bin.flush()
        os.fsync(self._bin.fileno())
        self._bin.close()
        lengths = np.frombuffer(self._lengths, dtype=np.int64)
        pointers = np.zeros(lengths.size, dtype="<i8")
        np.cumsum(lengths[:-1] * self._dtype.itemsize, out=pointers[1:])
        with idx_path(self._prefix).open("wb") as idx:
            idx.write(_HEADER.pack(MAGIC, VERSION, _CODES[self._dtype], lengths.size, len(self._bounds)))
            idx.write(lengths.astype("<i4").tobytes())
            idx.write(pointers.tobytes())
            idx.write(np.frombuffer(self._bounds, dtype=np.int64).astype("<i8").tobytes())
            idx.flush()
            os.fsync(idx.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._bin.close()


class TokenStore:
    """Read a `.bin` / `.idx` pair through memory maps. Opening checks the whole index against the size of `.bin`.

    prefix: path without the suffix. `document_offsets`: int64 [num_documents + 1], the first token of each document in
    the store and, last, `num_tokens`. A document may hold several sequences; they lie back to back, so it is one range.
    Raises ValueError for a missing, foreign, truncated or inconsistent file.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self._idx_file, self._bin_file = idx_path(self.prefix), bin_path(self.prefix)
        for path in (self._idx_file, self._bin_file):
            if not path.is_file():
                raise ValueError(f"{path} does not exist; a token store is the two files <prefix>.bin and <prefix>.idx")
        self._bin_bytes = self._bin_file.stat().st_size
        self._read_index()
        self._check_pointers()
        self.document_offsets = self._document_offsets()
        count = self._bin_bytes // self.dtype.itemsize
        # An empty file cannot be mapped.
        self._tokens = np.memmap(self._bin_file, dtype=self.dtype, mode="r") if count else np.empty(0, self.dtype)

    @property
    def num_sequences(self) -> int:
        return self._lengths.size

    @property
    def num_documents(self) -> int:
        return self.document_offsets.size - 1

    @property
    def num_tokens(self) -> int:
        return int(self.document_offsets[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) of the whole store, `dtype`, without copying."""
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        return self._tokens[start:stop]

    def document(self, index: int) -> np.ndarray:
        """Return the tokens of one document, `dtype`, without copying."""
        return self.read(int(self.document_offsets[index]), int(self.document_offsets[index + 1]))

    def fingerprint(self) -> str:
        """Return 16 hex digits of a sha256 over both sizes and up to 1 MiB at each end of both files.

        The same bytes give the same fingerprint on every machine and under every name. Constant time, so usable at
        every start for stores of any size; it does not notice a change in the middle of a large `.bin`.
        """
        digest = hashlib.sha256()
        for path in (self._idx_file, self._bin_file):
            size = path.stat().st_size
            digest.update(struct.pack("<Q", size))
            with path.open("rb") as file:
                digest.update(file.read(_PROBE))
                file.seek(max(0, size - _PROBE))
                digest.update(file.read(_PROBE))
        return digest.hexdigest()[:16]

    def _read_index(self) -> None:
        path, size = self._idx_file, self._idx_file.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
        if head.startswith(_LEGACY_MAGIC):
            raise ValueError(
                f"{path} is in the older (TNTIDX) index format; write it again with Megatron's preprocess_data.py"
            )
        if not head.startswith(MAGIC[: len(head)]) or not head:
            raise ValueError(f"{path} is not a Megatron index: it starts with {head[:9]!r}, not {MAGIC!r}")
        if len(head) < _HEADER.size:
            raise ValueError(f"{path} is truncated: the header takes {_HEADER.size} bytes, found {size}")
        _, version, code, sequences, bounds = _HEADER.unpack(head)
        if version != VERSION:
            raise ValueError(f"{path} has index version {version}; supported: {VERSION}")
        if code not in _DTYPES:
            known = ", ".join(f"{c} ({d.name})" for c, d in _DTYPES.items())
            raise ValueError(f"{path} has dtype code {code}; supported: {known}")
        if bounds < 1:
            raise ValueError(f"{path} is inconsistent: it has no document bounds; even an empty store has one, 0")
        expected = _HEADER.size + 12 * sequences + 8 * bounds
        if size < expected:
            raise ValueError(
                f"{path} is truncated: {sequences} sequences and {bounds - 1} documents take {expected} bytes, "
                f"found {size}"
            )
        if sequences and size == expected + sequences:
            raise ValueError(f"{path} is a multimodal store (one mode per sequence); only text stores can be read")
        if size > expected:
            raise ValueError(f"{path} is inconsistent: expected {expected} bytes, found {size}")
        self.dtype: np.dtype = _DTYPES[code]
        raw = np.memmap(path, dtype=np.uint8, mode="r")
        # The arrays start at offset 34, so they are unaligned; numpy reads such arrays correctly.
        at = _HEADER.size
        self._lengths = np.frombuffer(raw, dtype="<i4", count=sequences, offset=at)
        self._pointers = np.frombuffer(raw, dtype="<i8", count=sequences, offset=at + 4 * sequences)
        self._bounds = np.frombuffer(raw, dtype="<i8", count=bounds, offset=at + 12 * sequences)

    def _check_pointers(self) -> None:
        """Check that sequences lie back to back, which is how Megatron writes them, and fill `.bin` exactly."""
        at = 0
        for first in range(0, self.num_sequences, _CHUNK):
            lengths = self._lengths[first : first + _CHUNK].astype(np.int64)
            pointers = self._pointers[first : first + _CHUNK]
            if lengths.min() < 0:
                bad = first + int(np.argmin(lengths))
                raise ValueError(f"{self._idx_file} is inconsistent: sequence {bad} has length {self._lengths[bad]}")
            ends = at + np.cumsum(lengths) * self.dtype.itemsize
            starts = ends - lengths * self.dtype.itemsize
            if not np.array_equal(starts, pointers):
                bad = int(np.argmax(starts != pointers))
                raise ValueError(
                    f"{self._idx_file} is inconsistent: sequence {first + bad} should start at byte {starts[bad]} "
                    f"of the .bin, but its pointer is {pointers[bad]}"
                )
            at = int(ends[-1])
        if self._bin_bytes != at:
            what = "truncated" if self._bin_bytes < at else "longer than its index says"
            raise ValueError(
                f"{self._bin_file} is {what}: {self._idx_file.name} expects {at} bytes "
                f"({at // self.dtype.itemsize} {self.dtype.name} tokens), found {self._bin_bytes}"
            )

    def _document_offsets(self) -> np.ndarray:
        bounds = self._bounds
        steps_back = np.flatnonzero(np.diff(bounds) < 0)
        if bounds[0] != 0 or bounds[-1] != self.num_sequences or steps_back.size:
            falls = f", falling after entry {steps_back[0]}" if steps_back.size else ""
            raise ValueError(
                f"{self._idx_file} is inconsistent: document bounds must rise from 0 to {self.num_sequences}, "
                f"found {bounds[0]} to {bounds[-1]}{falls}"
            )
        # Sequences lie back to back (checked above), so the byte pointers are the cumulative lengths.
        ends = np.append(self._pointers, self._bin_bytes) // self.dtype.itemsize
        return ends[bounds]
