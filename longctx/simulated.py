"""The mesh of a world that is not there: what `verify` and `plan` work on without torchrun."""

from longctx.config import Config
from longctx.parallel.mesh import Degrees, resolve_degrees
from longctx.setup import check_world

SIMULATED = (4, 2, 3)  # cp where the config leaves it open: the first that fits


def simulated_degrees(config: Config, *, per_machine: int | None = None) -> tuple[Degrees, int]:
    """Return the mesh of a world that is as large as the config asks for, and how many ranks share a machine.

    Args:
        per_machine: ranks per machine; None = two machines, for schedules that care, where cp can be halved.

    Raises:
        ValueError: a configuration that cannot run.
    """
    parallel, attention = config.parallel, config.attention
    problem: ValueError | None = None
    for cp in [parallel.cp] if parallel.cp else SIMULATED if attention.distributed else (1,):
        machine = per_machine or (cp // 2 if cp % 2 == 0 and cp > 2 else cp)
        world = (parallel.dp_replicate or 1) * parallel.dp_shard * cp
        try:
            degrees = resolve_degrees(parallel, world_size=world, distributed_schedule=attention.distributed)
            if parallel.cp is None and attention.distributed:
                degrees = Degrees(degrees.dp_replicate, degrees.dp_shard, cp)
            check_world(config, world_size=world, per_machine=machine)
            return degrees, machine
        except ValueError as error:
            problem = problem or error
    assert problem is not None
    raise problem
