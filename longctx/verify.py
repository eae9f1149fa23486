"""`longctx verify`: prove on the user's own configuration, at small size, that context parallelism changes nothing."""

import dataclasses
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import TextIO

import torch
import torch.distributed as dist

from longctx.cli import VERIFY_HELP, take_number
from longctx.config import Config, load_config
from longctx.mixers.pattern import describe_layers
from longctx.parallel.mesh import (
    Degrees,
    Launch,
    build_far_group,
    build_mesh,
    init_distributed,
    read_launch,
)
from longctx.parallel.ranks import Ranks
from longctx.parallel.transport import ProcessGroupTransport
from longctx.planner import choose, label
from longctx.setup import check_blocks, check_kernel, check_moves, check_world, layer_shape, speeds
from longctx.simulated import simulated_degrees
from longctx.verification.attend import kernel_name
from longctx.verification.bench import Bench, RealRanks, SimulatedRanks
from longctx.verification.check_attention import check_dtype, check_exact
from longctx.verification.check_data import check_data
from longctx.verification.check_engine import check_engine
from longctx.verification.check_leaks import check_leaks
from longctx.verification.check_linear import check_linear, check_linear_dtype
from longctx.verification.check_linear_leaks import check_linear_leaks
from longctx.verification.check_model import check_model, check_model_leaks
from longctx.verification.check_moves import check_convolution, check_relayouts
from longctx.verification.check_plan import check_plan
from longctx.verification.check_sparse import check_sparse
from longctx.verification.check_sparse_dtype import check_sparse_dtype
from longctx.verification.check_sparse_leaks import check_sparse_leaks
from longctx.verification.check_traffic import check_traffic
from longctx.verification.recur import kernel_of, shape_of
from longctx.verification.report import WIDTH, Finding, Table, everywhere, raised
from longctx.verification.small import Small, shrink, typical_documents
from longctx.verification.sparse_layer import settings_of, sparse_kernel
from longctx.verification.truth_sparse import causal

PATIENCE = timedelta(minutes=5)
NO_MESSAGE = "no message came"
Group = tuple[str, Callable[[], list[Finding]]]


