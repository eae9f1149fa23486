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
