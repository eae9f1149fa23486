"""A process group that attention was computed over ends when it is destroyed: nothing of the library's holds it.

Gloo's threads live as long as their group, and one that outlives the interpreter's end may abort the process.
"""

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longctx.attention import context_parallel_attention
from longctx.sparse_ranks import sparse_place

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")


def gloo_threads() -> int:
    names = []
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has just ended
            names.append((thread / "comm").read_text())
    return sum("gloo" in name for name in names)


def soon(holds) -> bool:
    """Threads get their names, and leave /proc, a moment after they begin and end."""
    end = time.monotonic() + 10
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


@pytest.mark.parametrize("use", ["dense", "sparse"])
def test_a_destroyed_group_has_no_threads(use):
    already = gloo_threads()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        q = torch.randn(1, 16, 2, 8, requires_grad=True)
        if use == "dense":
            context_parallel_attention(q, q, q, layout="contiguous", group=group).sum().backward()
        else:
            sparse_place(layout="contiguous", group=group, total=16, heads=2, device=q.device)
        assert soon(lambda: gloo_threads() > already)
        del group
    finally:
        dist.destroy_process_group()
    assert soon(lambda: gloo_threads() == already)


SCRIPT = """
import time
from pathlib import Path
import torch
import torch.distributed as dist
from longctx.attention import context_parallel_attention

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
q = torch.randn(1, 16, 2, 8, requires_grad=True)
torch.optim.AdamW([q])
context_parallel_attention(q, q, q, layout="contiguous", group=dist.group.WORLD).sum().backward()
dist.destroy_process_group()
time.sleep(1)
print(sum("gloo" in (thread / "comm").read_text() for thread in Path("/proc/self/task").iterdir()))
"""


def test_nor_does_torch_hold_one_in_a_program_of_its_own():
    """`torch.optim` imports what holds the group that is there, unless it was imported before."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "0\n", done.stdout
