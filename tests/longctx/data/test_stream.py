"""Packing: every token once per epoch, labels and bounds right, any sample from its index alone."""

import math
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from longctx.data.indexed import IndexedWriter, TokenStore
from longctx.data.stream import PackedStream
from longctx.loss import IGNORED

# Lengths of documents: empty ones, single tokens, and ones longer than several samples.
LENGTHS = st.lists(st.one_of(st.integers(0, 3), st.integers(1, 60)), min_size=2, max_size=25)


def make_store(folder: Path, lengths: list[int]) -> TokenStore:
    """Write documents whose tokens are all different, so that a token says which document and position it is."""
    first = 0
    with IndexedWriter(folder / "x", dtype=np.dtype("<i4")) as writer:
        for length in lengths:
            writer.add_document(np.arange(first, first + length))
            first += length
    return TokenStore(folder / "x")


def document_of(store: TokenStore, tokens: np.ndarray) -> np.ndarray:
    """Return the document of each token; tokens are their own position in the store."""
    return np.searchsorted(store.document_offsets, tokens, side="right") - 1


def check_sample(store: TokenStore, tokens: np.ndarray, labels: np.ndarray, cu_seqlens: tuple[int, ...]) -> None:
    """Check labels and bounds against the definition, piece by piece."""
    size = tokens.size
    assert tokens.dtype == labels.dtype == np.int64
    assert labels.shape == tokens.shape
    assert cu_seqlens[0] == 0
    assert cu_seqlens[-1] == size
    assert all(a < b for a, b in pairwise(cu_seqlens))
    ends = store.document_offsets[1:]
    for begin, end in pairwise(cu_seqlens):
        piece = tokens[begin:end]
        assert np.array_equal(piece, np.arange(piece[0], piece[0] + piece.size)), "a piece is one run of one document"
        assert len(set(document_of(store, piece).tolist())) == 1
        if end < size:
            assert piece[-1] + 1 in ends, "a piece inside the sample ends where its document ends"
    last_of_document = np.isin(tokens + 1, ends)
    assert np.array_equal(labels, np.where(last_of_document, IGNORED, tokens + 1))


@settings(max_examples=120, deadline=None, database=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    lengths=LENGTHS, seq_len=st.integers(1, 40), seed=st.integers(0, 2**33), held_out=st.sampled_from([0.0, 0.1, 0.5])
)
def test_every_training_token_once_per_epoch(lengths: list[int], seq_len: int, seed: int, held_out: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder), lengths)
        filled = sorted(n for n in lengths if n)
        kept = max(1, round(held_out * len(filled))) if held_out else 0
        # The shortest documents may be the ones to train on: they must do for a sample.
        assume(sum(filled[: len(filled) - kept]) > seq_len)
        stream = PackedStream(store, seq_len=seq_len, seed=seed, held_out=held_out, split="train")
        epochs = 3
        samples = [stream.sample(i) for i in range(math.ceil(epochs * stream.num_tokens / seq_len))]
        for sample in samples:
            check_sample(store, sample.tokens, sample.labels, sample.cu_seqlens)
        line = np.concatenate([s.tokens for s in samples])[: epochs * stream.num_tokens]
        seen = line.reshape(epochs, stream.num_tokens)
        for epoch in seen:
            assert np.array_equal(np.sort(epoch), np.sort(seen[0])), "each epoch holds the same tokens"
            assert np.unique(epoch).size == stream.num_tokens, "and each of them once"
        assert np.unique(document_of(store, seen[0])).size == stream.num_documents


