"""Entry of one rank's process: run by path (see conftest.py), so that nothing under tests/ has to be importable."""

import importlib.util
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

RANK: dict  # given by the parent: file, function, rank, world_size, init, arguments, results


def _main(*, file, function, rank, world_size, init, arguments, results):
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{init}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
        )
        spec = importlib.util.spec_from_file_location("rank_module", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        value = getattr(module, function)(rank, world_size, *arguments)
        results.send((True, value))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.send((False, traceback.format_exc()))


_main(**RANK)  # noqa: F821
