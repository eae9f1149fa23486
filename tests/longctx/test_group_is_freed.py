"""A process group that attention was computed over ends when it is destroyed: nothing of the library's holds it.

Gloo's threads live as long as their group, and one that outlives the interpreter's end may abort the process.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longctx.attention import context_parallel_attention
from longctx.sparse_ranks import sparse_place

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")


def gloo_threads() -> int:
    return sum("gloo" in (thread / "comm").read_text() for thread in Path("/proc/self/task").iterdir())


@pytest.mark.parametrize("use", ["dense", "sparse"])
def test_a_destroyed_group_has_no_threads(use):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        q = torch.randn(1, 16, 2, 8, requires_grad=True)
        if use == "dense":
            context_parallel_attention(q, q, q, layout="contiguous", group=group).sum().backward()
        else:
            sparse_place(layout="contiguous", group=group, total=16, heads=2, device=q.device)
        before = gloo_threads()
        assert before
        dist.destroy_process_group(group)
        del group
        assert gloo_threads() < before
    finally:
        dist.destroy_process_group()
    assert gloo_threads() == 0