@settings(max_examples=120, deadline=None, database=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(lengths=LENGTHS, seq_len=st.integers(1, 40), seed=st.integers(0, 99), held_out=st.floats(0.01, 0.9))
def test_every_held_out_token_once(lengths: list[int], seq_len: int, seed: int, held_out: float) -> None:
    filled = sum(n > 0 for n in lengths)
    assume(0 < max(1, round(held_out * filled)) < filled)
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder), lengths)
        stream = PackedStream(store, seq_len=seq_len, seed=seed, held_out=held_out, split="held_out")
        samples = [stream.sample(i) for i in range(stream.samples)]
        padding = stream.samples * seq_len - stream.num_tokens
        assert 0 <= padding < seq_len
        last = samples[-1]
        real = seq_len - padding
        if padding:
            assert np.all(last.labels[real:] == IGNORED)
            assert last.cu_seqlens[-2:] == (real, seq_len), "padding is a document of its own"
            bounds = last.cu_seqlens[:-1]
        else:
            bounds = last.cu_seqlens
        for sample in samples[:-1]:
            check_sample(store, sample.tokens, sample.labels, sample.cu_seqlens)
        check_sample(store, last.tokens[:real], last.labels[:real], bounds)
        line = np.concatenate([s.tokens for s in samples])[: stream.num_tokens]
        assert np.all(np.diff(line) > 0), "each token once, in the order of the store"
        try:
            train = PackedStream(store, seq_len=1, seed=seed, held_out=held_out, split="train")
        except ValueError:
            return  # a single training token
        trained = np.concatenate([train.sample(i).tokens for i in range(train.num_tokens)])
        assert not set(document_of(store, trained).tolist()) & set(document_of(store, line).tolist())
        assert line.size + trained.size == store.num_tokens


@settings(max_examples=60, deadline=None, database=None)
@given(seq_len=st.integers(1, 30), indices=st.lists(st.integers(0, 400), min_size=1, max_size=12))
def test_samples_depend_on_their_index_alone(seq_len: int, indices: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder), [5, 1, 17, 40, 2, 2, 9])
        options = {"seq_len": seq_len, "seed": 3, "held_out": 0.2, "split": "train"}
        walked = PackedStream(store, **options)
        for index in indices:
            a, b = walked.sample(index), PackedStream(store, **options).sample(index)
            assert np.array_equal(a.tokens, b.tokens)
            assert np.array_equal(a.labels, b.labels)
            assert a.cu_seqlens == b.cu_seqlens


def test_literal_samples(tmp_path: Path) -> None:
    """Written out: numpy or this file changing the order would break the resume of every run."""
    store = make_store(tmp_path, [3, 1, 4, 2])
    stream = PackedStream(store, seq_len=4, seed=0, held_out=0.0, split="train")
    got = [(s.tokens.tolist(), s.labels.tolist(), s.cu_seqlens) for s in map(stream.sample, range(5))]
    assert got == [
        ([3, 4, 5, 6], [IGNORED, 5, 6, 7], (0, 1, 4)),
        ([7, 0, 1, 2], [IGNORED, 1, 2, IGNORED], (0, 1, 4)),
        ([8, 9, 4, 5], [9, IGNORED, 5, 6], (0, 2, 4)),  # the end of the first epoch and the start of the second
        ([6, 7, 3, 0], [7, IGNORED, IGNORED, 1], (0, 2, 3, 4)),
        ([1, 2, 8, 9], [2, IGNORED, 9, IGNORED], (0, 2, 4)),
    ]


def test_held_out_literally(tmp_path: Path) -> None:
    store = make_store(tmp_path, [3, 1, 4, 2])
    stream = PackedStream(store, seq_len=4, seed=0, held_out=0.5, split="held_out")
    assert (stream.num_documents, stream.num_tokens, stream.samples) == (2, 6, 2)
    got = [(s.tokens.tolist(), s.labels.tolist(), s.cu_seqlens) for s in map(stream.sample, range(2))]
    assert got == [
        ([4, 5, 6, 7], [5, 6, 7, IGNORED], (0, 4)),
        ([8, 9, 0, 0], [9, IGNORED, IGNORED, IGNORED], (0, 2, 4)),
    ]
    with pytest.raises(IndexError, match="no sample 2: the held_out split has 2 samples"):
        stream.sample(2)
    with pytest.raises(IndexError, match="no sample -1"):
        stream.sample(-1)


def test_epochs_and_seeds_differ(tmp_path: Path) -> None:
    store = make_store(tmp_path, [2] * 50)
    stream = PackedStream(store, seq_len=50, seed=1, held_out=0.0, split="train")
    other = PackedStream(store, seq_len=50, seed=2, held_out=0.0, split="train")
    assert stream.samples_per_epoch == 2
    assert stream.epoch(3) == 1.5
    orders = [stream.sample(0), stream.sample(2), other.sample(0)]
    assert len({tuple(s.tokens.tolist()) for s in orders}) == 3


def test_epoch_cache_stays_small(tmp_path: Path) -> None:
    stream = PackedStream(make_store(tmp_path, [3, 4]), seq_len=5, seed=0, held_out=0.0, split="train")
    for index in range(40):
        stream.sample(index)
    assert len(stream._epochs) <= 2


