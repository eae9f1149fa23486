"""Choose AdamW's settings, the learning rate of a step, and the true global gradient norm.

The learning rate is a pure function of the step, so that a checkpoint has to hold nothing but the step.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

SCHEDULES = ("cosine", "wsd")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Settings of AdamW and of its learning rate schedule.

    `schedule` is "cosine" (warmup, then a cosine down to `min_lr_ratio * lr` at the last step) or "wsd" (warmup,
    stable, then a linear decay to `min_lr_ratio * lr` over the last `decay_steps` steps, or `decay_fraction` of all).
    """

    lr: float = 3e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad_norm: float | None = 1.0
    schedule: str = "cosine"
    warmup_steps: int = 10
    decay_steps: int | None = None
    decay_fraction: float | None = None
    min_lr_ratio: float = 0.1

    def validate(self) -> None:
        """Raise ValueError, naming the config key, for a value that cannot be used."""
        _require(_finite(self.lr) and self.lr > 0, "optim.lr", self.lr, "a number > 0")
        _require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "optim.betas",
            self.betas,
            "two numbers in [0, 1), e.g. [0.9, 0.95]",
        )
        _require(_finite(self.eps) and self.eps > 0, "optim.eps", self.eps, "a number > 0")
        _require(
            _finite(self.weight_decay) and self.weight_decay >= 0,
            "optim.weight_decay",
            self.weight_decay,
            "a number >= 0",
        )
        _require(
            self.clip_grad_norm is None or (_finite(self.clip_grad_norm) and self.clip_grad_norm >= 0),
            "optim.clip_grad_norm",
            self.clip_grad_norm,
            "a number > 0, or 0 or null to turn clipping off",
        )
        _require(self.schedule in SCHEDULES, "optim.schedule", self.schedule, f"one of {', '.join(SCHEDULES)}")
        _require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "a number of steps >= 0")
        _require(0 <= self.min_lr_ratio <= 1, "optim.min_lr_ratio", self.min_lr_ratio, "a number in [0, 1]")
        self._validate_decay()

    def _validate_decay(self) -> None:
        if self.schedule == "cosine":
            for key in ("decay_steps", "decay_fraction"):
                value = getattr(self, key)
                needed = "null, as a cosine decays from the end of the warmup to the last step; or take optim=adamw_wsd"
                _require(value is None, f"optim.{key}", value, needed)
            return
        if (self.decay_steps is None) == (self.decay_fraction is None):
            raise ValueError(
                f"optim.schedule=wsd needs exactly one of optim.decay_steps (given: {self.decay_steps}) and "
                f"optim.decay_fraction (given: {self.decay_fraction}): set one and the other to null"
            )
        if self.decay_steps is not None:
            _require(self.decay_steps >= 0, "optim.decay_steps", self.decay_steps, "a number of steps >= 0")
        if self.decay_fraction is not None:
            _require(0 <= self.decay_fraction <= 1, "optim.decay_fraction", self.decay_fraction, "a number in [0, 1]")


def _finite(value: float) -> bool:
    return math.isfinite(value)


def _require(condition: bool, key: str, value: object, needed: str) -> None:
    if not condition:
        raise ValueError(f"{key}={value!r} cannot be used: {key} has to be {needed}")


def wsd_decay_steps(config: OptimConfig, *, total_steps: int) -> int:
    """Return how many steps at the end of a run of `total_steps` lower the learning rate under schedule "wsd"."""
    if config.decay_steps is not None:
        return config.decay_steps
    assert config.decay_fraction is not None, "validate() demands one of decay_steps and decay_fraction"
    return round(config.decay_fraction * total_steps)


def check_schedule(config: OptimConfig, *, total_steps: int) -> None:
    """Raise ValueError if the schedule's phases do not fit into `total_steps`."""
    if total_steps < 1:
        raise ValueError(f"a learning rate schedule needs at least 1 step, but the run has {total_steps} steps")
    if config.warmup_steps > total_steps:
        raise ValueError(
            f"optim.warmup_steps={config.warmup_steps} is more than the {total_steps} steps of the run: "
            f"lower optim.warmup_steps to at most {total_steps} or train for more steps"
        )
    if config.schedule == "wsd":
        decay_steps = wsd_decay_steps(config, total_steps=total_steps)
        if config.warmup_steps + decay_steps > total_steps:
            raise ValueError(
                f"optim.warmup_steps={config.warmup_steps} and {decay_steps} steps of decay do not fit into the "
                f"{total_steps} steps of the run: lower optim.warmup_steps, optim.decay_steps or optim.decay_fraction"
            )


