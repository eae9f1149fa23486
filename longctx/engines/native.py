"""The native engine: FSDP2 over dp x cp, in replicas or shards, on CPU (gloo) and GPU (nccl)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from longctx.batch import MicroBatch
from longctx.engines.engine import DTYPES, EngineConfig, StepResult
from longctx.loss import token_loss_sum
from longctx.mixers.transition import Transition
from longctx.model import Decoder, ModelConfig, initial_weight
from longctx.optim import OptimConfig, build_optimizer, clip_grad_norm, set_lr
from longctx.parallel.mesh import Degrees, build_parameter_mesh
from longctx.stack import Stack


class NativeEngine:
    """Parameters as FSDP2 DTensors; gradients are sums over all ranks, of losses divided by the global label count.

    Samples differ over dp only, but gradients are summed over dp x cp: each cp rank has the loss of its own tokens, and
    FSDP2's shard axis includes cp.

    `replicate` is FSDP2 with one shard per replica, so both choices run the same code and save the same checkpoints.
    """

    def __init__(
        self,
        *,
        config: EngineConfig,
        optim: OptimConfig,
        stack: Stack,
        degrees: Degrees,
        device: torch.device,
        seed: int,
    ) -> None:
        """Build the model on the mesh with initial weights that depend on `seed` alone (collective)."""
        replicas = dist.get_world_size() if config.parameters == "replicate" else degrees.dp_replicate
        mesh = build_parameter_mesh(replicas, device_type=device.type)
        self._shard_group = mesh.get_group("shard")
        self._stack = stack
        self._device = device
        with torch.device("meta"):
            self.model = Decoder(stack.model, stack.layers)
        if config.dtype == "float64":
            self.model.to(torch.float64)
        # Inputs keep their dtype: the cosines and sines of RoPE pass through the blocks and must stay float32.
        low = DTYPES[config.dtype] if config.dtype == "bfloat16" else None
        policy = MixedPrecisionPolicy(
            param_dtype=low, reduce_dtype=torch.float32 if low else None, cast_forward_inputs=False
        )
        # The gates of linear layers are never 16-bit: groups of their own, which keep the parameters' dtype.
        gates = [each for each in self.model.modules() if isinstance(each, Transition) and list(each.parameters())]
        groups = [(gate, MixedPrecisionPolicy(cast_forward_inputs=False)) for gate in gates if low]
        groups += [(module, policy) for module in (*self.model.blocks, self.model)]
        for module, own in groups:
            fully_shard(module, mesh=mesh, mp_policy=own)
            assert isinstance(module, FSDPModule)
            # Sum, not mean: the loss is divided by the global count of labels instead. gloo has no pre-multiplied sum.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        self.model.to_empty(device=device)
        _initialise(self.model, config=stack.model, seed=seed)
        self.optimizer = build_optimizer(self.model, optim)
        self._max_norm = optim.clip_grad_norm

    def train_step(self, micro_batches: Sequence[MicroBatch], *, lr: float) -> StepResult:
        """Run forward and backward on every micro-batch and one optimizer step (collective)."""
        self.model.train()
        set_lr(self.optimizer, lr)
        labels, pairs = self._sum(
            [sum(b.num_labels for b in micro_batches), sum(b.visible_pairs for b in micro_batches)]
        )
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)  # of tokens, and of what layers add
        for index, batch in enumerate(micro_batches):
            self._fsdp.set_requires_gradient_sync(index == len(micro_batches) - 1)
            loss = self._loss_sum(batch)
            added = sum(batch.plan.losses, start=torch.zeros_like(loss))
            batch.plan.losses.clear()
            ((loss + added) / max(labels, 1)).backward()
            sums += torch.stack([loss, added]).detach()
        norm = clip_grad_norm(self.model.parameters(), max_norm=self._max_norm, shard_group=self._shard_group)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm.item()}; the last checkpoint is untouched")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        dist.all_reduce(sums)
        loss_mean, added_mean = (sums / max(labels, 1)).tolist()
        return StepResult(loss_mean, norm.item(), labels, pairs, added_mean)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> float:
        """Return the mean token loss over all ranks' micro-batches (collective; equally many on each rank)."""
        self.model.eval()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        for batch in micro_batches:
            loss_sum += self._loss_sum(batch)
        dist.all_reduce(loss_sum)
        (labels,) = self._sum([sum(batch.num_labels for batch in micro_batches)])
        return loss_sum.item() / max(labels, 1)

    @property
    def num_parameters(self) -> int:
        """Return the number of parameters of the whole model."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def state_dict(self) -> dict[str, Any]:
        """Return model and optimizer state for torch DCP, keyed by parameter names: the same under any mesh."""
        begins = not self.optimizer.state
        model, optimizer = get_state_dict(self.model, self.optimizer)
        if begins:  # torch has made the state by a step of size 0: the one that is counted is still to come
            for each in self.optimizer.state.values():
                each["step"].zero_()
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state back after DCP filled it in."""
        # A checkpoint brings its own groups of parameters, with betas, eps and weight decay; those of the config count.
        groups = get_optimizer_state_dict(self.model, self.optimizer)["param_groups"]
        optimizer = {"state": state["optimizer"]["state"], "param_groups": groups}
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=optimizer)

    @property
    def _fsdp(self) -> FSDPModule:
        assert isinstance(self.model, FSDPModule)
        return self.model

    def _loss_sum(self, batch: MicroBatch) -> Tensor:
        logits = self.model(batch.tokens, places=self._stack.places(batch.plan))
        return token_loss_sum(logits, batch.labels, ops=self._stack.model.ops)

    def _sum(self, counts: Sequence[int]) -> list[int]:
        """Sum integers over all ranks."""
        total = torch.tensor(list(counts), dtype=torch.int64, device=self._device)
        dist.all_reduce(total)
        return [int(count) for count in total]


@torch.no_grad()
def _initialise(model: nn.Module, *, config: ModelConfig, seed: int) -> None:
    """Fill every parameter's local shard with its part of the initial weight, one parameter at a time."""
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        whole = initial_weight(name, parameter.shape, config=config, seed=seed).to(parameter.dtype)
        # src_data_rank=None: every rank cuts its own copy, nothing is sent.
        whole = whole.to(parameter.device_mesh.device_type)
        shard = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(shard.to_local())
