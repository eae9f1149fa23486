"""Exchange of selected blocks: every rank gets exactly what its queries selected, straight from the owners.

One exchange forward, and one each way backward. Nothing hides behind arithmetic, and what a rank needs of all others
is there at once; a ring sends everything between the first and the last needed token, past everybody, but overlaps.
Which sends less is known from the demand (`demand.py`).
"""

import torch
from torch import Tensor

from longctx.kernels.merge import accumulator_dtype
from longctx.parallel.demand import Demand
from longctx.parallel.schedule import Attend, AttendBackward
from longctx.parallel.transport import Transport


def forward(ring: Transport, demand: Demand, k: Tensor, v: Tensor, *, attend: Attend) -> None:
    """Call `attend(source, all KV heads, k, v)` with the needed tokens of every shard, the own one first.

    Args:
        k, v: `[B, T, HK, D]`, this rank's.
    """
    for source, (k_part, v_part) in _collected(ring, demand, k, v).items():
        attend(source, (0, k.shape[2]), k_part, v_part)


def backward(ring: Transport, demand: Demand, k: Tensor, v: Tensor, *, attend: AttendBackward) -> tuple[Tensor, Tensor]:
    """Call `attend(source, all KV heads, k, v) -> (dk, dv)` likewise; return the own shard's, summed in rank order."""
    wide = accumulator_dtype(k.dtype)
    parts = {
        source: attend(source, (0, k.shape[2]), k_part, v_part)
        for source, (k_part, v_part) in _collected(ring, demand, k, v).items()
    }
    own = {ring.rank: parts.pop(ring.rank)} if ring.rank in parts else {}
    given = _given(ring, demand, k.device)
    coming = {
        peer: (_buffer(k, len(tokens), dtype=wide), _buffer(v, len(tokens), dtype=wide))
        for peer, tokens in given.items()
        if peer != ring.rank
    }
    if parts or coming:
        ring.exchange(parts, coming).wait()
    dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    for peer, (dk_part, dv_part) in sorted({**coming, **own}.items()):
        dk[:, given[peer]] += dk_part
        dv[:, given[peer]] += dv_part
    return dk, dv


def _given(ring: Transport, demand: Demand, device: torch.device) -> dict[int, Tensor]:
    """Return the own tokens that each rank needs, this one included."""
    tokens = {peer: demand.tokens(peer, ring.rank) for peer in range(ring.size)}
    return {peer: indices.to(device) for peer, indices in tokens.items() if len(indices)}


def _collected(ring: Transport, demand: Demand, k: Tensor, v: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Return k and v of the needed tokens of every source, the own ones first."""
    given = _given(ring, demand, k.device)
    gathered: dict[int, tuple[Tensor, Tensor]] = {}
    if ring.rank in given:
        gathered[ring.rank] = k[:, given[ring.rank]], v[:, given[ring.rank]]
    coming = {}
    for source in range(ring.size):
        count = int(demand.counts[ring.rank, source])
        if source != ring.rank and count:
            coming[source] = _buffer(k, count, dtype=k.dtype), _buffer(v, count, dtype=v.dtype)
    outgoing = {
        peer: (k[:, tokens].contiguous(), v[:, tokens].contiguous())
        for peer, tokens in given.items()
        if peer != ring.rank
    }
    if outgoing or coming:
        ring.exchange(outgoing, coming).wait()
    return gathered | coming


def _buffer(like: Tensor, tokens: int, *, dtype: torch.dtype) -> Tensor:
    return like.new_empty((like.shape[0], tokens, *like.shape[2:]), dtype=dtype)
