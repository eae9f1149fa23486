"""Train the small model on the recall task, on this rank's tokens of every sequence: the curve of one run."""

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from _mqar_mixers import DISTILLED, set_mode
from _mqar_model import Model, make_place
from _mqar_task import Task
from torch import Tensor

from longctx.loss import IGNORED
from longctx.parallel.layout import Layout
from longctx.parallel.transport import Transport


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained but for the learning rate; the same for all mixers.

    Attributes:
        steps: length of the cosine schedule.
        every: steps between evaluations.
        sequences, test: of the training and the test set.
        enough: test accuracy at which a run stops.
        layout, passing: of tokens and of states over context-parallel ranks.
    """

    width: int = 64
    steps: int = 1500
    every: int = 100
    batch: int = 64
    sequences: int = 20_000
    test: int = 1_000
    weight_decay: float = 0.1
    enough: float = 0.99
    dtype: str = "float32"
    layout: str = "zigzag"
    passing: str = "ring"


def train(
    mixer: str, task: Task, recipe: Recipe, *, lr: float, seed: int, transport: Transport
) -> list[dict[str, Any]]:
    """Train until the test accuracy is enough or the steps are over (collective over the transport's ranks).

    Returns:
        one row per evaluation: step, training loss since the one before, test accuracy, seconds so far.
    """
    learner = Learner(mixer, task, recipe, lr=lr, seed=seed, transport=transport)
    train, test = (task.draw(n, seed=2 * seed + part) for part, n in enumerate((recipe.sequences, recipe.test)))
    order = torch.Generator().manual_seed(seed)
    rows, losses, curve, began = torch.empty(0, dtype=torch.int64), [], [], time.perf_counter()
    for step in range(1, recipe.steps + 1):
        if len(rows) < recipe.batch:
            rows = torch.randperm(recipe.sequences, generator=order)
        losses.append(learner.step(*(part[rows[: recipe.batch]] for part in train)))
        rows = rows[recipe.batch :]
        if step % recipe.every == 0 or step == recipe.steps:
            accuracy, seconds = learner.accuracy(*test), round(time.perf_counter() - began, 1)
            curve.append({"step": step, "loss": sum(losses) / len(losses), "accuracy": accuracy, "seconds": seconds})
            losses = []
            if accuracy >= recipe.enough:
                break
    return curve


class Learner:
    """One rank's model and optimizer. It is given whole sequences, of which it takes its own tokens."""

    def __init__(self, mixer: str, task: Task, recipe: Recipe, *, lr: float, seed: int, transport: Transport) -> None:
        self.layout, self.transport = Layout(recipe.layout, transport.size), transport  # type: ignore[arg-type]
        self.batch = recipe.batch
        self.losses: list[Tensor] = []
        self.place = make_place(
            mixer, transport, layout=self.layout, passing=recipe.passing, total=task.tokens, losses=self.losses
        )
        self.distilled = round(DISTILLED * recipe.steps)
        model = Model(mixer, vocabulary=task.vocabulary, width=recipe.width, seed=seed)
        self.model = model.to(getattr(torch, recipe.dtype))
        self.weights = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.weights, lr=lr, weight_decay=recipe.weight_decay)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, recipe.steps)

    def step(self, sequences: Tensor, labels: Tensor) -> float:
        """Take an optimizer step and return the mean loss over all labels."""
        set_mode(self.model.train(), "distill" if self.schedule.last_epoch < self.distilled else "sparse")
        count = int((labels != IGNORED).sum())
        logits, wanted = self._answers(sequences, labels)
        loss = F.cross_entropy(logits, wanted, reduction="sum") / count
        self.optimizer.zero_grad()
        (loss + sum(self.losses) / count).backward()  # what layers want besides is not told
        self.losses.clear()
        grads = [weight.grad for weight in self.weights if weight.grad is not None]
        summed = self._summed(torch.cat([loss.detach()[None], *(grad.flatten() for grad in grads)]))
        for grad, part in zip(grads, summed[1:].split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))
        self.optimizer.step()
        self.schedule.step()
        return summed[0].item()

    @torch.no_grad()
    def accuracy(self, sequences: Tensor, labels: Tensor) -> float:
        """Return the share of all labels that are guessed."""
        set_mode(self.model.eval(), "sparse")
        counts = torch.zeros(2, dtype=torch.float64)
        for rows, wanted in zip(sequences.split(self.batch), labels.split(self.batch), strict=True):
            logits, wanted = self._answers(rows, wanted)
            counts += torch.tensor([(logits.argmax(dim=-1) == wanted).sum(), len(wanted)])
        right, asked = self._summed(counts).tolist()
        return right / asked

    def _answers(self, sequences: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `[N, V]` and labels `[N]` of the queries among this rank's tokens."""
        labels = self._own(labels)
        asked = labels != IGNORED
        return self.model(self._own(sequences), asked=asked, place=self.place), labels[asked]

    def _own(self, x: Tensor) -> Tensor:
        return self.layout.shard(x, rank=self.transport.rank, dim=1)

    def _summed(self, x: Tensor) -> Tensor:
        if self.transport.size > 1:
            dist.all_reduce(x)
        return x
