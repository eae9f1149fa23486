"""The user's configuration at small size: fewer tokens, narrow layers, masks that still cut; and a corpus for it.

Every token of the corpus is a different number, so that any tensor of tokens says by itself where each came from.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longctx.attention_config import AttentionConfig
from longctx.config import Config
from longctx.data.indexed import IndexedWriter, TokenStore, token_dtype
from longctx.data.stream import PackedStream, Sample
from longctx.engines.engine import DTYPES
from longctx.kernels.mask import HeadMasks, Mask
from longctx.mixers.layers import Layers
from longctx.model import ModelConfig
from longctx.parallel.layout import Layout
from longctx.parallel.schedule import Schedule, Shape
from longctx.parallel.state_passing import StatePassing, resolve_passing
from longctx.stack import stack_shape
from longctx.stack_traffic import choose_state_layout
from longctx.verification import truth
from longctx.verification.small_sparse import fit_blocks, small_sparse, whole_block

TOKENS_PER_RANK = 67  # odd: zigzag halves and stripes of any width have a remainder
# A rank has more than one block of rows of a document, as kernels cut windowed tiles into blocks.
TOKENS_WITH_WINDOW = 149
LEAST_TOKENS = 9
RUN, DIM, HIDDEN, HEAD_DIM = 2, 32, 48, 8  # RUN: layers of one kind that follow each other
SAMPLES = 2
_SCORES = 3_000_000  # heads x T x T that a dense score matrix may have


@dataclass(frozen=True, kw_only=True)
class Small:
    """What is verified.

    Attributes:
        attention: scaled; layout and schedule are made of it.
        model: scaled, vocabulary included.
        layers: what mixes tokens in each layer: every kind and change between kinds, in fewer layers.
        layouts: of each layer, as the configured model would have it.
        source: the configuration as given.
        samples: two packed sequences with different documents.
        document_of_token: int64 `[vocabulary]`.
        scaled: what is not as configured, in words.
    """

    source: Config
    attention: AttentionConfig
    model: ModelConfig
    layers: Layers
    layouts: tuple[Layout, ...]
    layout: Layout
    schedule: Schedule
    total: int
    per_machine: int
    samples: tuple[Sample, ...]
    document_of_token: Tensor
    scaled: tuple[str, ...]

    @property
    def cp(self) -> int:
        return self.layout.cp

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the configured arithmetic."""
        return DTYPES[self.source.engine.dtype]

    @property
    def states(self) -> Layout:
        """Return the layout of the linear layers, of which there must be some."""
        return self.layouts[self.layers.linear[0]]

    @property
    def passing(self) -> StatePassing:
        """Return how states are passed."""
        return resolve_passing(self.attention.state_passing, splits=self.attention.state_splits)

    def of_kind(self, kind: str) -> "Small":
        """Return the same with the mask of softmax layers of this kind."""
        if kind != "full":
            return self
        whole: dict[str, Any] = {"window": None, "head_windows": None, "sinks": 0}
        source = dataclasses.replace(self.source, attention=dataclasses.replace(self.source.attention, **whole))
        return dataclasses.replace(self, source=source, attention=dataclasses.replace(self.attention, **whole))

    @cached_property
    def masks(self) -> tuple[Mask | HeadMasks, ...]:
        """Return the masks that training would use, one per sample."""
        return tuple(self.attention.mask(sample.cu_seqlens) for sample in self.samples)

    @cached_property
    def tokens(self) -> list[Tensor]:
        """Return each sample's tokens."""
        return [torch.from_numpy(sample.tokens) for sample in self.samples]

    @cached_property
    def documents(self) -> list[Tensor]:
        """Return each sample's document numbers by the truth."""
        return [truth.documents_of(tokens, self.document_of_token) for tokens in self.tokens]

    @cached_property
    def allowed(self) -> list[Tensor]:
        """Return each sample's visibility by the truth."""
        return [truth.allowed(self.attention, documents) for documents in self.documents]

    @cached_property
    def labels(self) -> list[Tensor]:
        """Return each sample's labels by the truth."""
        return [
            truth.labels_of(self.attention, tokens, documents, self.document_of_token)
            for tokens, documents in zip(self.tokens, self.documents, strict=True)
        ]

    def shape(self, dtype: torch.dtype, head_dim: int) -> Shape:
        """Return what the costs of a layer depend on."""
        return Shape(
            heads=self.model.num_heads,
            kv_heads=self.model.num_kv_heads,
            head_dim=head_dim,
            v_head_dim=head_dim,
            dtype=dtype,
        )


