"""Rotary embedding: precision at millions of positions, relative invariance, any order of tokens."""

import math

import torch

from longctx.rope import apply_rope, rope_table


def test_angles_are_right_at_four_million_positions():
    position, head_dim, theta = 4_000_001, 64, 500_000.0
    cos, sin = rope_table(torch.tensor([position]), head_dim=head_dim, theta=theta)
    for i in range(head_dim // 2):
        angle = position * theta ** (-2 * i / head_dim)
        assert abs(cos[0, i].item() - math.cos(angle)) < 1e-6
        assert abs(sin[0, i].item() - math.sin(angle)) < 1e-6


def test_float32_angles_would_have_been_wrong_there():
    frequencies = torch.pow(500_000.0, -torch.arange(0, 64, 2) / 64)
    wrong = (torch.tensor([4_000_001.0]) * frequencies.float()).cos()
    right, _ = rope_table(torch.tensor([4_000_001]), head_dim=64, theta=500_000.0)
    assert (wrong - right[0]).abs().max() > 0.01


def test_scores_depend_on_the_distance_only():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 16, generator=generator, dtype=torch.float64) for _ in range(2))

    def score(q_position: int, k_position: int) -> float:
        tables = [
            rope_table(torch.tensor([p]), head_dim=16, theta=10_000.0, dtype=torch.float64)
            for p in (q_position, k_position)
        ]
        return (apply_rope(q, tables[0]) * apply_rope(k, tables[1])).sum().item()

    assert abs(score(7, 3) - score(1_000_007, 1_000_003)) < 1e-8
    assert abs(score(7, 3) - score(7, 2)) > 1e-3


def test_a_pair_rotates_by_its_angle_in_the_half_convention():
    x = torch.zeros(1, 1, 1, 4)
    x[..., 0] = 1.0
    rotated = apply_rope(x, rope_table(torch.tensor([3]), head_dim=4, theta=10_000.0))
    assert torch.allclose(rotated[0, 0, 0], torch.tensor([math.cos(3), 0.0, math.sin(3), 0.0]), atol=1e-6)


def test_dtype_is_kept():
    table = rope_table(torch.arange(5), head_dim=8, theta=10_000.0)
    assert apply_rope(torch.randn(2, 5, 3, 8).bfloat16(), table).dtype == torch.bfloat16
