"""Cut a token store into packed samples, each of which can be computed from its index alone.

Training documents are laid end to end in a new order every epoch, one epoch after the other, without end. Sample i
takes the tokens [i * seq_len, (i + 1) * seq_len) of that line and, for its last label, one more. So no token is lost or
repeated within an epoch, no epoch has a ragged end (a sample may hold the end of one epoch and the start of the next),
and the only state is the index: any process can compute any sample, however many ranks or micro-batches there are.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from longctx.data.indexed import TokenStore
from longctx.loss import IGNORED

_PAD = 0  # any id of the vocabulary; padding has no labels and is a document of its own
_SPLITS = ("train", "held_out")
_CACHED_EPOCHS = 2  # a sample touches at most two


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Hold one packed sequence.

    tokens: int64 [seq_len]. labels: int64 [seq_len], the next token, or -100 at the last token of a document (what
    follows it is another document) and in padding. Already shifted, so sharding needs no neighbour.
    cu_seqlens: 0 = b0 < b1 < ... = seq_len; document pieces are [b0, b1), [b1, b2), ... A document cut by the start of
    the sample counts from there.
    """

    tokens: np.ndarray
    labels: np.ndarray
    cu_seqlens: tuple[int, ...]


class PackedStream:
    """Give the samples of one split of a token store by their global index.

    The split is a seeded choice of whole documents and depends only on the store, `seed` and `held_out`. `train` has
    samples without end; `held_out` has `samples` of them in a fixed order (that of the store), the last one padded.

    seed: decides the split and the order of the documents in each epoch. held_out: fraction of the (non-empty)
    documents, at least one document if above 0. vocab_size: when given, a token id outside [0, vocab_size) is an error.
    Memory: about 32 bytes per document. Raises ValueError if a split has too few documents or tokens.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        seq_len: int,
        seed: int,
        held_out: float,
        split: str,
        vocab_size: int | None = None,
    ) -> None:
        if seq_len < 1:
            raise ValueError(f"data.seq_len={seq_len} must be at least 1 token")
        if seed < 0:
            raise ValueError(f"data.seed={seed} must not be negative")
        if split not in _SPLITS:
            raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(_SPLITS)}")
        if store.dtype.kind not in "iu":
            raise ValueError(f"{store.prefix} holds {store.dtype.name} values (data.path); token ids must be integers")
        self._store = store
        self._seq_len = seq_len
        self._seed = seed
        self._held_out = held_out
        self._split = split
        self._vocab_size = vocab_size
        documents = _split_documents(store, seed=seed, held_out=held_out)[split]
        offsets = store.document_offsets
        self._first = offsets[documents]
        self._length = offsets[documents + 1] - self._first
        self._total = int(self._length.sum())
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        if split == "train" and self._total < seq_len + 1:
            raise ValueError(
                f"the training split of {store.prefix} has {self._total} tokens in {documents.size} documents, but one "
                f"sample takes data.seq_len + 1 = {seq_len + 1}; lower data.seq_len or data.held_out ({held_out}), or "
                "add text"
            )
        if split == "held_out" and self._total == 0:
            raise ValueError("data.held_out=0 keeps no documents for evaluation; set it above 0, or do not evaluate")

    @property
    def num_tokens(self) -> int:
        """Count the tokens of the split."""
        return self._total

    @property
    def num_documents(self) -> int:
        """Count the non-empty documents of the split."""
        return self._length.size

    @property
    def samples_per_epoch(self) -> int:
        """Count the samples that lie wholly within the first pass over the split."""
        return self._total // self._seq_len

    @property
    def samples(self) -> int:
        """Count the held-out samples, the padded last one included. A training split has no end: ValueError."""
        if self._split == "train":
            raise ValueError("the training split has samples without end; samples_per_epoch counts one pass")
        return -(-self._total // self._seq_len)

    def epoch(self, index: int) -> float:
        """Return how many passes over the split come before sample `index`."""
        return index * self._seq_len / self._total

    def fingerprint(self) -> str:
        """Return 16 hex digits; two streams with the same fingerprint have the same samples, index by index."""
        parts = (self._store.fingerprint(), self._seq_len, self._seed, self._held_out, self._split)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def sample(self, index: int) -> Sample:
        """Return one sample. Raises IndexError below 0 and, for `held_out`, from `samples` on."""
        if index < 0 or (self._split == "held_out" and index >= self.samples):
            count = "any number of" if self._split == "train" else self.samples
            raise IndexError(f"there is no sample {index}: the {self._split} split has {count} samples, from 0 on")
        window, bounds = self._window(index * self._seq_len)
        labels = window[1:].copy()
        ends = np.array(bounds, dtype=np.int64)
        # A bound b is the first position of another document, so position b - 1 has nothing of its own to predict.
        labels[ends[ends <= self._seq_len] - 1] = IGNORED
        if self._split == "held_out":
            labels[max(0, self._total - index * self._seq_len) :] = IGNORED
        inside = (bound for bound in bounds if bound < self._seq_len)
        return Sample(tokens=window[:-1].copy(), labels=labels, cu_seqlens=(0, *inside, self._seq_len))

    def _window(self, position: int) -> tuple[np.ndarray, list[int]]:
        """Return tokens [position, position + seq_len + 1) of the line, int64, and the document ends among them.

        A document end is given as an index into the window, 1 to seq_len + 1. Held-out tokens past the end are padding.
        """
        size = self._seq_len + 1
        window = np.full(size, _PAD, dtype=np.int64)
        bounds: list[int] = []
        filled = 0
        while filled < size:
            epoch, offset = divmod(position + filled, self._total)
            if epoch and self._split == "held_out":
                break
            order, starts = self._epoch(epoch)
            rank = int(np.searchsorted(starts, offset, side="right")) - 1
            while filled < size and rank < order.size:
                skip = offset - int(starts[rank])
                first, left = int(self._first[order[rank]]) + skip, int(self._length[order[rank]]) - skip
                take = min(left, size - filled)
                window[filled : filled + take] = self._store.read(first, first + take)
                filled += take
                offset += take
                if take == left:
                    bounds.append(filled)
                rank += 1
        if self._vocab_size is not None and (window.min() < 0 or window.max() >= self._vocab_size):
            raise ValueError(
                f"{self._store.prefix} holds token ids {window.min()}..{window.max()}, but the vocabulary is "
                f"0..{self._vocab_size - 1}; set data.tokenizer to the one that the file was made with"
            )
        return window, bounds

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the order of the split's documents in an epoch and the position of each one's first token in it."""
        cached = self._epochs.get(epoch)
        if cached is None:
            count = self._length.size
            order = np.arange(count) if self._split == "held_out" else _permutation(count, (self._seed, 1, epoch))
            starts = np.zeros(count, dtype=np.int64)
            np.cumsum(self._length[order][:-1], out=starts[1:])
            cached = order, starts
            # Replaced, not changed: a prefetching thread may be reading the old one.
            newest = list(self._epochs.items())[-(_CACHED_EPOCHS - 1) :]
            self._epochs = dict([*newest, (epoch, cached)])
        return cached


