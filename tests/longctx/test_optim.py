"""The schedule by literal values, AdamW's groups, and the gradient norm on one rank and over FSDP2 shards."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from longctx.optim import OptimConfig, build_optimizer, check_schedule, clip_grad_norm, lr_at, param_groups, set_lr

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "optim"


def _cosine(**changes: Any) -> OptimConfig:
    return OptimConfig(**({"lr": 1.0, "warmup_steps": 4, "min_lr_ratio": 0.1} | changes))


def _wsd(**changes: Any) -> OptimConfig:
    return _cosine(**({"schedule": "wsd", "decay_fraction": 0.4} | changes))


def _rates(config: OptimConfig, total_steps: int) -> list[float]:
    return [lr_at(step, config=config, total_steps=total_steps) for step in range(total_steps)]


def test_cosine_by_literal_values() -> None:
    rates = _rates(_cosine(), 9)
    assert rates == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1.0, 0.55 + 0.45 * math.sqrt(0.5), 0.55, 0.55 - 0.45 * math.sqrt(0.5), 0.1], rel=1e-12
    )


def test_wsd_by_literal_values() -> None:
    # 10 steps: 4 of warmup, 2 stable, 4 of decay; the decay starts at step 6.
    assert _rates(_wsd(), 10) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 0.775, 0.55, 0.325, 0.1], rel=1e-12)
    by_steps = _wsd(decay_fraction=None, decay_steps=4)
    assert _rates(by_steps, 10) == _rates(_wsd(), 10)


def test_no_warmup_starts_at_the_full_rate() -> None:
    assert _rates(_cosine(warmup_steps=0), 3) == pytest.approx([1.0, 0.55, 0.1])
    assert _rates(_wsd(warmup_steps=0, decay_fraction=0.5), 4) == pytest.approx([1.0, 1.0, 0.55, 0.1])


def test_warmup_as_long_as_the_run() -> None:
    expected = pytest.approx([0.25, 0.5, 0.75])
    assert _rates(_cosine(warmup_steps=3), 3) == expected
    assert _rates(_wsd(warmup_steps=3, decay_fraction=0.0), 3) == expected


def test_one_step_after_the_warmup_keeps_the_full_rate() -> None:
    assert _rates(_cosine(warmup_steps=1), 2) == pytest.approx([0.5, 1.0])
    assert _rates(_cosine(warmup_steps=0), 1) == [1.0]


def test_wsd_of_one_decay_step_and_of_none() -> None:
    assert _rates(_wsd(warmup_steps=0, decay_fraction=None, decay_steps=1), 3) == pytest.approx([1.0, 1.0, 0.1])
    assert _rates(_wsd(warmup_steps=0, decay_fraction=None, decay_steps=0), 3) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("config", [_cosine(), _wsd(), _cosine(warmup_steps=8)])
def test_steps_after_the_end_stay_at_the_smallest_rate(config: OptimConfig) -> None:
    for step in (9, 10, 1000):
        assert lr_at(step, config=config, total_steps=9) == pytest.approx(0.1)


def test_schedule_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optim.warmup_steps=4 is more than the 3 steps"):
        lr_at(0, config=_cosine(), total_steps=3)
    with pytest.raises(ValueError, match=r"optim.warmup_steps=4 and 5 steps of decay do not fit into the 8"):
        check_schedule(_wsd(decay_fraction=None, decay_steps=5), total_steps=8)
    with pytest.raises(ValueError, match="counted from 0"):
        lr_at(-1, config=_cosine(), total_steps=9)
    with pytest.raises(ValueError, match="at least 1 step"):
        lr_at(0, config=_cosine(), total_steps=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "optim.lr=0.0"),
        ({"lr": math.nan}, "optim.lr=nan"),
        ({"betas": [0.9]}, r"optim.betas=\[0.9\]"),
        ({"betas": [0.9, 1.0]}, r"two numbers in \[0, 1\)"),
        ({"eps": -1e-8}, "optim.eps"),
        ({"weight_decay": -0.1}, "optim.weight_decay"),
        ({"clip_grad_norm": -1.0}, "0 or null to turn clipping off"),
        ({"schedule": "linear"}, "one of cosine, wsd"),
        ({"warmup_steps": -1}, "optim.warmup_steps"),
        ({"min_lr_ratio": 1.5}, "optim.min_lr_ratio"),
        ({"decay_steps": 5}, "optim.decay_steps=5 .* optim=adamw_wsd"),
        ({"schedule": "wsd"}, "exactly one of"),
        ({"schedule": "wsd", "decay_steps": 3, "decay_fraction": 0.5}, "exactly one of"),
        ({"schedule": "wsd", "decay_fraction": 1.5}, "optim.decay_fraction"),
        ({"schedule": "wsd", "decay_steps": -1}, "optim.decay_steps"),
    ],
)
def test_bad_settings_are_refused_with_their_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _cosine(**changes).validate()


@pytest.mark.parametrize("name", ["adamw_cosine", "adamw_wsd"])
def test_yaml_holds_every_key_and_is_valid(name: str) -> None:
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert set(values) == {field.name for field in dataclasses.fields(OptimConfig)}
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(OptimConfig), values))
    assert isinstance(config, OptimConfig)
    config.validate()
    assert config.betas == [0.9, 0.95]


class _Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm([2, 2])  # a norm whose weight has two dims
        self.linear = nn.Linear(4, 3)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def test_weight_decay_goes_to_matrices_only() -> None:
    model = _Tiny()
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3, betas=[0.8, 0.9]))
    decayed, plain = optimizer.param_groups
    assert [decayed["weight_decay"], plain["weight_decay"]] == [0.3, 0.0]
    assert {id(p) for p in decayed["params"]} == {id(model.embed.weight), id(model.linear.weight)}
    assert {id(p) for p in plain["params"]} == {id(model.norm.weight), id(model.norm.bias), id(model.linear.bias)}
    assert decayed["betas"] == (0.8, 0.9)
    set_lr(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


def test_tied_parameter_is_taken_once_and_nothing_to_train_is_an_error() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    groups = param_groups([("embed.weight", weight), ("head.weight", weight)], OptimConfig())
    assert [len(group["params"]) for group in groups] == [1]
    with pytest.raises(ValueError, match="no trainable parameter"):
        param_groups([("embed.weight", weight.detach())], OptimConfig())


def _parameters(dtype: torch.dtype, scale: float) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in [(5, 3), (7,), (2, 2, 2)]]
    for parameter in parameters:
        parameter.grad = (scale * torch.randn(parameter.shape, generator=generator)).to(dtype)
    return [*parameters, nn.Parameter(torch.zeros(3, dtype=dtype))]  # the last one has no gradient


@pytest.mark.parametrize("scale", [0.01, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clipping_agrees_with_torch(dtype: torch.dtype, scale: float) -> None:
    ours, theirs = _parameters(dtype, scale), _parameters(dtype, scale)
    norm = clip_grad_norm(ours, max_norm=1.0, shard_group=None)
    assert norm.dtype == dtype
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, 1.0))
    for a, b in zip(ours[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_norm_of_16_bit_gradients_is_summed_in_float32() -> None:
    parameter = nn.Parameter(torch.zeros(300_000, dtype=torch.bfloat16))
    parameter.grad = torch.full_like(parameter, 2.0**100)  # its square overflows float32
    other = nn.Parameter(torch.zeros(300_000, dtype=torch.bfloat16))
    other.grad = torch.full_like(other, 2.0**-4)
    norm = clip_grad_norm([other], max_norm=None, shard_group=None)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(math.sqrt(300_000) / 16, rel=1e-6)
    assert not torch.isfinite(clip_grad_norm([parameter], max_norm=1.0, shard_group=None))


@pytest.mark.parametrize("max_norm", [None, 0.0])
def test_clipping_that_is_off_only_measures(max_norm: float | None) -> None:
    parameters = _parameters(torch.float32, 100.0)
    before = [p.grad.clone() for p in parameters[:-1]]
    assert clip_grad_norm(parameters, max_norm=max_norm, shard_group=None) > 100
    assert all(torch.equal(p.grad, b) for p, b in zip(parameters, before, strict=False))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_norm_that_is_not_finite_is_returned_and_scales_nothing(bad: float) -> None:
    parameters = _parameters(torch.float32, 100.0)
    parameters[0].grad[0, 0] = bad
    before = [p.grad.clone() for p in parameters[:-1]]
    norm = clip_grad_norm(parameters, max_norm=1.0, shard_group=None)
    assert not torch.isfinite(norm)
    for parameter, grad in zip(parameters, before, strict=False):
        torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=0, equal_nan=True)


def test_no_gradient_at_all_has_norm_zero() -> None:
    assert clip_grad_norm([nn.Parameter(torch.ones(2))], max_norm=1.0, shard_group=None).item() == 0.0
    assert clip_grad_norm([], max_norm=1.0, shard_group=None).item() == 0.0
    with pytest.raises(ValueError, match=r"optim\.clip_grad_norm=-1"):
        clip_grad_norm([], max_norm=-1.0, shard_group=None)


def _fsdp_rank(rank: int, world_size: int, group: dist.ProcessGroup) -> None:
    """Clip and step a model sharded over two ranks; compare with the whole model, which each rank holds too."""
    config = OptimConfig(lr=0.1, weight_decay=0.5)
    torch.manual_seed(0)
    # 3 rows over 2 ranks are shards of 2 and 1 rows; 1 row leaves the second rank with an empty shard.
    whole = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1))
    sharded = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1))
    sharded.load_state_dict(whole.state_dict())
    mesh = init_device_mesh("cpu", (world_size,))
    fully_shard(sharded, mesh=mesh)
    optimizers = [build_optimizer(model, config) for model in (whole, sharded)]
    for max_norm in (None, 0.25, 1e6):
        for model in (whole, sharded):
            model.zero_grad()
            (model(torch.arange(10.0).reshape(2, 5)) ** 2).mean().backward()
        expected = nn.utils.clip_grad_norm_(whole.parameters(), math.inf if max_norm is None else max_norm)
        norm = clip_grad_norm(sharded.parameters(), max_norm=max_norm, shard_group=mesh.get_group())
        torch.testing.assert_close(norm, expected)
        both = [torch.empty_like(norm) for _ in range(world_size)]
        dist.all_gather(both, norm)
        assert torch.equal(both[0], both[1]), "ranks disagree on the norm"
        for a, b in zip(sharded.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(a.grad.full_tensor(), b.grad)
        for optimizer in optimizers:
            optimizer.step()
        for a, b in zip(sharded.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(a.full_tensor(), b)
    # One rank's NaN reaches the norm of both, and neither scales.
    if rank == 0:
        next(sharded.parameters()).grad.to_local()[0, 0] = math.nan
    before = [p.grad.to_local().clone() for p in sharded.parameters()]
    assert torch.isnan(clip_grad_norm(sharded.parameters(), max_norm=0.25, shard_group=mesh.get_group()))
    for parameter, grad in zip(sharded.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad.to_local(), grad, rtol=0, atol=0, equal_nan=True)
    # Shards without their group would give a norm that is too small.
    with pytest.raises(AssertionError, match="2 shard"):
        clip_grad_norm(sharded.parameters(), max_norm=None, shard_group=None)


def test_clipping_and_stepping_over_fsdp_shards(gloo_pool) -> None:
    gloo_pool.run(_fsdp_rank, 2)
