"""Stage a state dict in host memory and write it with torch DCP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from longctx.checkpoint.failure import portable


def stage(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a state dict in host memory that shares nothing with the original, for CPU tensors too."""
    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
    )
    try:
        staged = stager.stage(tensors)
    finally:
        stager.close()
    assert isinstance(staged, dict)
    return staged


def write(tensors: dict[str, Any], *, directory: Path, group: dist.ProcessGroup) -> None:
    """Write every rank's part and then the index `.metadata`, synced to disk (collective over `group`).

    Raises:
        CheckpointException: any rank failed; raised on every rank, after all of them have stopped writing. (It derives
            from BaseException.)
        RuntimeError: the ranks lost touch with each other.
    """
    save(tensors, storage_writer=_Writer(directory), process_group=group)


class _Writer(FileSystemWriter):
    """DCP's file writer; its errors can be sent to other ranks and keep the system's words."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, sync_files=True, overwrite=False)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items into its file."""
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            # DCP sends the exception object itself; one that can't be pickled would leave the other ranks waiting.
            raise portable(error, file=f"rank {self.rank}'s file") from None
