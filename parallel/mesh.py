"""Degrees of parallelism and the named mesh they span. The only module that reads the launcher's environment."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longctx.parallel.links import check_speeds

AXES = ("dp_replicate", "dp_shard", "cp")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the mesh axes; null means: what is left of the world.

    Attributes:
        dp_replicate: data-parallel replicas of the (sharded) parameters; null = the rest of the world.
        dp_shard: data-parallel ranks that also share the parameters (needs engine.parameters=shard).
        cp: context-parallel ranks: how many ranks share one sequence; null = all that is left if the attention schedule
            is distributed, 1 if it is local.
        local_gb_per_s, network_gb_per_s: GB/s that a rank sends inside its machine and to others; these and the next
            three are for predictions only, null = usual for the device (`links.py`).
        latency_us: microseconds that an exchange takes without any bytes.
        attention_tflops: TFLOP/s of one rank's attention on large tiles.
        call_us: microseconds that a tile costs on top of its arithmetic.
    """

    dp_replicate: int | None = None
    dp_shard: int = 1
    cp: int | None = None
    local_gb_per_s: float | None = None
    network_gb_per_s: float | None = None
    latency_us: float | None = None
    attention_tflops: float | None = None
    call_us: float | None = None

    def validate(self) -> None:
        """Refuse impossible speeds; sizes are checked when the world is known (`resolve_degrees`)."""
        check_speeds(self)


@dataclass(frozen=True)
class Degrees:
    """Resolved sizes of the mesh axes; their product is the world size."""

    dp_replicate: int
    dp_shard: int
    cp: int

    @property
    def dp(self) -> int:
        """Return how many different samples are worked on at once."""
        return self.dp_replicate * self.dp_shard

    def coordinates(self, rank: int) -> tuple[int, int]:
        """Return (dp_rank, cp_rank) of a global rank; cp is the innermost axis."""
        return rank // self.cp, rank % self.cp


def resolve_degrees(config: ParallelConfig, *, world_size: int, distributed_schedule: bool) -> Degrees:
    """Fill in what the config leaves open.

    Args:
        world_size: number of ranks launched.
        distributed_schedule: whether the attention schedule can share a sequence between ranks.

    Raises:
        ValueError: sizes below 1, a cp above the world, or sizes whose product is not the world size.
    """
    for name, size in (("dp_replicate", config.dp_replicate), ("dp_shard", config.dp_shard), ("cp", config.cp)):
        if size is not None and size < 1:
            raise ValueError(f"parallel.{name} must be >= 1 or null; given {size}")
    if config.cp is not None and config.cp > world_size:
        raise ValueError(
            f"parallel.cp={config.cp} is larger than the world of {world_size} rank(s); launch more ranks "
            f"(NPROC={config.cp} ./launch/train.sh ...) or lower parallel.cp"
        )
    if config.cp is not None and config.cp > 1 and not distributed_schedule:
        raise ValueError(
            f"attention.schedule=local keeps a sequence on one rank, so parallel.cp must be 1 or null; given "
            f"parallel.cp={config.cp}. Choose attention=ring|striped|zigzag to share a sequence between ranks"
        )
    cp = config.cp
    if cp is None:
        cp = world_size // ((config.dp_replicate or 1) * config.dp_shard) if distributed_schedule else 1
        cp = max(cp, 1)
    dp_replicate = config.dp_replicate or max(world_size // (cp * config.dp_shard), 1)
    degrees = Degrees(dp_replicate, config.dp_shard, cp)
    if degrees.dp * degrees.cp != world_size:
        raise ValueError(
            f"parallel.dp_replicate x parallel.dp_shard x parallel.cp = {degrees.dp_replicate} x {degrees.dp_shard} x "
            f"{degrees.cp} must equal the world size {world_size}; leave parallel.dp_replicate=null to fill the world"
        )
    return degrees


def build_mesh(degrees: Degrees, *, device_type: str) -> DeviceMesh:
    """Return the mesh with axes `dp_replicate, dp_shard, cp` over an initialised default process group."""
    return init_device_mesh(device_type, (degrees.dp_replicate, degrees.dp_shard, degrees.cp), mesh_dim_names=AXES)


def build_far_group(mesh: DeviceMesh, schedule_name: str) -> dist.ProcessGroup | None:
    """Return a second group of this rank's cp ranks, where one lets slow hops overlap with fast ones (collective).

    Only nccl runs the calls of a group one after the other, and only `double_ring` has two kinds of hops.
    """
    if schedule_name != "double_ring" or mesh.device_type != "cuda":
        return None
    mine = None
    for ranks in mesh.mesh.reshape(-1, mesh["cp"].size()).tolist():
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            mine = group
    return mine


def build_parameter_mesh(replicas: int, *, device_type: str) -> DeviceMesh:
    """Return the mesh that parameters live on: `replicas` copies, each shared evenly by the ranks next to each other.

    Axes `replicate, shard` in the same rank order as `build_mesh`, whose dp_shard and cp ranks are neighbours; 1-D
    where there is a single copy, which is what FSDP2 wants.
    """
    shards = dist.get_world_size() // replicas
    assert shards * replicas == dist.get_world_size(), replicas
    if replicas == 1:
        return init_device_mesh(device_type, (shards,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (replicas, shards), mesh_dim_names=("replicate", "shard"))


@dataclass(frozen=True)
class Launch:
    """What the launcher says about this process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launched: bool


def read_launch() -> Launch:
    """Read torchrun's variables; a process started without torchrun is a world of one."""
    if "RANK" not in os.environ:
        return Launch(0, 1, 0, 1, False)
    world_size = int(os.environ["WORLD_SIZE"])
    return Launch(
        rank=int(os.environ["RANK"]),
        world_size=world_size,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        launched=True,
    )


def init_distributed(launch: Launch) -> torch.device:
    """Start the default process group (nccl beside gloo where there are GPUs, else gloo); return this rank's device.

    Raises:
        ValueError: more ranks on this machine than GPUs.
    """
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        if launch.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"rank {launch.local_rank} of this machine has no GPU of its own: there are "
                f"{torch.cuda.device_count()}. Launch one rank per GPU (NPROC={torch.cuda.device_count()} "
                "./launch/train.sh ...), or hide the GPUs (CUDA_VISIBLE_DEVICES=) to train on CPU"
            )
        device, backend = torch.device("cuda", launch.local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    if launch.launched:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device
