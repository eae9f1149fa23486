"""Attention to what a selection lets through, as the formulas read: dense, differentiable by autograd."""

import torch
from torch import Tensor

from longctx.kernels.block_sparse.selection import Selection, allowed
from longctx.kernels.softmax.reference import dense_attention


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    selection: Selection,
    k_positions: Tensor,
    gates: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute softmax attention over the selected keys.

    With gates each slot's keys share a softmax of their own, and the slots' outputs are weighted by the softmax of
    their gates (the grouped softmax of Landmark Attention, arXiv 2305.16300): `out = sum_s softmax(gates)_s out_s`.

    Args:
        q: `[B, T, H, D]`; k: `[B, Tk, HK, D]`; v: `[B, Tk, HK, Dv]`.
        k_positions: int64 `[Tk]`.
        gates: `[B, T, H, S]`; those of empty slots do not count.

    Returns:
        out `[B, T, H, Dv]` and lse `[B, H, T]`, as `dense_attention` does.
    """
    assert gates is None or selection.beside is None, "gates are of the slots of one selection"
    rows = []
    heads = q.shape[2]
    whole = _to_heads(allowed(selection, k_positions), heads)
    for row in range(q.shape[0]):
        pick = row if len(whole) > 1 else 0
        seen = whole[pick]
        options = {"softmax_scale": softmax_scale, "softcap": softcap, "sink_logits": sink_logits}
        one = slice(row, row + 1)
        if gates is None:
            rows.append(dense_attention(q[one], k[one], v[one], allowed=seen, **options))  # type: ignore[arg-type]
            continue
        outs, logits = [], []
        for slot in range(selection.slots):
            mine = _slot(selection, slot)
            seen = _to_heads(allowed(mine, k_positions), heads)[pick]
            out, _ = dense_attention(q[one], k[one], v[one], allowed=seen, softmax_scale=softmax_scale, softcap=softcap)
            outs.append(out)
            logits.append(gates[one, :, :, slot].masked_fill(~seen.any(-1).T[None], float("-inf")))
        logit = torch.stack(logits, dim=-1)  # [1, T, H, S]
        if sink_logits is not None:
            logit = torch.cat([logit, sink_logits[None, None, :, None].expand(*logit.shape[:3], 1)], dim=-1)
            outs.append(torch.zeros_like(outs[0]))
        blind = torch.isneginf(logit).all(-1, keepdim=True)
        weight = torch.softmax(logit.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
        lse = torch.logsumexp(logit.masked_fill(blind, 0.0), dim=-1).masked_fill(blind[..., 0], float("-inf"))
        rows.append(((torch.stack(outs, dim=-2) * weight[..., None]).sum(-2), lse.transpose(1, 2)))
    return torch.cat([out for out, _ in rows]), torch.cat([lse for _, lse in rows])


def selected_sum(q: Tensor, k: Tensor, v: Tensor, *, selection: Selection, k_positions: Tensor) -> Tensor:
    """Compute `out_t = sum over the selected keys j of (q_t . k_j) v_j`: linear attention to them, not normalised."""
    group = q.shape[2] // k.shape[2]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(group, dim=2))
    seen = _to_heads(allowed(selection, k_positions), q.shape[2])
    return torch.einsum("bhqk,bkhd->bqhd", scores * seen, v.repeat_interleave(group, dim=2))


def _to_heads(seen: Tensor, heads: int) -> Tensor:
    return seen.repeat_interleave(heads // seen.shape[1], dim=1)


def _slot(selection: Selection, slot: int) -> Selection:
    one = slice(slot, slot + 1)
    return Selection(
        lo=selection.lo[..., one],
        hi=selection.hi[..., one],
        slot_class=None if selection.slot_class is None else selection.slot_class[..., one],
        key_class=selection.key_class,
        block_size=selection.block_size,
    )
