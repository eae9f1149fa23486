"""The distillation loss against the T x T formula, and that it teaches."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longctx.kernels.linear.distill import distillation_loss
from longctx.kernels.linear.feature_maps import make_feature_map
from longctx.kernels.linear.maps.base import FeatureMap

T, H, D = 13, 2, 4


def make(name: str, dtype: torch.dtype = torch.float64) -> FeatureMap:
    torch.manual_seed(2)
    made = make_feature_map(name, head_dim=D, heads=H, max_positions=64, seed=0)
    for weight in made.parameters():
        torch.nn.init.normal_(weight)
    return made.to(dtype)


def queries_and_keys(count: int = T, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return tuple(torch.randn(2, count, H, D, dtype=dtype, requires_grad=True) for _ in range(2))


def documents(rows: int) -> Tensor:
    torch.manual_seed(3)
    return (torch.rand(rows, T) < 0.3).cumsum(1).int()


def written_out(
    q: Tensor, k: Tensor, feature_map: FeatureMap, numbers: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the cross entropy, and the entropy of the softmax weights."""
    count = q.shape[1]
    visible = torch.ones(count, count).tril().bool()[None, None]
    if numbers is not None:
        visible = visible & (numbers[:, None, :, None] == numbers[:, None, None, :])
    teacher = torch.einsum("bthd,bshd->bhts", q, k).detach() * scale
    teacher = teacher.masked_fill(~visible, -torch.inf).softmax(-1)
    positions = torch.arange(count)
    weights = torch.einsum(
        "bthf,bshf->bhts",
        feature_map(q, positions=positions, side="q"),
        feature_map(k, positions=positions, side="k"),
    )
    weights = torch.where(visible, weights, 0.0)
    student = weights / weights.sum(-1, keepdim=True)
    terms = [torch.where(visible, -teacher * torch.where(visible, w, 1.0).log(), 0.0) for w in (student, teacher)]
    return tuple(term.sum(-1).mean() for term in terms)


@pytest.mark.parametrize("block_size", [1, 5, 13, 64])
@pytest.mark.parametrize("rows", [None, 1, 2])
@pytest.mark.parametrize("name", ["hedgehog", "elu1", "performer"])
def test_equals_the_formula(name, rows, block_size):
    q, k = queries_and_keys()
    feature_map, numbers = make(name), None if rows is None else documents(rows)
    ours = distillation_loss(
        feature_map, q, k, positions=torch.arange(T), documents=numbers, scale=0.8, block_size=block_size
    )
    ref, _ = written_out(q, k, feature_map, numbers, 0.8)
    leaves = [q, k, *feature_map.parameters()]
    for a, b in zip(
        (ours, *torch.autograd.grad(3 * ours, leaves)), (ref, *torch.autograd.grad(3 * ref, leaves)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_default_scale_and_low_precision():
    q, k = queries_and_keys(dtype=torch.bfloat16)
    feature_map = make("hedgehog", torch.float32)
    ours = distillation_loss(feature_map, q, k, positions=torch.arange(T))
    ref, entropy = written_out(q.float(), k.float(), feature_map, None, D**-0.5)
    plain, _ = written_out(q, k, feature_map, None, D**-0.5)
    assert ours.dtype == torch.float32
    assert (ours - ref).abs() <= 2 * (plain - ref).abs()
    assert ours > entropy


def test_memory_is_a_block_of_queries_wide():
    q, k = queries_and_keys(600)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        distillation_loss(make("hedgehog"), q, k, positions=torch.arange(600), block_size=16).backward()
    assert largest <= 2 * H * 600 * 16


def test_weights_that_vanish_are_finite():
    q, k = queries_and_keys()
    feature_map = make("relu")
    loss = distillation_loss(feature_map, q, k, positions=torch.arange(T))
    assert torch.isfinite(loss)
    assert all(torch.isfinite(d).all() for d in torch.autograd.grad(loss, (q, k)))


def test_maps_whose_weights_do_not_sum_to_one_are_refused():
    q, k = queries_and_keys()
    with pytest.raises(ValueError, match="feature map silu"):
        distillation_loss(make("silu"), q, k, positions=torch.arange(T))


def test_a_few_hundred_steps_come_close_to_softmax_attention():
    torch.manual_seed(1)
    q, k = (torch.randn(1, 32, H, 16) for _ in range(2))
    feature_map = make_feature_map("hedgehog", head_dim=16, heads=H, max_positions=64, seed=0)
    _, entropy = written_out(q, k, feature_map, None, 16**-0.5)
    optimizer = torch.optim.Adam(feature_map.parameters(), lr=0.05)
    above = []
    for _ in range(250):
        optimizer.zero_grad()
        loss = distillation_loss(feature_map, q, k, positions=torch.arange(32))
        loss.backward()
        optimizer.step()
        above.append(loss.item() / entropy.item() - 1)
    assert above[0] > 0.08
    assert 0 < above[-1] < 0.03
