"""Random generators' states of every rank, as part of a checkpoint."""

from __future__ import annotations

import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from longctx.checkpoint.integrity import stored_keys

KEY = "rng"  # where rng_state() goes in the state dict: tensors[KEY] = rng_state(rank)


def rng_state(rank: int) -> dict[str, bytes]:
    """Capture this rank's torch (CPU, and the current CUDA device's), numpy and python generators as `rank<rank>`."""
    state: dict[str, Any] = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002 - the global one, which libraries use
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes()
    return {f"rank{rank}": pickle.dumps(state)}


def restore_rng(path: Path, *, rank: int, world_size: int, seed: int, step: int, report: Callable[[str], None]) -> None:
    """Set this rank's generators as they were when a checkpoint was saved.

    A rank (or a CUDA device) that the checkpoint knows nothing of, because it was written by fewer ranks or without
    CUDA, gets a seed that depends on (seed, step, rank) only. Rank 0 reports that. Not collective.
    """
    stored = stored_keys(path)
    absent = [other for other in range(world_size) if f"{KEY}.rank{other}" not in stored]
    if absent and rank == 0:
        ranks = f"rank {absent[0]}" if len(absent) == 1 else f"ranks {absent[0]}-{absent[-1]}"
        report(f"checkpoint {path.name} has no random state for {ranks}: seeded from seed, step and rank")
    reseed(seed=seed, step=step, rank=rank)
    if rank in absent:
        return
    tensors: dict[str, Any] = {KEY: {f"rank{rank}": b""}}
    with warnings.catch_warnings():
        # Every rank reads a key of its own; DCP warns that it takes this for a run of one process.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(tensors, storage_reader=FileSystemReader(path), no_dist=True)
    state = pickle.loads(tensors[KEY][f"rank{rank}"])
    torch.set_rng_state(torch.frombuffer(bytearray(state["torch"]), dtype=torch.uint8))
    np.random.set_state(state["numpy"])  # noqa: NPY002
    random.setstate(state["python"])
    if torch.cuda.is_available():
        if "cuda" in state:
            torch.cuda.set_rng_state(torch.frombuffer(bytearray(state["cuda"]), dtype=torch.uint8))
        elif rank == 0:
            report(f"checkpoint {path.name} has no CUDA random state: seeded from seed, step and rank")


def reseed(*, seed: int, step: int, rank: int) -> None:
    """Seed all generators from (seed, step, rank), differently for every triple."""
    words = np.random.SeedSequence([seed, step, rank]).generate_state(4, dtype=np.uint32)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))  # the CUDA generators too
    np.random.seed(int(words[2]))  # noqa: NPY002
    random.seed(int(words[3]))