def test_one_sample_longer_than_many_documents(tmp_path: Path) -> None:
    stream = PackedStream(make_store(tmp_path, [1] * 64), seq_len=63, seed=0, held_out=0.0, split="train")
    sample = stream.sample(0)
    assert sample.cu_seqlens == tuple(range(64))
    assert np.all(sample.labels == IGNORED)


def test_several_sequences_make_one_document(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", dtype=np.dtype("<u2")) as writer:
        for part in ([0, 1], [2], [3, 4, 5]):
            writer.add_sequence(np.array(part))
        writer.end_document()
    stream = PackedStream(TokenStore(tmp_path / "x"), seq_len=5, seed=0, held_out=0.0, split="train")
    sample = stream.sample(0)
    assert (sample.labels.tolist(), sample.cu_seqlens) == ([1, 2, 3, 4, 5], (0, 5))


def test_fingerprint(tmp_path: Path) -> None:
    store = make_store(tmp_path, [9, 9, 9])
    base = {"seq_len": 4, "seed": 0, "held_out": 0.3, "split": "train"}
    first = PackedStream(store, **base).fingerprint()
    assert PackedStream(store, **base).fingerprint() == first
    for change in ({"seq_len": 5}, {"seed": 1}, {"held_out": 0.4}, {"split": "held_out"}):
        assert PackedStream(store, **{**base, **change}).fingerprint() != first


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([0, 0], {}, "holds no tokens; point data.source"),
        ([9], {}, "has 1 documents, of which data.held_out=0.5 would keep 1.*set data.held_out=0"),
        ([9, 9], {"held_out": 0.9}, "would keep 2 for evaluation and leave none"),
        ([4, 4], {}, r"has 4 tokens in 1 documents, but one sample takes data.seq_len \+ 1 = 5; lower data.seq_len"),
        ([9, 9], {"held_out": 0.0, "split": "held_out"}, "data.held_out=0 keeps no documents"),
        ([9, 9], {"held_out": 1.0}, "data.held_out=1.0"),
        ([9, 9], {"seq_len": 0}, "data.seq_len=0"),
        ([9, 9], {"seed": -1}, "data.seed=-1"),
        ([9, 9], {"split": "test"}, "choose one of train, held_out"),
    ],
)
def test_impossible_streams(tmp_path: Path, lengths: list[int], options: dict, message: str) -> None:
    base = {"seq_len": 4, "seed": 0, "held_out": 0.5, "split": "train"}
    with pytest.raises(ValueError, match=message):
        PackedStream(make_store(tmp_path, lengths), **{**base, **options})


def test_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    store = make_store(tmp_path, [9, 9])
    fits = PackedStream(store, seq_len=17, seed=0, held_out=0.0, split="train", vocab_size=18)
    assert fits.sample(0).tokens.max() == 17
    stream = PackedStream(store, seq_len=17, seed=0, held_out=0.0, split="train", vocab_size=17)
    with pytest.raises(ValueError, match=r"0\.\.17, but the vocabulary is 0\.\.16; set data.tokenizer"):
        stream.sample(0)


def test_floating_point_stores_are_refused(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", dtype=np.dtype("<f4")) as writer:
        writer.add_document(np.arange(9))
    with pytest.raises(ValueError, match="float32 values"):
        PackedStream(TokenStore(tmp_path / "x"), seq_len=4, seed=0, held_out=0.0, split="train")


def test_training_has_no_count_of_samples(tmp_path: Path) -> None:
    stream = PackedStream(make_store(tmp_path, [9, 9]), seq_len=4, seed=0, held_out=0.0, split="train")
    with pytest.raises(ValueError, match="samples_per_epoch"):
        _ = stream.samples


def test_samples_beyond_32_bits(tmp_path: Path) -> None:
    """Token positions past 2^31 and 2^63 are plain arithmetic on the index."""
    stream = PackedStream(make_store(tmp_path, [7, 5, 9]), seq_len=4, seed=0, held_out=0.0, split="train")
    for index in (2**31, 2**40, 2**62):
        sample = stream.sample(index)
        follower = stream.sample(index + 1)
        inside = sample.labels[-1] != IGNORED
        assert not inside or sample.labels[-1] == follower.tokens[0]
