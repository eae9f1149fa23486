"""Write scalars for TensorBoard."""

from collections.abc import Mapping
from pathlib import Path


class TensorBoardSink:
    """Write event files below `directory`. Points of steps after `start_step` from before a resume are hidden."""

    def __init__(self, directory: Path, *, start_step: int) -> None:
        """Open the event file. Raise ValueError if the package is missing or the directory cannot be written."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                f"logger.tensorboard=true needs the package tensorboard ({error}): `pip install tensorboard`, or set "
                "logger.tensorboard=false"
            ) from error
        try:
            self._writer = SummaryWriter(str(directory), purge_step=start_step + 1, flush_secs=10)
        except OSError as error:
            raise ValueError(f"logger.tensorboard=true, but {directory} cannot be written: {error}") from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one point per metric."""
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, global_step=step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()
