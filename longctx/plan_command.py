"""`longctx plan`: who computes and sends what, counted from integers before anything runs."""

import dataclasses
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise

import torch

from longctx.cli import PLAN_HELP, take_number
from longctx.config import Config, load_config
from longctx.data.prepare import prepare
from longctx.engines.engine import DTYPES
from longctx.kernels.mask import HeadMasks, Mask, causal, documents, sliding_window
from longctx.parallel.balance import balance_of, describe
from longctx.parallel.cost import in_bytes, traffic
from longctx.parallel.heads import HeadSplit
from longctx.parallel.mesh import Degrees
from longctx.parallel.plan import Plan, plan
from longctx.parallel.schedule import Shape
from longctx.setup import (
    check_blocks,
    check_linear_kernel,
    check_moves,
    check_softmax_kernel,
    check_sparse_kernel,
    choose_attention,
    heads,
    layer_shape,
    open_stream,
    with_vocabulary,
)
from longctx.simulated import simulated_degrees
from longctx.sparse_traffic import selection_bytes
from longctx.stack import describe_linear, stack_shape
from longctx.stack_traffic import StackShape, choose_state_layout

MANY_RANKS, MANY_HOPS = 16, 8  # what a table shows
ON_ANY_DEVICE = ("torch", "reference")  # kernels whose limits are the same on the machine that a plan is for
AROUND = ("rope", "gate", "kernel")  # settings of a sparse kind that say nothing of what it selects
MOVED = {
    "auto": "what is selected decides, in every layer and step, between the selected blocks alone and the schedule "
    "without what nobody selected",
    "hops": "on the schedule, without what nobody selected",
    "blocks": "the selected blocks alone, straight from their owners",
    "all": "as of dense attention, whatever is selected",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan of a run's first sequence; return 0, or 2 if the configuration is wrong."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(PLAN_HELP, end="")
        return 0
    try:
        overrides, per_machine = take_number(arguments, "--per-machine", what="ranks >= 1", least=1)
        config = load_config(overrides)
        for kind in config.layers.linear_kinds:
            if config.mixers.linear_kind(kind).kernel in ON_ANY_DEVICE:
                check_linear_kernel(config, kind, device_type="cpu")
        for kind in config.layers.sparse_kinds:
            if config.mixers.sparse_kind(kind).kernel in ON_ANY_DEVICE:
                check_sparse_kernel(config, kind, device_type="cpu")
        if config.layers.softmax and config.attention.kernel in ON_ANY_DEVICE:
            check_softmax_kernel(config, device_type="cpu")
        elif config.layers.softmax and config.attention.kernel == "triton" and find_spec("triton"):
            check_softmax_kernel(config, device_type="cuda")  # of what it takes there
        degrees, per_machine = simulated_degrees(config, per_machine=per_machine)
        check_blocks(config, cp=degrees.cp)
        check_moves(config, cp=degrees.cp, per_machine=per_machine)
        show(config, degrees=degrees, per_machine=per_machine)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def show(config: Config, *, degrees: Degrees, per_machine: int) -> None:
    """Print the plan line and the table of ranks."""
    store = prepare(config.data, report=print)
    stream = open_stream(config, with_vocabulary(config), store.prefix, split="train")
    if "auto" in (config.attention.layout, config.attention.schedule):
        choice = choose_attention(config, stream, degrees=degrees, per_machine=per_machine, device=torch.device("cpu"))
        print(choice.explain())
        config = dataclasses.replace(config, attention=choice.config)
    shape, total = layer_shape(config), config.data.seq_len
    for kind in config.layers.softmax_kinds:
        mask = config.attention.mask(stream.sample(0).cu_seqlens, kind=kind)
        plans = _plans(config, mask, degrees=degrees, per_machine=per_machine)
        first = plans[0]
        where = "" if config.attention.layers is None else f" of {kind} layers"
        told = describe(first.layout, [mask], first.schedule, total=total, shape=shape)
        print(f"plan{where}: {told}; kernel {config.attention.kernel}")
        print("\n".join(table(plans, shape)))
    bounds = stream.sample(0).cu_seqlens if config.attention.documents else (0, total)
    stack = stack_shape(
        config.attention,
        layers=config.layers,
        model=config.model,
        cp=degrees.cp,
        total=total,
        dtype=DTYPES[config.engine.dtype],
    )
    for kind in config.layers.sparse_kinds:
        lines = sparse_lines(config, kind, bounds, degrees=degrees, per_machine=per_machine, stack=stack)
        print("\n".join(lines))
    for line in describe_linear(stack, states=choose_state_layout(stack, config.attention.state_layout)):
        print(line)


def sparse_lines(
    config: Config, kind: str, bounds: Sequence[int], *, degrees: Degrees, per_machine: int, stack: StackShape
) -> list[str]:
    """Return what is known of a sparse kind before anything is selected: its settings, pairs, and what routing sends.

    Args:
        bounds: where the documents of a sequence begin, and its end.
        stack: passes states, where the kind has linear attention beside.
    """
    model, total, cp = config.model, config.data.seq_len, degrees.cp
    settings = config.mixers.sparse_kind(kind).of_model(heads=model.num_heads, kv_heads=model.num_kv_heads)
    shown = {key: "null" if value is None else value for key, value in vars(settings).items() if key not in AROUND}
    words = ", ".join(f"{key} {value}" for key, value in shown.items())
    schedule = config.attention.make_schedule(cp, **heads(config), per_machine=per_machine)
    where = f"{config.attention.make_layout(cp).describe()} x {schedule.name}, cp={cp}, {total:,} tokens"
    lines = [f"plan of {kind} layers: {where}; kernel {settings.kernel}; {words}"]
    lengths = [(begin, end - begin) for begin, end in pairwise(bounds)]
    pairs, dense_pairs = sum(settings.pairs(*each) for each in lengths), sum(n * (n + 1) // 2 for _, n in lengths)
    lines.append(f"  pairs: about {pairs:,} for each head, {pairs / dense_pairs:.1%} of causal ones")
    if cp == 1:
        return lines
    told = settings.summaries(
        tokens=total // cp,
        kv_heads=model.num_kv_heads,
        head_dim=model.head_size,
        dtype=DTYPES[config.engine.dtype],
    )
    if told.what:
        forward, backward = ((cp - 1) * each / 1e3 for each in (told.forward, told.backward))
        lines.append(f"  routing: a rank sends {told.what}: {forward:,.1f} kB forward, {backward:,.1f} kB backward")
    teams, slots = schedule.teams(cp), settings.slots(total=total, **heads(config))
    split = HeadSplit(model.num_heads, model.num_kv_heads, teams.size)
    if sent := (teams.size - 1) * selection_bytes(slots, tokens=total // cp, total=total, split=split):
        lines.append(f"  selection: a rank tells those that share its heads: {sent / 1e3:,.1f} kB forward")
    dense = not settings.selects or teams.count == 1
    way = "as of dense attention" if dense else f"{MOVED[config.attention.moves]} ({_moves_words(config)})"
    lines.append(f"  K/V: {way}")
    if settings.window_beside is not None:
        mask = causal() & documents(bounds) & sliding_window(settings.window_beside - 1)
        plans = _plans(config, mask, degrees=degrees, per_machine=per_machine)
        sent = max(sum(each.bytes for each in traffic(one, layer_shape(config))) for one in plans)
        lines.append(
            f"  window: K/V of the last {settings.window_beside} tokens: a rank sends at most {in_bytes(sent)}"
        )
    if settings.linear_beside:
        # Per head a number that tells whether a document begins, and keys x values with a column for the denominator.
        sizes = {
            "transition_size": model.num_heads,
            "state_size": model.num_heads * model.head_size * (model.head_size + 1),
        }
        sent = max(stack.passed(config.attention.make_layout(cp), rank=rank, **sizes) for rank in range(cp))
        lines.append(
            "  K/V once more, in float32 at least: what is selected is taken off linear attention to everything"
        )
        lines.append(f"  states of linear attention: a rank sends at most {in_bytes(sent)} ({stack.passing.name})")
    return lines


def _moves_words(config: Config) -> str:
    attention = config.attention
    words = f"attention.kv_moves={attention.kv_moves}"
    return words if attention.moves == attention.kv_moves else f"{words}, attention.gather_heads set"


def table(plans: Sequence[Plan], shape: Shape) -> list[str]:
    """Return each rank's work as a share of the mean, in all and by hop, and what it sends per layer and row.

    `of hop h`: this rank's pairs at that hop over the mean of all ranks' pairs per hop: where ranks of a column differ,
    the others wait for the largest.
    """
    work = balance_of(plans).pairs
    mean = sum(map(sum, work)) / len(work) or 1.0
    hops = len(work[0])
    shown = min(hops, MANY_HOPS)
    header = "rank     work" + "".join(f"{f'hop {hop}':>8}" for hop in range(shown))
    lines = [header + ("   ..." if hops > shown else "") + "   MB sent forward   backward"]
    for each, pairs in list(zip(plans, work, strict=True))[:MANY_RANKS]:
        forward, backward = traffic(each, shape)
        row = "".join(f"{count * hops / mean:8.2f}" for count in pairs[:shown])
        sent = f"{forward.bytes / 1e6:18.2f} {backward.bytes / 1e6:10.2f}"
        lines.append(f"{each.rank:4d} {sum(pairs) / mean:8.2f}{row}{'   ...' if hops > shown else ''}{sent}")
    if len(plans) > MANY_RANKS:
        lines.append(f"... and {len(plans) - MANY_RANKS} more ranks")
    lines.append("work: visible pairs over the mean of all ranks; hop h: over the mean of all ranks and hops")
    return lines


def _plans(config: Config, mask: Mask | HeadMasks, *, degrees: Degrees, per_machine: int) -> list[Plan]:
    schedule = config.attention.make_schedule(degrees.cp, **heads(config), per_machine=per_machine)
    layout, total = config.attention.make_layout(degrees.cp), config.data.seq_len
    return [plan.__wrapped__(layout, (mask,), schedule, rank=rank, total=total) for rank in range(degrees.cp)]


if __name__ == "__main__":
    sys.exit(main())
