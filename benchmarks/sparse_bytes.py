"""What MoBA's ranks send, counted: routing, and K/V on a ring, on a ring without unneeded hops, and block by block.

    python benchmarks/sparse_bytes.py                    # 8 simulated ranks, 16K tokens; a minute

Keys are directions that turn slowly along the sequence, queries look back by up to `--spreads` blocks: the less they
look around, the fewer of the other ranks' blocks are selected by anybody (union density). Every number is what the
simulated ranks really sent, forward and backward; the exit status is 1 if it is not what the formulas say:

routing   each rank sends every other one the mean of each of its blocks' keys, `T / cp / block_size x HK x D` float32,
          and a bit for each of the T / block_size blocks (and the counts that metrics ask for). No K/V, no gradient.
K/V       those of `attention.kv_moves`: `all`, `hops`, `blocks`, as planned before anything was sent.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _ranks import Problem, environment, write_report
from torch import Tensor

from longctx.kernels.block_sparse.blocks import block_mean
from longctx.kernels.block_sparse.routing.moba import moba_blocks
from longctx.kernels.block_sparse.selection import selected_blocks
from longctx.parallel.demand import agreed_bytes
from longctx.parallel.layout import Layout
from longctx.parallel.loopback import run_ranks
from longctx.parallel.transport import Transport
from longctx.sparse_attention import BUCKETS, Movement
from longctx.sparse_ranks import sparse_place

Row = dict[str, Any]
WAYS = ("all", "hops", "blocks")


def main() -> None:
    """Count, print the table, write JSON, and say what is not as the formulas say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--cp", type=int, default=8)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--topk", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--layouts", nargs="+", default=["contiguous", "zigzag"])
    parser.add_argument(
        "--spreads", type=int, nargs="+", default=[4, 16, 64, 256], help="blocks that queries look back"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/sparse_bytes.json"))
    options = parser.parse_args()
    rows = [count(options, layout, spread) for layout in options.layouts for spread in options.spreads]
    print(table(rows, options))
    problem_of = {key: value for key, value in vars(options).items() if key != "out"}
    write_report(options.out, {"environment": environment(), "problem": problem_of, "rows": rows})
    print(f"written to {options.out}")
    found = wrong(rows)
    print("\n".join(found) or "all as the formulas say")
    sys.exit(bool(found))


def make(options: argparse.Namespace, spread: int) -> Problem:
    """Return a sequence whose queries look back by up to `spread` blocks."""
    generator = torch.Generator().manual_seed(0)
    blocks, size = options.tokens // options.block, options.head_dim
    turned = torch.randn(blocks, size, generator=generator).cumsum(0)
    directions = torch.nn.functional.normalize(turned - turned.mean(0), dim=-1)
    own = torch.arange(options.tokens) // options.block
    back = (torch.rand(options.tokens, options.heads, generator=generator) * spread).long()
    k = directions[own][None, :, None].repeat(1, 1, options.kv_heads, 1)
    q = directions[(own[:, None] - back).clamp(min=0)][None]
    noise = partial(torch.randn, generator=generator)
    v, dout = noise(*k.shape), noise(*q.shape)
    return Problem(8 * q + 0.1 * noise(*q.shape), k + 0.1 * noise(*k.shape), v, dout)


def count(options: argparse.Namespace, name: str, spread: int) -> Row:
    """Run a layer of MoBA on all ranks each way and return what was sent, with what was planned."""
    layout, whole = Layout(name, options.cp), make(options, spread)  # type: ignore[arg-type]
    row: Row = {"layout": name, "spread": spread}
    for way in WAYS:
        ranks = run_ranks(options.cp, partial(layer, options=options, layout=layout, whole=whole, way=way))
        row[way] = {"sent": sum(rank["kv"] for rank in ranks), "planned": ranks[0]["planned"][way]}
        row["density"] = ranks[0]["density"]
        row["routing"] = {"sent": sum(rank["routing"] for rank in ranks), "planned": routing_bytes(options)}
    auto = run_ranks(options.cp, partial(layer, options=options, layout=layout, whole=whole, way="auto"))
    row["auto"] = auto[0]["moves"]
    return row


def routing_bytes(options: argparse.Namespace) -> int:
    """Return the bytes of all ranks by the formula."""
    means = options.tokens // options.cp // options.block * options.kv_heads * options.head_dim * 4
    return options.cp * (options.cp - 1) * (means + agreed_bytes(options.tokens // options.block, BUCKETS))


def layer(
    transport: Transport, *, options: argparse.Namespace, layout: Layout, whole: Problem, way: str
) -> dict[str, Any]:
    """Route and attend on one rank, forward and backward; count."""
    moved: list[Movement] = []
    place = sparse_place(
        total=options.tokens,
        device=torch.device("cpu"),
        layout=layout,
        group=transport,
        moves=way,  # type: ignore[arg-type]
        observe=moved.append,
    )
    q, k, v, dout = whole.shard(layout, transport.rank)
    leaves: tuple[Tensor, ...] = tuple(x.requires_grad_() for x in (q, k, v))
    with torch.no_grad():
        means = place.gather_blocks(block_mean(k, place.own_blocks(options.block)), block_size=options.block)
        chosen = moba_blocks(
            q,
            means,
            blocks=place.all_blocks(options.block),
            positions=place.positions,
            first=place.first,
            topk=options.topk,
        )
    means_bytes = transport.traffic.bytes
    selection = selected_blocks(chosen, block_size=options.block, positions=place.positions, first=place.first)
    out = place.attend(q, k, v, selection=selection)
    torch.autograd.grad(out, leaves, dout)
    agreement = (transport.size - 1) * agreed_bytes(options.tokens // options.block, BUCKETS)
    costs = moved[0].costs
    return {
        "routing": means_bytes + agreement,
        "kv": transport.traffic.bytes - means_bytes - agreement,
        "planned": {each: costs.of(each) for each in WAYS},  # type: ignore[arg-type]
        "density": moved[0].density,
        "moves": moved[0].moves,
    }


def table(rows: list[Row], options: argparse.Namespace) -> str:
    """Format what all ranks sent, in MB."""
    lines = [
        f"MoBA, {options.tokens:,} tokens, cp={options.cp}, blocks of {options.block}, top {options.topk}, "
        f"{options.kv_heads} KV heads of {options.head_dim}, float32; MB of all ranks, forward + backward",
        f"{'layout':12}{'looks back':>11}{'union density':>15}{'routing':>9}{'all':>8}{'hops':>8}{'blocks':>8}  auto",
    ]
    for row in rows:
        sent = "".join(f"{row[way]['sent'] / 1e6:8.1f}" for way in WAYS)
        lines.append(
            f"{row['layout']:12}{row['spread']:11}{row['density']:15.1%}{row['routing']['sent'] / 1e6:9.2f}{sent}"
            f"  {row['auto']}"
        )
    return "\n".join(lines)


def wrong(rows: list[Row]) -> list[str]:
    """Return what was sent and not planned."""
    found = []
    for row in rows:
        for what in ("routing", *WAYS):
            sent, planned = row[what]["sent"], row[what]["planned"]
            if sent != planned:
                found.append(f"{row['layout']}, {row['spread']}: {what} sent {sent:,} bytes, planned {planned:,}")
    return found


if __name__ == "__main__":
    main()
