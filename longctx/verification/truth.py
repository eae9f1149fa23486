"""What ought to be, written down a second time: from the config's words, without masks, plans or schedules.

A bug in the code that is verified must not be able to hide in what it is compared with. So documents are read off the
tokens themselves, visibility off the config, and labels off the corpus.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import gcd

import torch
from torch import Tensor

from longctx.attention_config import AttentionConfig
from longctx.loss import IGNORED
from longctx.parallel.schedule import Shape


def documents_of(tokens: Tensor, document_of_token: Tensor) -> Tensor:
    """Number the documents of a sequence: int64 `[T]`, from tokens that are all different within the corpus.

    A document begins where the corpus does not go on from the token before.
    """
    before, here = tokens[:-1], tokens[1:]
    goes_on = (here == before + 1) & (document_of_token[here] == document_of_token[before])
    return torch.cat([torch.zeros(1, dtype=torch.int64), (~goes_on).cumsum(0)])


def bounds_of(documents: Tensor) -> tuple[int, ...]:
    """Return where documents begin, and the end."""
    starts = (torch.diff(documents) != 0).nonzero().flatten() + 1
    return (0, *starts.tolist(), len(documents))


def allowed(config: AttentionConfig, documents: Tensor) -> Tensor:
    """Return who may see whom by the words of `AttentionConfig`: bool `[1, T, T]`, or `[H, T, T]` with head_windows."""
    if not config.documents:
        documents = torch.zeros_like(documents)
    local = torch.cat([torch.arange(end - begin) for begin, end in pairwise(bounds_of(documents))])
    place = torch.arange(len(documents))
    back = place[:, None] - place[None, :]
    seen = back >= 0
    if config.prefix is not None:
        seen = seen | (local[None, :] < config.prefix)
    seen = seen & (documents[:, None] == documents[None, :])
    if config.chunk is not None:
        chunk = local // config.chunk
        seen = seen & (chunk[:, None] == chunk[None, :])
    windows: Sequence[int | None] = [config.window] if config.head_windows is None else config.head_windows
    sink = local[None, :] < config.sinks
    return torch.stack([seen if window is None else seen & ((back < window) | sink) for window in windows])


def before(config: AttentionConfig, documents: Tensor) -> Tensor:
    """Return what a linear layer lets a token see, itself and all before it in its document: bool `[1, T, T]`."""
    if not config.documents:
        documents = torch.zeros_like(documents)
    place = torch.arange(len(documents))
    return ((place[:, None] >= place[None, :]) & (documents[:, None] == documents[None, :]))[None]


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float | None,
    documents: Tensor,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return out `[B, T, H, V]` and the last state `[B, H, K, V]` of linear attention, token by token, in q's dtype.

    A document begins with the state 0, the first one with `initial`.
    """
    batch, tokens, heads, keys = q.shape
    state = q.new_zeros(batch, heads, keys, v.shape[-1]) if initial is None else initial.to(q)
    outs = []
    for t in range(tokens):
        if t and documents[t] != documents[t - 1]:
            state = torch.zeros_like(state)
        if g is not None:
            decay = g.to(q).exp() if g.dim() == 1 else g[:, t].to(q).exp()
            state = state * (decay[:, :, :, None] if g.dim() == 4 else decay[..., None, None])
        value = v[:, t]
        if beta is not None:
            value = beta[:, t, :, None].to(q) * (value - torch.einsum("bhk,bhkv->bhv", k[:, t], state))
        state = state + k[:, t, :, :, None] * value[:, :, None, :]
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) * (keys**-0.5 if scale is None else scale))
    return torch.stack(outs, dim=1), state


def convolution(x: Tensor, weight: Tensor, documents: Tensor) -> Tensor:
    """Return a causal depthwise convolution `[B, T, C]` of x with weight `[C, k]` that stays within documents."""
    out = x * weight[:, -1]
    for back in range(1, min(weight.shape[1], x.shape[1])):
        same = torch.zeros(len(documents), dtype=torch.bool)
        same[back:] = documents[back:] == documents[:-back]
        out = out + torch.roll(x, back, dims=1) * weight[:, -1 - back] * same[:, None]
    return out


def labels_of(config: AttentionConfig, tokens: Tensor, documents: Tensor, document_of_token: Tensor) -> Tensor:
    """Return the labels `[T]`: the corpus' next token, ignored at the ends of documents and where it is visible."""
    following = (tokens + 1).clamp(max=len(document_of_token) - 1)
    ends = (document_of_token[following] != document_of_token[tokens]) | (following == tokens)
    labels = torch.where(ends, IGNORED, following)
    if config.prefix is not None:
        pieces = documents if config.documents else torch.zeros_like(documents)
        for begin, end in pairwise(bounds_of(pieces)):
            labels[begin : min(begin + config.prefix, end) - 1] = IGNORED
    return labels


def textbook_bytes(shape: Shape, *, ranks: int, sharing: int, tokens: int, backward: str | None) -> tuple[int, int]:
    """Return the bytes that each rank sends, forward and backward, if every rank needs every token.

    K and V of a team's tokens visit the other teams (cp - 1 hops of Ring Attention, or one collection), back with their
    gradients; inside a team heads are exchanged for tokens, twice each way (DeepSpeed-Ulysses).

    Args:
        shape: the heads of the whole layer.
        ranks: of the group; `sharing` of them share heads (1 but for Ulysses and USP).
        tokens: of one rank.
        backward: `rotate_kv`, `rotate_q`, or None for what sends less.
    """
    low, wide = shape.dtype.itemsize, shape.wide.itemsize
    both = shape.head_dim + shape.v_head_dim
    heads = shape.heads // sharing
    kv_heads = heads // gcd(heads, shape.heads // shape.kv_heads)
    repeated = sharing * kv_heads > shape.kv_heads
    others = (ranks // sharing - 1) * tokens * sharing
    keys = kv_heads * both * (low + wide)  # k, v, and dk, dv behind them
    queries = heads * (both * low + 2 * wide + shape.head_dim * wide)  # q, dout, lse, delta, and dq behind them
    moved = {"rotate_kv": keys, "rotate_q": queries}.get(backward or "auto", min(keys, queries))
    peers = (sharing - 1) * tokens
    there = heads * both * low + kv_heads * both * low  # q, k, v; out
    back = heads * (both * low + wide) + kv_heads * both * (wide if repeated else low)  # dout, delta; dq, dk, dv
    return others * kv_heads * both * low + peers * there, others * moved + peers * back


def textbook_states(name: str, *, ranks: int, state: int, transition: int) -> int | None:
    """Return the bytes that all ranks together send in one pass if each has one segment; None where no paper says.

    Stations of a ring hand one state on; a gathering sends every rank's map to those after it, but for the first
    transition, which acts on nothing (LASP-2, arXiv 2502.07563, with transitions).

    Args:
        state, transition: bytes of one of them, with all heads and rows.
    """
    if name in ("ring", "pipelined"):
        return (ranks - 1) * state
    pairs = ranks * (ranks - 1) // 2
    return pairs * state + (pairs - ranks + 1) * transition if name == "all_gather" else None
