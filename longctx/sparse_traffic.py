"""What the routers of sparse layers tell each other before anything is selected: bytes, from shapes alone."""

from typing import NamedTuple

import torch

from longctx.kernels.merge import accumulator_dtype
from longctx.mixers.sparse.base import SparseMixerConfig
from longctx.mixers.sparse.landmark import LandmarkConfig
from longctx.mixers.sparse.moba import MobaConfig
from longctx.mixers.sparse.mosa import MosaConfig
from longctx.mixers.sparse.nsa import NsaConfig
from longctx.mixers.sparse.routing import RoutingConfig
from longctx.mixers.sparse.seer import SeerConfig
from longctx.mixers.sparse.sla import SlaConfig


class Summaries(NamedTuple):
    """What a rank tells each other rank in one layer, for one sequence.

    Attributes:
        what: in words; empty where nothing is told.
        forward, backward: bytes to each peer.
    """

    what: str
    forward: int
    backward: int


def summaries(
    settings: SparseMixerConfig, *, tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> Summaries:
    """Return what the routing of a kind exchanges while it trains: nothing of it depends on who selects what.

    Args:
        tokens: of a rank, in whole blocks where the kind summarises them.
        dtype: of the arithmetic; summaries are float32 (float64 for float64).
    """
    wide = accumulator_dtype(dtype).itemsize
    key = kv_heads * head_dim
    match settings:
        case MobaConfig() | SlaConfig():
            return Summaries("means of blocks' keys", tokens // settings.block_size * key * wide, 0)
        case LandmarkConfig():
            marks = tokens // settings.block_size * key * wide
            return Summaries("landmarks' keys, and their gradients", marks, marks)
        case NsaConfig():
            cells = tokens // settings.compress_stride * 2 * key * wide
            return Summaries("means of cells' keys and values, and their gradients", cells, cells)
        case SeerConfig():
            pools = tokens // settings.block_size * 3 * key * wide
            if settings.mode == "distill":
                return Summaries(
                    "pooled keys of blocks, and all keys to distill", pools + tokens * key * dtype.itemsize, 0
                )
            return Summaries("pooled keys of blocks", pools, 0)
        case MosaConfig():
            return Summaries("a score of each token and KV head", tokens * kv_heads * wide, 0)
        case RoutingConfig():
            return Summaries("the cluster of each token's keys", tokens * kv_heads * torch.int32.itemsize, 0)
    return Summaries("", 0, 0)
