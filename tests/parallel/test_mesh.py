"""Sizes of the mesh: what is filled in, and what is refused."""

import pytest
import torch.distributed as dist

from longctx.parallel.mesh import (
    AXES,
    Degrees,
    ParallelConfig,
    build_mesh,
    build_parameter_mesh,
    read_launch,
    resolve_degrees,
)


def resolve(world_size: int, *, distributed: bool = True, **sizes: int | None) -> Degrees:
    return resolve_degrees(ParallelConfig(**sizes), world_size=world_size, distributed_schedule=distributed)


def test_cp_fills_the_world_unless_attention_is_local():
    assert resolve(4) == Degrees(1, 1, 4)
    assert resolve(4, distributed=False) == Degrees(4, 1, 1)
    assert resolve(1) == Degrees(1, 1, 1)


def test_replicas_fill_what_is_left():
    assert resolve(8, cp=2) == Degrees(4, 1, 2)
    assert resolve(8, cp=2, dp_shard=2) == Degrees(2, 2, 2)
    assert resolve(8, dp_replicate=2) == Degrees(2, 1, 4)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"cp": 8}, r"parallel.cp=8 is larger than the world of 4 rank\(s\); launch more ranks \(NPROC=8"),
        ({"cp": 3}, "1 x 1 x 3 must equal the world size 4"),
        ({"cp": 2, "dp_replicate": 4}, "4 x 1 x 2 must equal the world size 4"),
        ({"cp": 0}, "parallel.cp must be >= 1 or null; given 0"),
        ({"dp_shard": -1}, "parallel.dp_shard must be >= 1 or null; given -1"),
        ({"dp_replicate": 8}, "8 x 1 x 1 must equal the world size 4"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        resolve(4, **sizes)


def test_local_attention_refuses_a_cp_above_one():
    with pytest.raises(ValueError, match=r"parallel.cp=2. Choose attention=ring\|striped\|zigzag"):
        resolve(2, distributed=False, cp=2)


def test_cp_is_the_innermost_axis():
    degrees = Degrees(2, 1, 2)
    assert [degrees.coordinates(rank) for rank in range(4)] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_process_without_a_launcher_is_a_world_of_one(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert read_launch().world_size == 1 and not read_launch().launched


def meshes(rank: int, world_size: int, group):
    mesh = build_mesh(Degrees(2, 1, 2), device_type="cpu")
    parameters = build_parameter_mesh(2, device_type="cpu")
    return (
        mesh.mesh_dim_names,
        dist.get_process_group_ranks(mesh.get_group("cp")),
        dist.get_process_group_ranks(parameters.get_group("shard")),
        dist.get_process_group_ranks(parameters.get_group("replicate")),
        build_parameter_mesh(1, device_type="cpu").ndim,
    )


def test_parameter_shards_are_the_ranks_of_a_replica(gloo_pool):
    for rank, (names, cp, shard, replicate, plain) in enumerate(gloo_pool.run(meshes, 4)):
        assert names == AXES
        assert cp == shard == ([0, 1] if rank < 2 else [2, 3])
        assert replicate == ([0, 2] if rank % 2 == 0 else [1, 3])
        assert plain == 1