def lr_at(step: int, *, config: OptimConfig, total_steps: int) -> float:
    """Return the learning rate of the optimizer step with index `step`, counted from 0.

    Warmup rises linearly, `lr * (step + 1) / (warmup_steps + 1)`: the first step already learns, and the first step
    at `lr` is step `warmup_steps`. The last step, `total_steps - 1`, is at exactly `lr * min_lr_ratio` (unless the
    warmup or a decay of 0 steps leaves no room for that).
    Raise ValueError for a negative step, or a schedule that does not fit into `total_steps`.
    """
    check_schedule(config, total_steps=total_steps)
    if step < 0:
        raise ValueError(f"steps are counted from 0, but step={step} was given")
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    last = total_steps - 1
    if config.schedule == "cosine":
        # With a single step left there is nothing to anneal over: it keeps the full rate.
        span = last - config.warmup_steps
        progress = min((step - config.warmup_steps) / span, 1.0) if span > 0 else float(step > last)
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        decay_steps = wsd_decay_steps(config, total_steps=total_steps)
        into_decay = step - (total_steps - decay_steps) + 1  # 1 at the first step of the decay
        remaining = 1.0 - min(max(into_decay, 0) / decay_steps, 1.0) if decay_steps > 0 else 1.0
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * remaining)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group of `optimizer` the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def decays(name: str, parameter: Tensor) -> bool:
    """Say whether weight decay applies to the parameter `name`.

    It applies to matrices (two or more dims) that are neither a norm's weight nor a bias, nor what begins as an
    identity: a learned feature map, the taps of a convolution. Embeddings are matrices and
    do decay, as in Megatron-LM: a tied embedding is also the output matrix, so leaving embeddings out
    would let tying them change the regularisation as a side effect.
    """
    parts = name.lower().split(".")
    exempt = parts[-1] in ("bias", "query_weight", "key_weight", "conv_weight") or any("norm" in part for part in parts)
    return parameter.ndim >= 2 and not exempt


def param_groups(named_parameters: Iterable[tuple[str, Tensor]], config: OptimConfig) -> list[dict[str, Any]]:
    """Split the trainable parameters into AdamW's groups: first those with weight decay, then those without.

    A parameter that is given twice (tied weights) is taken once, a frozen one not at all, and an empty group is left
    out. Raise ValueError if nothing is trainable.
    """
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    seen: set[int] = set()
    for name, parameter in named_parameters:
        if not parameter.requires_grad or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        (decayed if decays(name, parameter) else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("the model has no trainable parameter: requires_grad is False on all of them")
    return groups


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW over the model's trainable parameters (plain tensors or the DTensors of FSDP2).

    On CPU the plain loop over parameters is chosen: the fused CPU kernel is three times as fast, but rounds the tail
    of a tensor otherwise than its vectorised part, so that its result depends on how a parameter is sharded (3e-8 after
    five steps on two ranks; the plain loop differs by 0). On a GPU the fused kernel is chosen.
    """
    groups = param_groups(model.named_parameters(), config)
    fused = all(parameter.device.type == "cuda" for group in groups for parameter in group["params"])
    beta1, beta2 = config.betas
    return torch.optim.AdamW(groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, foreach=False, fused=fused)


def _local(tensor: Tensor, *, shard_group: dist.ProcessGroup | None) -> Tensor:
    """Return this rank's part of a gradient, after checking that `shard_group` is just the ranks that share it out."""
    group_size = 1 if shard_group is None else dist.get_world_size(shard_group)
    shards = 1
    if isinstance(tensor, DTensor):
        assert not any(isinstance(placement, Partial) for placement in tensor.placements), "gradient not yet reduced"
        for dim, placement in enumerate(tensor.placements):
            if not isinstance(placement, Replicate):
                shards *= tensor.device_mesh.size(dim)
        tensor = tensor.to_local()
    assert shards == group_size, (
        f"a gradient in {shards} shard(s) was given with a shard_group of {group_size} rank(s): its squares would be "
        "left out of the norm or counted more than once"
    )
    return tensor


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[Tensor], *, max_norm: float | None, shard_group: dist.ProcessGroup | None
) -> Tensor:
    """Measure the global L2 norm of all gradients, and scale them in place so that it is at most `max_norm`.

    `shard_group` is the ranks that hold disjoint shards of the parameters (FSDP2), or None where each rank holds all of
    every gradient. Collective over `shard_group`: each of its ranks must call it, and each gets the same number.

    Return the norm before clipping: a 0-dim tensor, float32 (float64 if a gradient is), on the gradients' device, with
    no synchronisation with the host. `max_norm` None or 0 only measures. If the norm is not finite, no gradient is
    touched, and the caller sees it in what is returned and decides. Raise ValueError if `max_norm` is negative or NaN.
    """
    if max_norm is not None and not max_norm >= 0:
        raise ValueError(f"optim.clip_grad_norm={max_norm} cannot be used: a norm >= 0, or null to turn clipping off")
    parameters = list(parameters)
    grads = [_local(p.grad, shard_group=shard_group) for p in parameters if p.grad is not None]
    device = next((t.device for t in [*grads, *parameters]), torch.device("cpu"))
    dtype = torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32

    # 16-bit gradients are summed in float32. The handful of per-tensor norms is then summed in float64, which costs
    # nothing and keeps their squares from overflowing.
    square = torch.zeros((), dtype=torch.float64, device=device)
    for grad in grads:
        accumulate = torch.float64 if grad.dtype == torch.float64 else torch.float32
        square += torch.linalg.vector_norm(grad, dtype=accumulate).double().square()
    if shard_group is not None:
        dist.all_reduce(square, group=shard_group)
    norm = square.sqrt().to(dtype)

    if max_norm:
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        factor = torch.where(torch.isfinite(norm), factor, torch.ones_like(factor))
        for grad in grads:
            grad.mul_(factor)
    return norm