def shrink(config: Config, *, cp: int, per_machine: int, tokens_per_rank: int | None = None) -> Small:
    """Scale a configuration down.

    Raises:
        ValueError: ranks and heads that the schedule cannot arrange, or too few tokens.
    """
    if tokens_per_rank is not None and tokens_per_rank < LEAST_TOKENS:
        raise ValueError(f"--tokens (per rank) must be >= {LEAST_TOKENS}; given {tokens_per_rank}")
    heads = config.model.num_heads
    windowed = config.attention.window is not None or config.attention.head_windows is not None
    n = tokens_per_rank or (TOKENS_WITH_WINDOW if windowed else TOKENS_PER_RANK)
    while tokens_per_rank is None and n > LEAST_TOKENS and heads * (n * cp) ** 2 > _SCORES:
        n -= 2
    n, block = fit_blocks(config, n, given=tokens_per_rank is not None)
    total = n * cp
    attention, scaled = _small_attention(
        config.attention,
        total=total,
        shard=n,
        seq_len=config.data.seq_len,
        whole=whole_block(config, block=block),
    )
    lengths = _document_lengths(total)
    kinds = small_kinds(config.layers.kinds)
    model = dataclasses.replace(
        config.model,
        vocab_size=sum(lengths),
        dim=min(config.model.dim, DIM),
        num_layers=len(kinds),
        head_dim=min(config.model.head_size, HEAD_DIM),
        hidden_dim=min(config.model.hidden_dim, HIDDEN),
    )
    layout = attention.make_layout(cp)
    layout.check_total(total)
    layers, kernels = _small_layers(config, kinds, total=total, block=block)
    if attention.kernel in ("triton", "flash_attn"):
        kernels.append(f"attention.kernel {attention.kernel} -> auto in float64")
        attention = dataclasses.replace(attention, kernel="auto")
    if config.model.ops != "torch":
        kernels.append(f"model.ops {config.model.ops} -> torch")
        model = dataclasses.replace(model, ops="torch")
    states = layout
    if config.attention.layers is not None:
        attention = dataclasses.replace(attention, layers=list(kinds))
    if layers.linear:
        name = _state_layout(config, cp=cp)
        attention = dataclasses.replace(attention, state_layout=name)
        states = layout if name == "same" else Layout(name, cp)  # type: ignore[arg-type]
    return Small(
        source=config,
        attention=attention,
        model=model,
        layers=layers,
        layouts=tuple(states if index in layers.linear else layout for index in range(len(kinds))),
        layout=layout,
        schedule=attention.make_schedule(cp, heads=heads, kv_heads=config.model.num_kv_heads, per_machine=per_machine),
        total=total,
        per_machine=per_machine,
        samples=_samples(lengths, total=total, seed=config.data.seed),
        document_of_token=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        scaled=(*scaled, *kernels),
    )


def small_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """Return fewer layers: runs of a kind cut to `RUN`, up to where every kind has occurred, and one layer more."""
    runs = [(kind, min(len(list(run)), RUN)) for kind, run in groupby(kinds)]
    short = [kind for kind, count in runs for _ in range(count)]
    last = max(short.index(kind) for kind in kinds)
    return tuple(short[: last + 2])