def _split_documents(store: TokenStore, *, seed: int, held_out: float) -> dict[str, np.ndarray]:
    """Return the document numbers of each split, ascending, int64. Documents without tokens are in neither."""
    if not 0.0 <= held_out < 1.0:
        raise ValueError(f"data.held_out={held_out} is a fraction of the documents and must be in [0, 1)")
    documents = np.flatnonzero(np.diff(store.document_offsets) > 0).astype(np.int64)
    if documents.size == 0:
        raise ValueError(f"{store.prefix} holds no tokens; point data.source and data.path at some text")
    count = max(1, round(held_out * documents.size)) if held_out > 0 else 0
    if count >= documents.size:
        raise ValueError(
            f"{store.prefix} has {documents.size} documents, of which data.held_out={held_out} would keep {count} for "
            "evaluation and leave none to train on; set data.held_out=0, lower it, or add documents (one text file can "
            "be split with data.separator)"
        )
    chosen = documents[_permutation(documents.size, (seed, 0))]
    return {"held_out": np.sort(chosen[:count]), "train": np.sort(chosen[count:])}


def _permutation(count: int, key: tuple[int, ...]) -> np.ndarray:
    """Return a permutation of range(count), int64, that depends on `key` alone.

    Sorting raw 64-bit draws rather than `Generator.permutation`: numpy promises the raw draws of a bit generator for
    ever, but not what its distributions make of them, and a run must resume on the same order after an upgrade.
    """
    draws = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(draws, kind="stable")
