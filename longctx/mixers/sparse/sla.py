"""Sparse-Linear Attention, made causal (SLA, arXiv 2509.24006)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from longctx.kernels.block_sparse.contract import Weights
from longctx.kernels.block_sparse.routing.sla import FEATURE_MAPS, features, left_out, rest_of, with_ones
from longctx.kernels.block_sparse.selection import Selection, narrowed, selected_blocks
from longctx.kernels.contract import Request
from longctx.kernels.merge import accumulator_dtype
from longctx.kernels.precision import without_autocast
from longctx.mixers.sparse.base import BestBlocksConfig, Inputs, Sizes, Slots, SparseMixer, Summaries, refuse_sinks
from longctx.mixers.sparse.moba import best_blocks, means_of_blocks
from longctx.mixers.sparse_place import SparsePlace


@dataclass(frozen=True, kw_only=True)
class SlaConfig(BestBlocksConfig):
    """Settings of SLA.

    Attributes:
        block_size: tokens of a block.
        topk: critical blocks of a query, its own one included.
        feature_map: phi of the linear part: `softmax` over the head dim, or `elu1`.
    """

    feature_map: str = "softmax"

    @property
    def takes_sinks(self) -> bool:
        return False

    @property
    def linear_beside(self) -> bool:
        return True

    def requests(self, request: Request) -> tuple[tuple[Request, Weights], ...]:
        # The sum is of float32 features, with a column of ones for the denominator.
        rest = replace(
            request, dtype=accumulator_dtype(request.dtype), v_head_dim=request.v_head_dim + 1, softcap=False
        )
        return (request, "softmax"), (rest, "sum")

    def validate(self, kind: str) -> None:
        super().validate(kind)
        if self.feature_map not in FEATURE_MAPS:
            raise ValueError(
                f"mixers.{kind}.feature_map={self.feature_map} is not known; known are {', '.join(FEATURE_MAPS)}"
            )

    def summaries(self, *, tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Summaries:
        numbers = tokens // self.block_size * kv_heads * head_dim
        return means_of_blocks(numbers, topk=self.topk, dtype=dtype)

    def slots(self, *, total: int, heads: int, kv_heads: int) -> tuple[Slots, ...]:
        """Return what the softmax attends to, and the sum once more."""
        return super().slots(total=total, heads=heads, kv_heads=kv_heads) * 2

    def make(self, sizes: Sizes) -> SparseMixer:
        return Sla(self, sizes)

    def pairs(self, begin: int, length: int) -> int:
        """Return those of the softmax and, as many, those of the sum that is taken off linear attention."""
        return 2 * super().pairs(begin, length)


class Sla(SparseMixer):
    """Softmax over the own block and the best ones before it, plus a projection of linear attention to all others.

    Blocks are chosen by every query for itself, as in MoBA, where the paper pools queries too: a pooled one would know
    queries that come later. Of the paper's negligible blocks, which it skips, there are none. The projection,
    `rest_weight [H, D, D]`, begins at 0: the layer as softmax attention alone.
    """

    def __init__(self, settings: SlaConfig, sizes: Sizes) -> None:
        super().__init__()
        self.settings = settings
        self.rest_weight = nn.Parameter(torch.zeros(sizes.heads, sizes.head_dim, sizes.head_dim))

    def forward(self, inputs: Inputs, *, place: SparsePlace) -> Tensor:
        refuse_sinks(inputs, "SLA")
        block_size = self.settings.block_size
        picks = best_blocks(inputs, place, block_size=block_size, topk=self.settings.topk)
        chosen = selected_blocks(picks, block_size=block_size, positions=place.positions, first=place.first)
        chosen = narrowed(chosen, total=place.total)  # both attentions keep it until the backward: one copy for both
        some = left_out(picks[..., :-1], block_size=block_size, positions=place.positions, first=place.first)
        out = place.attend(inputs.q, inputs.k, inputs.v, selection=chosen)
        return out + self._rest(inputs, chosen, some, place).to(out.dtype)

    @without_autocast
    def _rest(self, inputs: Inputs, chosen: Selection, some: Tensor, place: SparsePlace) -> Tensor:
        q, k, v = inputs.q, inputs.k, inputs.v
        phi_q, phi_k = (features(x, self.settings.feature_map) for x in (q, k))
        values = with_ones(v)
        group = q.shape[2] // k.shape[2]
        every = place.recur(phi_q, *(x.repeat_interleave(group, dim=2) for x in (phi_k, values)))
        rest = rest_of(every, place.attend_sum(phi_q, phi_k, values, selection=chosen), some)
        return torch.einsum("bthd,hde->bthe", rest, self.rest_weight.to(rest.dtype))