def _small_layers(config: Config, kinds: tuple[str, ...], *, total: int, block: int) -> tuple[Layers, list[str]]:
    """Return the layers with small heads and small blocks, and what was scaled in words."""
    mixers, scaled = small_sparse(config, block=block, total=total)
    for kind in Layers(kinds=kinds).linear_kinds:
        given = mixers.linear_kind(kind)
        limits = {"head_dim": HEAD_DIM, "v_head_dim": 2 * HEAD_DIM, "features": 2 * HEAD_DIM}
        changes: dict[str, Any] = {
            key: min(value, limit) for key, limit in limits.items() if (value := getattr(given, key)) is not None
        }
        if given.kernel in ("triton", "fla"):
            changes["kernel"] = "auto"
            scaled.append(f"mixers.{kind}.kernel {given.kernel} -> auto in float64")
        changed: dict[str, Any] = {kind: dataclasses.replace(given, **changes)}
        mixers = dataclasses.replace(mixers, **changed)
    return Layers(kinds=kinds, mixers=mixers, max_positions=total), scaled


def _state_layout(config: Config, *, cp: int) -> str:
    """Return the layout of linear layers by name, as it is at the configured size."""
    shape = stack_shape(
        config.attention,
        layers=config.layers,
        model=config.model,
        cp=cp,
        total=config.data.seq_len,
        dtype=DTYPES[config.engine.dtype],
    )
    layout = choose_state_layout(shape, config.attention.state_layout)
    return "same" if layout == shape.softmax_layout else layout.name


def _small_attention(
    config: AttentionConfig, *, total: int, shard: int, seq_len: int, whole: int
) -> tuple[AttentionConfig, list[str]]:
    """Scale lengths that would not cut inside the longest document as the sequence is scaled, and say so.

    Args:
        whole: of how many tokens stripes are multiples.
    """
    longest = max(total // 2, 2)

    def length(value: int, limit: int) -> int:
        if value <= min(shard // 2, limit):
            return value
        return max(min(value * total // seq_len, value, limit), 3)

    changes: dict[str, Any] = {}
    for key in ("window", "chunk", "prefix"):
        if (value := getattr(config, key)) is not None:
            changes[key] = length(value, longest // 2)
    if config.head_windows is not None:
        changes["head_windows"] = [None if w is None else length(w, longest // 2) for w in config.head_windows]
    changes["sinks"] = min(config.sinks, max(shard // 8, 1))
    changes["width"] = max(min(config.width, max(shard // 3, 1)) // whole, 1) * whole if config.width > 1 else 1
    small = dataclasses.replace(config, **changes)
    differs = [key for key in changes if getattr(small, key) != getattr(config, key)]
    return small, [f"attention.{key} {getattr(config, key)} -> {getattr(small, key)}" for key in differs]


def typical_documents(total: int) -> tuple[int, ...]:
    """Return document bounds of the corpus' kind for a sequence of any length."""
    bounds = [0]
    for length in _document_lengths(total):
        bounds.append(min(bounds[-1] + length, total))
        if bounds[-1] == total:
            break
    return tuple(bounds)


def _document_lengths(total: int) -> list[int]:
    """Return lengths of 1, odd, across ranks and over whole shards, enough for the samples and one token more."""
    pattern = [total // 2 | 1, total // 4, total // 8 | 1, 9, 5, 2, 1, 1, 3]
    lengths: list[int] = []
    left = SAMPLES * total + 3
    while left:
        lengths.append(max(min(pattern[len(lengths) % len(pattern)], left), 1))
        left -= lengths[-1]
    return lengths


def _samples(lengths: list[int], *, total: int, seed: int) -> tuple[Sample, ...]:
    """Return samples of the stream that training reads, from a corpus of numbered tokens.

    Of the orders that different seeds give, the first whose first sample has a long document and one of one token.
    """
    with tempfile.TemporaryDirectory(prefix="longctx-verify-") as folder:
        prefix = Path(folder, "corpus")
        with IndexedWriter(prefix, dtype=token_dtype(sum(lengths))) as writer:
            first = 0
            for length in lengths:
                writer.add_document(np.arange(first, first + length))
                first += length
        store = TokenStore(prefix)
        samples: tuple[Sample, ...] = ()
        for each in range(seed, seed + 64):
            stream = PackedStream(store, seq_len=total, seed=each, held_out=0.0, split="train", vocab_size=sum(lengths))
            samples = tuple(stream.sample(index) for index in range(SAMPLES))
            pieces = np.diff(samples[0].cu_seqlens)
            if pieces.min() == 1 and pieces.max() >= total // 2:
                break
        return samples