def main(argv: Sequence[str] | None = None) -> int:
    """Verify with these hydra overrides; return 0 if all passed, 1 if not, 2 for a configuration that cannot run."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(VERIFY_HELP, end="")
        return 0
    launch = read_launch()
    try:
        overrides, tokens = take_number(arguments, "--tokens", what="tokens per rank")
        config = load_config(overrides)
        if launch.launched:
            return _on_real_ranks(config, launch, tokens)
        return _on_simulated_ranks(config, tokens)
    except KeyboardInterrupt:
        return 130
    except ValueError as error:
        where = f" on rank {launch.rank}" if launch.rank > 0 else ""
        if launch.rank > 0:
            time.sleep(10)  # rank 0 nearly always has the same to say, and the launcher then ends all
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
        return 2


def check_groups(small: Small, bench: Bench) -> list[Group]:
    """Return all checks of a bench, in the order of the table, with what to call each where it cannot be made."""

    groups: list[Group] = [("layout, labels, mask", lambda: check_data(small, bench))]
    for kind in small.layers.used:
        told = (
            [] if small.attention.layers is None else [(f"layers of kind {kind}", partial(_told, small, bench, kind))]
        )
        groups += [*told, *_groups_of_kind(small, bench, kind)]
    if len(set(small.layouts)) > 1:
        groups.append(("relayout", lambda: check_relayouts(small, bench)))
    groups.append(("decoder", lambda: check_model(small, bench)))
    groups.append(("decoder: leak probes", lambda: [check_model_leaks(small, bench)]))
    return groups


def _groups_of_kind(small: Small, bench: Bench, kind: str) -> list[Group]:
    """Return the checks of layers of one kind."""
    if kind in small.layers.linear_kinds:
        return _linear_groups(small, bench, kind)
    if kind in small.layers.sparse_kinds:
        return _sparse_groups(small, bench, kind)
    return _softmax_groups(small.of_kind(kind), bench)


def _softmax_groups(small: Small, bench: Bench) -> list[Group]:
    """Return the checks of softmax attention under the mask of `small`."""

    def in_dtype() -> list[Finding]:
        findings, outcome = check_dtype(small, bench)
        return findings + check_traffic(small, bench, outcome)

    def leaks(dtype: torch.dtype, head_dim: int) -> Callable[[], list[Finding]]:
        return lambda: check_leaks(small, bench, dtype=dtype, head_dim=head_dim)

    groups: list[Group] = [
        ("plan", lambda: check_plan(small)),
        ("attention in float64", lambda: check_exact(small, bench)),
        ("leak probes in float64", leaks(torch.float64, small.model.head_size)),
        ("attention as configured", in_dtype),
    ]
    if small.dtype != torch.float64:
        groups.append(("leak probes as configured", leaks(small.dtype, small.source.model.head_size)))
    return groups


def _linear_groups(small: Small, bench: Bench, kind: str) -> list[Group]:
    """Return the checks of layers of a linear kind."""
    groups: list[Group] = [
        (f"{kind}: in float64", lambda: check_linear(small, bench, kind)),
        (f"{kind}: leak probes", lambda: check_linear_leaks(small, bench, kind)),
        (f"{kind}: as configured", lambda: check_linear_dtype(small, bench, kind)),
    ]
    if shape_of(small, kind, configured=False).taps:
        groups.append((f"{kind}: convolution", lambda: check_convolution(small, bench, kind)))
    return groups


def _sparse_groups(small: Small, bench: Bench, kind: str) -> list[Group]:
    """Return the checks of layers of a sparse kind."""
    return [
        (f"{kind}: in float64", lambda: check_sparse(small, bench, kind)),
        (f"{kind}: leak probes", lambda: check_sparse_leaks(small, bench, kind)),
        (f"{kind}: as configured", lambda: check_sparse_dtype(small, bench, kind)),
    ]


def _told(small: Small, bench: Bench, kind: str) -> list[Finding]:
    """Say which kernel computes a kind as it is configured."""
    if kind in small.layers.linear_kinds:
        kernel = kernel_of(shape_of(small, kind, configured=True), device=bench.device, dtype=small.dtype)
    else:
        head_dim = small.source.model.head_size
        if kind in small.layers.sparse_kinds:
            kernel = sparse_kernel(small, kind, device=bench.device, dtype=small.dtype, head_dim=head_dim)
        else:
            kernel = kernel_name(small.of_kind(kind), device=bench.device, dtype=small.dtype, head_dim=head_dim)
    kinds = small.source.layers.kinds
    measured = f"{kinds.count(kind)} of {len(kinds)} layers"
    return [Finding(name=f"layers of kind {kind}", measured=measured, passed=None, kernel=kernel)]


def _on_simulated_ranks(config: Config, tokens: int | None) -> int:
    degrees, per_machine = simulated_degrees(config)
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    check_kernel(config, device_type=device.type)
    check_blocks(config, cp=degrees.cp)
    check_moves(config, cp=degrees.cp, per_machine=per_machine)
    table = Table(sys.stdout)
    config = _without_auto(config, degrees=degrees, per_machine=per_machine, device=device, say=table.say)
    small = shrink(config, cp=degrees.cp, per_machine=per_machine, tokens_per_rank=tokens)
    given = "parallel.cp" if config.parallel.cp else "parallel.cp is null"
    ranks = f"{degrees.cp} simulated in this process ({given}), {per_machine} to a machine, on {device.type}"
    _announce(table, small, ranks)
    begin = time.monotonic()
    for name, check in check_groups(small, SimulatedRanks(degrees.cp, device)):
        findings = _attempt(name, check)
        for finding in findings:
            table.add(finding)
        if any(finding.why.startswith(NO_MESSAGE) for finding in findings):
            table.say("the other checks are not made: each would wait as long for messages that do not come")
            break
    return _conclude(table, begin)


def _on_real_ranks(config: Config, launch: Launch, tokens: int | None) -> int:
    degrees = check_world(config, world_size=launch.world_size, per_machine=launch.local_world_size)
    device = init_distributed(launch)
    try:
        return verify_ranks(
            config, degrees=degrees, per_machine=launch.local_world_size, device=device, tokens=tokens, out=sys.stdout
        )
    finally:
        dist.destroy_process_group()


def verify_ranks(
    config: Config, *, degrees: Degrees, per_machine: int, device: torch.device, tokens: int | None, out: TextIO
) -> int:
    """Verify on the ranks of the default process group (collective); return the exit status, the same on all."""
    with Ranks() as ranks:
        ranks.check_equal(config.digest(), what="the configuration")
        check_kernel(config, device_type=device.type)
        table = Table(out if ranks.first else None)
        config = ranks.from_first(
            lambda: _without_auto(config, degrees=degrees, per_machine=per_machine, device=device, say=table.say)
        )
        small = shrink(config, cp=degrees.cp, per_machine=per_machine, tokens_per_rank=tokens)
        mesh = build_mesh(degrees, device_type=device.type)
        transport = ProcessGroupTransport(
            mesh.get_group("cp"), far_group=build_far_group(mesh, config.attention.schedule)
        )
        groups_of_ranks = mesh.mesh.reshape(-1, degrees.cp).tolist()
        gatherers = [dist.new_group(each, backend="gloo", timeout=PATIENCE) for each in groups_of_ranks]
        bench = RealRanks(transport, gatherers[ranks.rank // degrees.cp], device)
        _announce(table, small, f"{ranks.size} real ranks, {degrees}, on {device.type}")
        groups = check_groups(small, bench)
        groups.append(("engine step", lambda: check_engine(small, transport, degrees=degrees, device=device)))
        begin = time.monotonic()
        for name, check in groups:
            for finding in everywhere(ranks.gather(_attempt(name, check))):
                table.add(finding)
        return _conclude(table, begin)


def _attempt(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """Return the findings of some checks; a check that raises has failed, whatever it raised."""
    try:
        return check()
    except Exception as error:
        return [raised(name, error)]


def _without_auto(
    config: Config, *, degrees: Degrees, per_machine: int, device: torch.device, say: Callable[[str], None]
) -> Config:
    """Name what `auto` leaves open, by prediction for documents like those of the small corpus."""
    if "auto" not in (config.attention.layout, config.attention.schedule):
        return config
    kind = "full" if "full" in config.layers.used else "window"
    choice = choose(
        config.attention,
        [config.attention.mask(typical_documents(config.data.seq_len), kind=kind)],
        total=config.data.seq_len,
        cp=degrees.cp,
        shape=layer_shape(config),
        speeds=speeds(config, device=device),
        per_machine=per_machine,
    )
    text = (
        f"auto: {label(choice.config)} is verified. Training chooses for its own documents and prints what; to verify "
        "another choice, name attention.layout and attention.schedule"
    )
    say(textwrap.fill(text, WIDTH, subsequent_indent=" " * 6))
    return dataclasses.replace(config, attention=choice.config)


def _announce(table: Table, small: Small, ranks: str) -> None:
    source, model, attention = small.source.model, small.model, small.attention
    sample = small.samples[0]
    lengths = [b - a for a, b in zip(sample.cu_seqlens, sample.cu_seqlens[1:], strict=False)]
    words = ["causal" if attention.prefix is None else f"prefix {attention.prefix}"]
    words += ["documents"] if attention.documents else []
    for key in ("window", "head_windows", "sinks", "chunk"):
        words += [f"{key} {getattr(attention, key)}"] if getattr(attention, key) else []
    factors = (
        [f"{small.layout.describe()} x {small.schedule.name} x ({', '.join(words)})"] if small.layers.softmax else []
    )
    if small.layers.linear:
        factors.append(f"linear layers: {small.states.describe()} x {small.passing.name}")
    if small.layers.sparse:
        moves = f"{small.layout.describe()} x {small.schedule.name} x K/V by {attention.kv_moves}"
        factors.append(f"sparse layers: {moves} x ({', '.join(small.layers.sparse_kinds)})")
    title = f"longctx verify: {'; '.join(factors)}"
    table.say(textwrap.fill(title, WIDTH, subsequent_indent=" " * 16))
    table.note("ranks", ranks)
    held = f"{small.total // small.cp} per rank, {small.total} in all"
    table.note("tokens", f"{held}; documents of {', '.join(map(str, sorted(lengths)))}")
    table.note(
        "model",
        f"{model.num_layers} layer(s), dim {model.dim}, {model.num_heads} heads of {model.head_size}, "
        f"{model.num_kv_heads} KV heads (configured: {source.num_layers}, {source.dim}, heads of {source.head_size})",
    )
    if attention.layers is not None:
        configured = describe_layers(small.source.layers.kinds)
        table.note("layers", f"{describe_layers(small.layers.kinds)} (configured: {configured})")
    for kind in small.layers.sparse_kinds:
        if not causal(settings_of(small, kind)):
            text = f"mixers.{kind}.selection=expert looks at later tokens: its leak probes look at documents only"
            table.note("note", text)
    for text in small.scaled:
        table.note("scaled", text)
    table.header()


def _conclude(table: Table, begin: float) -> int:
    seconds = time.monotonic() - begin
    told = f"{table.failed} FAILED, " if table.failed else "all "
    table.say(f"{told}{table.passed} checks passed, {seconds:.1f} s")
    return 1 if table.failed else 0


if __name__ == "__main__":
    sys.exit(main())
