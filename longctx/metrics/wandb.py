"""Send scalars to Weights & Biases, offline or online, with a run id that survives a resume."""

import importlib
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from longctx.metrics.config import WandbConfig

# wandb's own 90 s would hold up every rank of the run at start; its upload at the end has no limit at all.
INIT_SECONDS = 20.0
FINISH_SECONDS = 60.0


def new_run_id() -> str:
    """Return an id for a new run, in wandb's own form. The random states of the training are not touched."""
    return secrets.token_hex(4)


class WandbSink:
    """One wandb run, with its files below `directory`/wandb.

    A run that is resumed passes the `run_id` of before. Online, its points then go on in the same chart. Offline, there
    is one folder per start, which `wandb sync` joins.
    """

    def __init__(
        self,
        config: WandbConfig,
        *,
        directory: Path,
        run_id: str,
        resumed: bool,
        resolved_config: Mapping[str, Any],
        report: Callable[[str], None],
    ) -> None:
        """Start the run.

        Raise ValueError, with what to do about it, if the package is missing, or if mode "online" has no login or no
        network. A resumed run whose login worked before does not fail for want of a network: it goes on offline.
        """
        assert config.mode in ("offline", "online"), config.mode
        try:
            self._wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise ValueError(
                f"logger.wandb.mode={config.mode} needs the package wandb ({error}): `pip install 'longctx[wandb]'`, "
                'or set logger.wandb.mode="off"'
            ) from error
        self._config = config
        self._directory = directory
        self._run_id = run_id
        self._resolved_config = dict(resolved_config)
        try:
            self._run = self._start(mode=config.mode)
        except Exception as error:
            problem = _explain(error, mode=config.mode)
            # The service of a failed start goes on trying, and holds the run id: it has to go before another start.
            self._wandb.teardown()
            if config.mode != "online" or not resumed or _no_login(error):
                raise ValueError(problem) from error
            report(
                f"warning: {problem}. The run goes on with logger.wandb.mode=offline under the same id {run_id}: join "
                "the two later with `wandb sync`"
            )
            try:
                self._run = self._start(mode="offline")
            except Exception as second:
                raise ValueError(_explain(second, mode="offline")) from second

    def _start(self, *, mode: str) -> Any:
        wanted: dict[str, Any] = {
            "console": "off",  # what the run prints stays its own: no capture of stdout
            "silent": True,
            "x_disable_stats": True,
            "init_timeout": INIT_SECONDS,
            "finish_timeout": FINISH_SECONDS,
        }
        known = self._wandb.Settings.model_fields  # older releases lack some of these, and refuse an unknown one
        settings = self._wandb.Settings(**{key: value for key, value in wanted.items() if key in known})
        # Only a silent wandb asks no question: on a terminal without a login, init() alone would wait for an answer for
        # ever, and all other ranks with it.
        self._wandb.setup(settings)
        return self._wandb.init(
            mode=mode,
            dir=str(self._directory),
            id=self._run_id,
            resume="allow",
            project=self._config.project,
            name=self._config.name or self._directory.name,
            entity=self._config.entity,
            tags=list(self._config.tags),
            config=self._resolved_config,
            settings=settings,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one point per metric. wandb drops a step lower than the last one it has, as after a resume."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Wait for the upload, for `FINISH_SECONDS` at most, and end the run."""
        self._run.finish()


def _explain(error: Exception, *, mode: str) -> str:
    if mode == "online" and _no_login(error):
        return (
            "logger.wandb.mode=online needs a login, but wandb has no valid API key: run `wandb login` once on this "
            "machine, or set logger.wandb.mode=offline and upload later with `wandb sync`"
        )
    reason = " ".join(str(error).split())  # wandb's own messages have several lines
    alternatives = "offline (no network; upload later with `wandb sync`) or off" if mode == "online" else "off"
    return (
        f"logger.wandb.mode={mode}: wandb did not start ({type(error).__name__}: {reason}); other modes: {alternatives}"
    )


def _no_login(error: Exception) -> bool:
    text = str(error).lower()
    return any(words in text for words in ("api key", "wandb login", "not logged in", "permission denied", "401"))
