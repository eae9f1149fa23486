"""What every test gets: one thread per process, `gpu` tests skipped without a GPU, a pool of gloo ranks."""

import os

# Before torch is imported. Ranks share two cores, and results must not depend on how many cores a machine has.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Iterator

import pytest
import torch

from tests.support.distributed import GlooPool

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def gloo_pool() -> Iterator[GlooPool]:
    """Give the session's pool of gloo ranks: `gloo_pool.run(fn, world_size, *args)`."""
    with GlooPool() as pool:
        yield pool
