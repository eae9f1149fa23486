"""Context-parallel attention in a model of your own: a two-layer decoder on packed documents.

torchrun --nproc-per-node 2 examples/library.py      # the same losses on any number of ranks, and without torchrun
torchrun --nproc-per-node 4 examples/library.py ulysses contiguous
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from longctx.attention import context_parallel_attention
from longctx.kernels.mask import causal, documents
from longctx.parallel.layout import Layout
from longctx.rope import apply_rope, rope_table

TOKENS, VOCAB, DIM, HEADS, KV_HEADS = 512, 64, 64, 4, 2


class Block(nn.Module):
    """Attention and a small MLP; `attend` is the only thing that knows of other ranks."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(DIM), nn.RMSNorm(DIM)])
        self.q, self.o = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.kv = nn.Linear(DIM, 2 * KV_HEADS * DIM // HEADS)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x, rope, attend):
        h = self.norms[0](x)
        q = self.q(h).unflatten(-1, (HEADS, -1))  # [B, T, H, D]
        k, v = self.kv(h).unflatten(-1, (2, KV_HEADS, -1)).unbind(2)  # [B, T, HK, D]
        x = x + self.o(attend(apply_rope(q, rope), apply_rope(k, rope), v).flatten(2))
        return x + self.mlp(self.norms[1](x))


def main() -> None:
    schedule, layout_name = (*sys.argv[1:], "ring", "striped")[:2] if len(sys.argv) != 2 else (sys.argv[1], "striped")
    group = None
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        group = dist.group.WORLD
    rank, cp = (dist.get_rank(), dist.get_world_size()) if group else (0, 1)
    torch.manual_seed(0)  # the same parameters on every rank
    embed, blocks, head = nn.Embedding(VOCAB, DIM), nn.ModuleList([Block(), Block()]), nn.Linear(DIM, VOCAB)
    parameters = [*embed.parameters(), *blocks.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)

    bounds = (0, 7, 130, 131, 300, TOKENS)  # packed documents of any lengths
    whole = torch.randint(VOCAB // 4, (1, TOKENS)) * 4 % VOCAB
    labels = F.pad(whole[:, 1:], (0, 1), value=-100)  # shifted before sharding
    labels[:, [end - 1 for end in bounds[1:]]] = -100  # the last token of a document predicts nothing
    count = (labels != -100).sum()

    layout = Layout(layout_name, cp)
    tokens, labels = (layout.shard(x, rank=rank, dim=1) for x in (whole, labels))
    positions = layout.positions(rank, TOKENS)
    rope = rope_table(positions, head_dim=DIM // HEADS, theta=10_000.0, dtype=torch.float32)
    mask = causal() & documents(bounds)

    def attend(q, k, v):
        return context_parallel_attention(q, k, v, layout=layout, schedule=schedule, mask=mask, group=group)

    for step in range(30):
        x = embed(tokens)
        for block in blocks:
            x = block(x, rope, attend)
        loss = F.cross_entropy(head(x).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum") / count
        optimizer.zero_grad()
        loss.backward()
        total = loss.detach()
        if group:
            for parameter in parameters:  # each rank has the gradients of its own tokens' losses: sum, not mean
                dist.all_reduce(parameter.grad, group=group)
            dist.all_reduce(total, group=group)
        optimizer.step()
        if rank == 0 and step % 5 == 0:
            print(f"step {step:2d}  loss {total.item():.5f}")
    if group:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
