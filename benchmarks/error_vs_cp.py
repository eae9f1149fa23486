"""How rounding error grows with the number of context-parallel ranks: a table of relative errors against float64.

    python benchmarks/error_vs_cp.py

Causal attention over simulated ranks, striped layout, `torch` kernel; errors are ||ours - truth|| / ||truth||.
"""

import torch
from torch import Tensor

from longctx.attention import ContextParallelAttention
from longctx.kernels.mask import causal
from longctx.kernels.softmax.reference import dense_attention
from longctx.parallel.layout import Layout
from longctx.parallel.loopback import LoopbackTransport, run_ranks
from longctx.parallel.registry import resolve_schedule

TOKENS, HEADS, HEAD_DIM = 2048, 2, 64
NAMES = ("out", "dq", "dk", "dv")


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, TOKENS, HEADS, HEAD_DIM, generator=generator) for _ in range(4)]
    print(
        f"{TOKENS} tokens, H={HEADS}, D={HEAD_DIM}, causal\n\n{'dtype':9} {'cp':>3} "
        + " ".join(f"{n:>9}" for n in NAMES)
    )
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.to(dtype) for x in whole]
        truth = dense(inputs)
        for cp in (1, 2, 8, 32, 64):
            got = ring(inputs, cp)
            errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, truth, strict=True)]
            print(f"{str(dtype)[6:]:9} {cp:3} " + " ".join(f"{error:9.2e}" for error in errors))


def dense(inputs: list[Tensor]) -> list[Tensor]:
    """Return out, dq, dk, dv in float64 from the rounded inputs."""
    q, k, v = (x.double().requires_grad_() for x in inputs[:3])
    positions = torch.arange(TOKENS)
    out, _ = dense_attention(q, k, v, allowed=causal().allowed(positions, positions))
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3].double())]


def ring(inputs: list[Tensor], cp: int) -> list[Tensor]:
    """Return the same from `cp` simulated ranks."""
    layout = Layout("striped", cp)

    def rank(transport: LoopbackTransport) -> list[Tensor]:
        attention = ContextParallelAttention(
            layout=layout, schedule=resolve_schedule("ring"), transport=transport, kernel="torch"
        )
        shards = [layout.shard(x, rank=transport.rank, dim=1) for x in inputs]
        q, k, v = (x.requires_grad_() for x in shards[:3])
        out, _ = attention(q, k, v, plans=attention.plans([causal()], total=TOKENS))
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), shards[3])]

    ranks = run_ranks(cp, rank)
    return [layout.unshard([shards[i] for shards in ranks], dim=1) for i in range(4)]


if __name__ == "__main__":
    main()
