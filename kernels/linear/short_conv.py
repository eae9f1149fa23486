"""Short causal convolution per channel over segments of consecutive tokens, within documents.

    y_t = sum_j w[:, j] x_{t - (k - 1) + j},  j = 0 ... k - 1

The last tap meets the token itself and the first the oldest one, as in `conv1d` with k - 1 zeros on the left. Every
segment comes with the k - 1 tokens before it, from wherever they are (`parallel/halo.py`); those of another document
count as 0.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.kernels.merge import accumulator_dtype

CPU_BLOCK = 1024  # tokens whose sums stay in a core's cache over all taps; a GPU would only see more launches


def short_conv(extended: Tensor, weight: Tensor, *, lengths: tuple[int, ...], documents: Tensor | None) -> Tensor:
    """Convolve each segment with the taps of every channel.

    Args:
        extended: `[B, E, C]`, the segments in order, each preceded by the k - 1 tokens before it in the sequence (zeros
            before the sequence begins); so E is T + (k - 1) P.
        weight: `[C, k]`, the token's own tap last.
        lengths: tokens of each of the P segments without those before it; their sum is T.
        documents: integers `[R, E]`, the document of each of these tokens, R = 1 or B; None = all of one document.
            What they say of the zeros before the sequence does not matter.

    Returns:
        `[B, T, C]` in the dtype of `extended`, summed in float32 (float64 for float64), as are the gradients.

    Raises:
        ValueError: tensors that do not fit each other or the lengths.
    """
    if extended.dim() != 3 or weight.dim() != 2 or weight.shape[0] != extended.shape[2]:
        raise ValueError(f"tokens [B, E, C] need weights [C, k]; given {tuple(extended.shape)}, {tuple(weight.shape)}")
    expected = sum(lengths) + len(lengths) * (weight.shape[1] - 1)
    if extended.shape[1] != expected:
        raise ValueError(
            f"{len(lengths)} segments of {sum(lengths)} tokens in all and {weight.shape[1]} taps need "
            f"{expected} tokens; given {extended.shape[1]}"
        )
    if documents is not None and documents.shape not in ((1, expected), extended.shape[:2]):
        raise ValueError(
            f"documents must be [1, {expected}] or {list(extended.shape[:2])}; given {tuple(documents.shape)}"
        )
    return _ShortConv.apply(extended, weight, lengths, documents)  # type: ignore[no-untyped-call]


class _ShortConv(torch.autograd.Function):
    """Sums of shifted views, of which autograd keeps none."""

    @staticmethod
    def forward(
        ctx: Any, extended: Tensor, weight: Tensor, lengths: tuple[int, ...], documents: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(extended, weight, documents)
        ctx.lengths = lengths
        taps = weight.to(accumulator_dtype(extended.dtype)).unbind(1)
        out = extended.new_empty(extended.shape[0], sum(lengths), extended.shape[2])
        for tokens, y, document in _blocks(extended, out, lengths, documents, len(taps)):
            total = torch.zeros_like(y, dtype=taps[0].dtype)
            for tap, (x, same) in zip(taps, _shifts(tokens, document, len(taps)), strict=True):
                total.addcmul_(_within(x, same), tap)
            y.copy_(total)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None, None]:
        extended, weight, documents = ctx.saved_tensors
        lengths: tuple[int, ...] = ctx.lengths
        wide = accumulator_dtype(extended.dtype)
        taps = weight.to(wide).unbind(1)
        dextended = torch.zeros_like(extended, dtype=wide)
        dtaps = torch.zeros(len(taps), weight.shape[0], dtype=wide, device=weight.device)
        walks = zip(
            _blocks(extended, dout, lengths, documents, len(taps)),
            _blocks(dextended, dout, lengths, documents, len(taps)),
            strict=True,
        )
        for (tokens, dy, document), (dtokens, _, _) in walks:
            size = dy.shape[2]
            dy = dy.to(wide)
            for j, (x, same) in enumerate(_shifts(tokens, document, len(taps))):
                dtap = _within(dy, same)
                dtokens[:, :, j : j + size].addcmul_(dtap, taps[j])
                dtaps[j] += (dtap * x).sum((0, 1, 2))
        return dextended.to(extended.dtype), dtaps.T.to(weight.dtype), None, None


def _blocks(
    extended: Tensor, out: Tensor, lengths: tuple[int, ...], documents: Tensor | None, taps: int
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield views of extended tokens `[B, P', n + k - 1, C]`, of their outputs `[B, P', n, C]`, and their documents.

    Neighbouring segments of the same length go together: thousands of single tokens are one view.
    """
    block = CPU_BLOCK if out.device.type == "cpu" else max(1, out.shape[1])
    reach, source, target = taps - 1, 0, 0
    for length, equal in groupby(lengths):
        count = len(list(equal))
        taken, shape = slice(source, source + count * (length + reach)), (count, length + reach)
        tokens = extended[:, taken].unflatten(1, shape)
        document = None if documents is None else documents[:, taken].unflatten(1, shape)
        y = out[:, target : target + count * length].unflatten(1, (count, length))
        source, target = taken.stop, target + count * length
        step = max(1, block // length)  # segments of a block
        for first in range(0, count, step):
            for begin in range(0, length, block):
                end = min(begin + block, length)
                part = (slice(None), slice(first, first + step), slice(begin, end + reach))
                yield tokens[part], y[:, first : first + step, begin:end], None if document is None else document[part]


def _shifts(tokens: Tensor, document: Tensor | None, taps: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield for each tap the tokens `[B, P', n, C]` that it meets, and which of them are of the output's document."""
    size = tokens.shape[2] - taps + 1
    for j in range(taps):
        same = None
        if document is not None and j < taps - 1:
            same = (document[:, :, j : j + size] == document[:, :, taps - 1 :])[..., None]
        yield tokens[:, :, j : j + size], same


def _within(x: Tensor, same: Tensor | None) -> Tensor:
    return x if same is None else torch.where(same, x, 0.0)
