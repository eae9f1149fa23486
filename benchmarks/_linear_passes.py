"""Linear attention as passes that can be timed: every kind through the library, and what it is compared with."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from _ranks import OurPass, Pass, Problem
from torch import Tensor

from longctx.attention import ContextParallelAttention
from longctx.kernels.linear.op import linear_attention
from longctx.kernels.mask import causal
from longctx.linear_attention import ContextParallelLinearAttention, StatePlan
from longctx.parallel.layout import Layout
from longctx.parallel.registry import resolve_schedule
from longctx.parallel.transport import Alone

KINDS = ("linear", "lightning", "simple_gla", "gla", "deltanet", "gdn", "kda")
DELTA = ("deltanet", "gdn", "kda")
Op = Callable[["Inputs"], Tensor]


@dataclass(frozen=True)
class Inputs:
    """q, k, v, dout `[1, T, H, D]`; g None, `[H]`, `[1, T, H]` or `[1, T, H, D]`; beta None or `[1, T, H]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    g: Tensor | None
    beta: Tensor | None

    def shard(self, layout: Layout, rank: int) -> "Inputs":
        """Return a rank's tokens."""
        parts = (self.q, self.k, self.v, self.dout, self.g, self.beta)
        return Inputs(*(x if x is None or x.dim() == 1 else layout.shard(x, rank=rank, dim=1) for x in parts))  # type: ignore[arg-type]


def make_inputs(kind: str, tokens: int, heads: int, head_dim: int) -> Inputs:
    """Return random tensors of the whole sequence, float32, equal on every rank."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    q, k, v, dout = (draw(1, tokens, heads, head_dim) for _ in range(4))
    g = beta = None
    if kind in DELTA:
        k, beta = F.normalize(k, dim=-1), draw(1, tokens, heads).sigmoid()
    if kind == "lightning":
        g = -(2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads))
    if kind in ("simple_gla", "gdn"):
        g = F.logsigmoid(draw(1, tokens, heads) + 3)
    if kind in ("gla", "kda"):
        g = F.logsigmoid(draw(1, tokens, heads, head_dim) + 3)
    return Inputs(q, k, v, dout, g, beta)


class LinearPass(Pass):
    """A forward and backward pass of an op; gradients of q, k, v and of what g and beta depend on tokens."""

    def __init__(self, op: Op, inputs: Inputs) -> None:
        super().__init__(Problem(inputs.q, inputs.k, inputs.v, inputs.dout))
        learned = inputs.g is not None and inputs.g.dim() > 1
        g = inputs.g.detach().requires_grad_() if inputs.g is not None and learned else inputs.g
        beta = None if inputs.beta is None else inputs.beta.detach().requires_grad_()
        self.op, self.inputs = op, Inputs(self.q, self.k, self.v, self.dout, g, beta)
        self.leaves = [self.q, self.k, self.v, *(x for x in (g, beta) if x is not None and x.requires_grad)]

    def forward(self) -> None:
        self.out = self.op(self.inputs)

    def backward(self) -> None:
        self.grads = torch.autograd.grad(self.out, self.leaves, self.dout)


def alone(kernel: str) -> Op:
    """Return the library's op on one device."""
    return lambda x: linear_attention(x.q, x.k, x.v, g=x.g, beta=x.beta, kernel=kernel)[0]


def shared(attention: ContextParallelLinearAttention, plan: StatePlan) -> Op:
    """Return the library's op over ranks."""
    return lambda x: attention(x.q, x.k, x.v, g=x.g, beta=x.beta, plan=plan)


def softmax(inputs: Inputs) -> Pass:
    """Return a pass of causal softmax attention on one rank."""
    attention = ContextParallelAttention(
        layout=Layout("contiguous", 1), schedule=resolve_schedule("local"), transport=Alone(), kernel="torch"
    )
    plan = attention.plan([causal()], total=inputs.q.shape[1])
    return OurPass(attention, plan, Problem(inputs.q, inputs.k, inputs.v, inputs.dout))


def peer(kind: str, folder: Path | None) -> Op | None:
    """Return flash-linear-attention's plain torch code with chunks, if it can be imported and has the kind.

    Args:
        folder: where the package is, if it is not installed.
    """
    if folder is not None and str(folder) not in sys.path:
        sys.path.append(str(folder))
    homes = {
        "linear": ("linear_attn", "naive_chunk_linear_attn"),
        "lightning": ("simple_gla", "naive_chunk_simple_gla"),
        "simple_gla": ("simple_gla", "naive_chunk_simple_gla"),
        "deltanet": ("delta_rule", "delta_rule_chunkwise"),
        "gdn": ("gated_delta_rule", "naive_chunk_gated_delta_rule"),
        "kda": ("kda", "naive_chunk_kda"),
    }
    if kind not in homes:
        return None
    try:
        function = getattr(import_module(f"fla.ops.{homes[kind][0]}.naive"), homes[kind][1])
    except ImportError:
        return None
    if kind == "linear":
        return lambda x: function(x.q, x.k, x.v)
    if kind == "deltanet":  # heads before tokens
        return lambda x: function(*(_given(y).transpose(1, 2) for y in (x.q, x.k, x.v, x.beta)))[0].transpose(1, 2)
    if kind in DELTA:
        return lambda x: function(x.q, x.k, x.v, x.g, x.beta)[0]
    return lambda x: function(x.q, x.k, x.v, _given(x.g).expand(x.q.shape[:3]))[0]


def _given(x: Tensor | None) -> Tensor:
    assert x is not None
    return x
