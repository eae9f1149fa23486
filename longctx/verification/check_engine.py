"""The engine's own step on real ranks, against one rank: FSDP2's sums over the mesh, the label count, the norm."""

import dataclasses
import math

import torch

from longctx.batch import shard_samples
from longctx.engines.build import build_engine
from longctx.model import Decoder, initial_weight
from longctx.parallel.mesh import Degrees
from longctx.parallel.transport import Transport
from longctx.verification.check_attention import EXACT
from longctx.verification.check_data import stack_of
from longctx.verification.check_model import dense_loss_and_grads
from longctx.verification.report import Finding, at_most
from longctx.verification.small import Small


def check_engine(small: Small, transport: Transport, *, degrees: Degrees, device: torch.device) -> list[Finding]:
    """Take one step in float64 with the same samples on every dp rank, which changes no mean (collective)."""
    config = small.source
    stack = stack_of(small, transport)
    engine = build_engine(
        dataclasses.replace(config.engine, dtype="float64"),
        optim=config.optim,
        stack=stack,
        degrees=degrees,
        device=device,
        seed=config.train.seed,
    )
    # A micro-batch for each sample: gradients are accumulated, as in training.
    batches = [shard_samples([sample], stack=stack, device=device) for sample in small.samples]
    step = engine.train_step(batches, lr=config.optim.lr)
    model = Decoder(small.model, small.layers).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = initial_weight(name, parameter.shape, config=small.model, seed=config.train.seed)
            parameter.copy_(weight)
    loss, _, grads = dense_loss_and_grads(small, model)  # what layers add is minimised, and not told
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
    labels = degrees.dp * sum(int((each >= 0).sum()) for each in small.labels)
    why = f"engine.parameters={config.engine.parameters} over {degrees}: is a sum over ranks a mean, or missing?"
    return [
        at_most(
            "engine step: loss", abs(step.loss - loss) / loss, EXACT, why=f"{step.loss!r}, must be {loss!r}; {why}"
        ),
        at_most(
            "engine step: gradient norm",
            abs(step.grad_norm - norm) / norm,
            EXACT,
            why=f"{step.grad_norm!r}, must be {norm!r}; {why}",
        ),
        Finding(
            name="engine step: labels",
            measured=f"{step.num_labels:,}",
            bound=f"{labels:,}",
            passed=step.num_labels == labels,
            why=why,
        ),
    ]
