"""MoSA: a router chooses which tokens every head keeps (arXiv 2505.00315)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx.kernels.block_sparse.routing.mosa import chunk_selection, expert_selection, router_scores
from longctx.kernels.merge import accumulator_dtype
from longctx.kernels.precision import without_autocast
from longctx.mixers.sparse.base import (
    Inputs,
    Sizes,
    Slots,
    SparseMixer,
    SparseMixerConfig,
    Summaries,
    at_least,
)
from longctx.mixers.sparse_place import SparsePlace

_SELECTIONS = ("chunk", "expert")


@dataclass(frozen=True, kw_only=True)
class MosaConfig(SparseMixerConfig):
    """Settings of MoSA.

    Attributes:
        selection: `chunk`: of every chunk its best tokens are seen by all later chunks; causal. `expert`: the paper's
            expert choice of the best tokens of the whole document, which is NOT causal: whether a token is kept depends
            on tokens after it, so that losses of next tokens are not those of a model that could generate them.
        chunk: tokens of a chunk, counted from where a document begins; of `selection=chunk`.
        sparsity: one token of so many is kept, of a chunk or of a document.
        block_size: tokens that kernels and ranks handle together.
    """

    selection: str = "chunk"
    chunk: int = 256
    sparsity: int = 16
    block_size: int = 64

    def validate(self, kind: str) -> None:
        if self.selection not in _SELECTIONS:
            raise ValueError(
                f"mixers.{kind}.selection={self.selection} is not known; known are {', '.join(_SELECTIONS)}"
            )
        at_least(kind, 1, chunk=self.chunk, sparsity=self.sparsity, block_size=self.block_size)
        if self.selection == "expert" and self.chunk != MosaConfig.chunk:
            raise ValueError(
                f"mixers.{kind}.chunk={self.chunk} has no effect with mixers.{kind}.selection=expert, which chooses "
                f"from whole documents: leave it {MosaConfig.chunk}"
            )
        if self.selection == "chunk" and self.chunk % self.sparsity:
            raise ValueError(
                f"mixers.{kind}.chunk={self.chunk} must be a multiple of mixers.{kind}.sparsity={self.sparsity}: of a "
                "chunk, chunk / sparsity tokens are kept"
            )

    def note(self, *, heads: int, kv_heads: int) -> str | None:
        if self.selection == "chunk":
            return None
        return (
            "selection=expert is not causal: which tokens are kept depends on later ones, so losses are not those of a "
            "model that could generate"
        )

    def summaries(self, *, tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Summaries:
        return Summaries("a score of each token and KV head", tokens * kv_heads * accumulator_dtype(dtype).itemsize, 0)

    def slots(self, *, total: int, heads: int, kv_heads: int) -> tuple[Slots, ...]:
        return (Slots(kv_heads, 2 if self.selection == "chunk" else 1, classes=True),)

    def make(self, sizes: Sizes) -> SparseMixer:
        return Mosa(self, sizes)

    def pairs(self, begin: int, length: int) -> int:
        """Return the pairs of a head: of each chunk its triangle and what those before keep, or the triangle of what
        the document keeps."""
        if self.selection == "expert":
            count = -(-length // self.sparsity)
            return count * (count + 1) // 2
        chunks, rest = divmod(length, self.chunk)
        keep = self.chunk // self.sparsity
        inside = chunks * self.chunk * (self.chunk + 1) // 2 + rest * (rest + 1) // 2
        return inside + keep * (self.chunk * chunks * (chunks - 1) // 2 + rest * chunks)


class Mosa(SparseMixer):
    """A sigmoid router r = sigmoid(W x) for each KV head; query heads that share one keep the same tokens.

    Selected by W x, which a sigmoid would not reorder but round to equals. The router learns through a product with r:
    in the paper, and with `expert`, that of the outputs of what is kept; with `chunk`, where all queries have outputs,
    that of every value, v_j r_j. Ranks exchange W x, a number for each token and head.
    """

    def __init__(self, settings: MosaConfig, sizes: Sizes) -> None:
        super().__init__()
        self.settings = settings
        self.router = nn.Linear(sizes.dim, sizes.kv_heads, bias=False)

    @without_autocast
    def _weight(self, x: Tensor) -> Tensor:
        """Return r, `[B, T, HK]`, float32 (float64 for float64)."""
        wide = accumulator_dtype(x.dtype)
        return torch.sigmoid(F.linear(x.to(wide), self.router.weight.to(wide)))

    def forward(self, inputs: Inputs, *, place: SparsePlace) -> Tensor:
        q, k, v = inputs.q, inputs.k, inputs.v
        weight = self._weight(inputs.x).to(v.dtype)[..., None]
        scores = place.gather_tokens(router_scores(inputs.x, self.router.weight))
        if self.settings.selection == "expert":
            chosen = expert_selection(
                scores,
                document_of=place.document_of,
                positions=place.positions,
                first=place.first,
                sparsity=self.settings.sparsity,
                block_size=self.settings.block_size,
            )
            out = place.attend(q, k, v, selection=chosen, sink_logits=inputs.sink_logits)
            return out * weight.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        chosen = chunk_selection(
            scores,
            document_of=place.document_of,
            positions=place.positions,
            first=place.first,
            chunk=self.settings.chunk,
            keep=self.settings.chunk // self.settings.sparsity,
            block_size=self.settings.block_size,
        )
        return place.attend(q, k, v * weight, selection=chosen, sink_logits=inputs.sink_logits)
