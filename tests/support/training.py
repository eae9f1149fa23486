"""Run the real training loop on pooled gloo ranks, and read back what it logged."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from longctx.config import load_config
from longctx.setup import check_world
from longctx.train import train

TINY = (
    "experiment=smoke",
    "data=txt",
    "data.seq_len=96",
    "data.held_out=0.2",
    "train.global_batch=4",
    "train.steps=20",
    "train.eval_samples=3",
    "optim.lr=3e-3",
    "checkpoint.every=0",
    "logger.progress=off",
    "logger.peak_flops=1e12",
)


def write_corpus(folder: Path) -> Path:
    """Write documents of very different lengths, some of one byte."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(3)
    for index, length in enumerate([400, 1, 37, 900, 2, 150, 61, 333, 5, 1200, 80, 222]):
        letters = torch.randint(97, 105, (length,), generator=generator)
        (folder / f"{index:02d}.txt").write_text("".join(map(chr, letters.tolist())))
    return folder


def run_training(rank: int, world_size: int, group: object, overrides: Sequence[str]) -> None:
    """Train on a pooled rank."""
    config = load_config([*TINY, *overrides])
    degrees = check_world(config, world_size=world_size, per_machine=world_size)
    train(config, degrees=degrees, per_machine=world_size, device=torch.device("cpu"), overrides=overrides)


def records(run_dir: Path) -> list[dict[str, float]]:
    """Return metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    """Return the training loss of every step, in order, each step once."""
    rows = [row for row in records(run_dir) if "loss" in row]
    steps = [int(row["step"]) for row in rows]
    assert steps == list(range(1, len(steps) + 1)), steps
    return [row["loss"] for row in rows]


def held_out_losses(run_dir: Path) -> list[float]:
    """Return the held-out losses in order."""
    return [row["held_out_loss"] for row in records(run_dir) if "held_out_loss" in row]
