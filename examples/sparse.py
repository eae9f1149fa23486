"""Sparse attention in a model of your own, with the tokens of a sequence shared by all ranks.

    torchrun --nproc-per-node 2 examples/sparse.py

A layer makes q, k, v of its own tokens; the mixer chooses what they see and attends to it, whoever has it. Here MoBA;
any of `longctx.mixers.sparse` will do. The outputs and gradients are those of one rank that has the whole sequence.
"""

import torch
import torch.distributed as dist

from longctx.mixers.sparse.base import Inputs
from longctx.mixers.sparse.moba import Moba, MobaConfig
from longctx.parallel.layout import Layout
from longctx.sparse_attention import Movement
from longctx.sparse_ranks import sparse_place

TOKENS, HEADS, KV_HEADS, HEAD_DIM = 4096, 4, 2, 32


def main() -> None:
    """Attend on this rank's tokens and compare with the whole sequence on one rank."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    layout = Layout("zigzag", size)
    mixer = Moba(MobaConfig(block_size=64, topk=4))
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, TOKENS, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    whole = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    documents = [(0, 1500, TOKENS)]  # two packed documents

    moved: list[Movement] = []
    own = [layout.shard(x.detach(), rank=rank, dim=1).requires_grad_() for x in whole]
    place = sparse_place(
        total=TOKENS,
        device=torch.device("cpu"),
        layout=layout,
        bounds=documents,
        group=dist.group.WORLD,
        observe=moved.append,
    )
    out = mixer(inputs(own), place=place)
    grads = torch.autograd.grad(out.square().sum(), own)

    alone = sparse_place(total=TOKENS, device=torch.device("cpu"), layout=Layout("contiguous", 1), bounds=documents)
    expected = mixer(inputs(whole), place=alone)
    expected_grads = torch.autograd.grad(expected.square().sum(), whole)
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), (out, *grads), (expected, *expected_grads), strict=True):
        error = (ours - layout.shard(theirs, rank=rank, dim=1)).abs().max().item()
        print(f"rank {rank}: {name} differs from one rank's by at most {error:.1e}")
    if rank == 0:
        print(f"K/V moved by {moved[0].moves}; union density {moved[0].density:.0%}")
    dist.destroy_process_group()


def inputs(qkv: list[torch.Tensor]) -> Inputs:
    """Return what a mixer is given; this one looks at q, k and v alone."""
    q, k, v = qkv
    return Inputs(x=q.flatten(2), q=q, k=k, v=v, plain_q=q, plain_k=k, sink_logits=None)


if __name__ == "__main__":
    main()
