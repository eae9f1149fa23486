"""Mixers of static patterns on one rank: dense attention under a predicate, and who moves whom."""

from dataclasses import dataclass

import pytest
import torch
from omegaconf import OmegaConf

from longctx.kernels.block_sparse.selection import allowed
from longctx.kernels.softmax.reference import dense_attention
from longctx.mixers.sparse import static_mixer
from longctx.mixers.sparse.base import Inputs, Sizes
from longctx.mixers.sparse.static import (
    NeighborhoodConfig,
    S2Config,
    SparseFixedConfig,
    SparseStridedConfig,
    StaticConfig,
    VerticalSlashConfig,
)
from longctx.mixers.sparse.static_mixer import selection_at
from longctx.verification.whole_sparse import WholeSparse

TOTAL, HEADS, KV_HEADS, DIM = 41, 4, 2, 8
SIZES = Sizes(dim=16, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM)
DOCUMENTS = torch.tensor([[0] * 17 + [17] + [18] * 23, [0] * TOTAL])

# Of (i, j) of a document, int64 `[T, T]`, and the query head, of which two share a KV head; causality comes on top.
CASES = {
    "strided": (SparseStridedConfig(stride=6), lambda i, j, h: (i - j < 6) | ((i - j) % 6 == 0)),
    "strided_alternate": (
        SparseStridedConfig(stride=6, heads="alternate"),
        lambda i, j, h: i - j < 6 if h < 2 else (i - j) % 6 == 0,
    ),
    "fixed": (SparseFixedConfig(stride=6, columns=2), lambda i, j, h: (i // 6 == j // 6) | (j % 6 >= 4)),
    "fixed_alternate": (
        SparseFixedConfig(stride=6, columns=2, heads="alternate"),
        lambda i, j, h: i // 6 == j // 6 if h < 2 else j % 6 >= 4,
    ),
    "neighborhood": (
        NeighborhoodConfig(window=4, stride=2, dilation=3),
        lambda i, j, h: (i % 3 == j % 3) & (i // 3 // 2 * 2 + 1 - j // 3 < 4),
    ),
    "s2": (
        S2Config(block_size=4, local=2, stride=2),
        lambda i, j, h: (i // 4 - j // 4 < 2) | ((j // 4 + 1 + h // 2) % 2 == 0),
    ),
    "s2_query_heads": (  # more shards than KV heads
        S2Config(block_size=4, local=2, stride=4),
        lambda i, j, h: (i // 4 - j // 4 < 2) | ((j // 4 + 1 + h) % 4 == 0),
    ),
    "vertical_slash": (
        VerticalSlashConfig(vertical=(0, 3), slash=(5, 6, 11), window=3),
        lambda i, j, h: (i - j < 3) | (j == 0) | (j == 3) | (i - j == 5) | (i - j == 6) | (i - j == 11),
    ),
}
cases = pytest.mark.parametrize("name", CASES)


def predicate(sees) -> torch.Tensor:
    """Return bool `[B, H, T, T]`."""
    place = torch.arange(TOTAL) - DOCUMENTS
    i, j = place[:, :, None], place[:, None, :]
    same = (DOCUMENTS[:, :, None] == DOCUMENTS[:, None, :]) & (j <= i)
    return torch.stack([sees(i, j, head) & same for head in range(HEADS)], dim=1)


def some_inputs(*, sinks: bool = False) -> Inputs:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    q, k, v = draw(2, TOTAL, HEADS, DIM), draw(2, TOTAL, KV_HEADS, DIM), draw(2, TOTAL, KV_HEADS, DIM)
    return Inputs(draw(2, TOTAL, 16), q, k, v, draw(*q.shape), draw(*k.shape), draw(HEADS) if sinks else None)


@cases
@pytest.mark.parametrize("sinks", [False, True])
def test_output_and_gradients_are_those_of_dense_attention(name, sinks):
    config, sees = CASES[name]
    inputs = some_inputs(sinks=sinks)
    seen = predicate(sees)
    expected = torch.cat(
        [
            dense_attention(
                inputs.q[row, None],
                inputs.k[row, None],
                inputs.v[row, None],
                allowed=seen[row],
                sink_logits=inputs.sink_logits,
            )[0]
            for row in range(2)
        ]
    )
    out = config.make(SIZES)(inputs, place=WholeSparse(document_of=DOCUMENTS))
    dout = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    over = [x for x in (inputs.q, inputs.k, inputs.v, inputs.sink_logits) if x is not None]
    assert torch.allclose(out, expected, rtol=0, atol=1e-10)
    for ours, theirs in zip(
        torch.autograd.grad(out, over, dout), torch.autograd.grad(expected, over, dout), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)


@cases
def test_a_key_moves_exactly_who_sees_it(name):
    """d out[t] / d v[j] is not 0 iff t sees j, in either row and every head; d out[t] / d k[j] likewise, where t sees
    more than one key (or else its weight is 1, whatever the score)."""
    config, sees = CASES[name]
    inputs, seen = some_inputs(), predicate(sees)
    out = config.make(SIZES)(inputs, place=WholeSparse(document_of=DOCUMENTS))
    weight = torch.randn(DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for t in range(TOTAL):
        for head in range(HEADS):
            dk, dv = torch.autograd.grad((out[:, t, head] @ weight).sum(), (inputs.k, inputs.v), retain_graph=True)
            mine = seen[:, head, t]  # [B, T]
            group = head * KV_HEADS // HEADS
            others = torch.arange(KV_HEADS) != group
            assert torch.equal((dv[:, :, group] != 0).any(-1), mine)
            chosen = mine.sum(-1) > 1
            assert torch.equal((dk[chosen][:, :, group] != 0).any(-1), mine[chosen])
            assert (dk[:, :, others] == 0).all()
            assert (dv[:, :, others] == 0).all()


@cases
def test_pairs_are_the_patterns(name):
    config, sees = CASES[name]
    count = int(predicate(sees)[1].sum())
    assert config.pairs(5, TOTAL) == (2 * count + HEADS) // (2 * HEADS)


@dataclass(frozen=True)
class Still(WholeSparse):
    """A place whose positions are one tensor."""

    at: torch.Tensor | None = None

    @property
    def positions(self) -> torch.Tensor:
        return torch.arange(self.total) if self.at is None else self.at


def select(config: StaticConfig, place: WholeSparse, heads: int = HEADS):
    return selection_at(config.pattern, place, num_heads=heads, num_kv_heads=KV_HEADS)


def test_layers_share_a_selection():
    config = SparseFixedConfig(stride=8, columns=1)
    document_of = DOCUMENTS.clone()
    place = Still(document_of=document_of)
    one = select(config, place)
    assert select(SparseFixedConfig(stride=8, columns=1), place) is one
    assert select(config, Still(document_of=document_of, at=torch.arange(TOTAL))) is one


def test_what_differs_is_not_shared():
    config = SparseFixedConfig(stride=8, columns=1)
    document_of = DOCUMENTS.clone()
    place = Still(document_of=document_of)
    one = select(config, place)
    assert select(SparseFixedConfig(stride=8, columns=2), place) is not one
    assert select(config, place, heads=2) is not one
    assert select(config, Still(document_of=DOCUMENTS.clone())) is not one
    other = select(config, Still(document_of=document_of, at=torch.arange(TOTAL).flip(0)))
    assert not torch.equal(other.lo, one.lo)
    assert select(config, place) is one  # and all of them are kept


def test_selections_go_with_their_batch_and_are_not_many():
    before = len(static_mixer._made)
    document_of = DOCUMENTS.clone()
    for stride in range(1, 20):
        select(SparseFixedConfig(stride=stride, columns=1), Still(document_of=document_of))
    assert len(static_mixer._made[document_of]) == static_mixer.MOST
    assert len(static_mixer._made) == before + 1
    del document_of
    assert len(static_mixer._made) == before


@cases
def test_settings_that_work_are_accepted(name):
    config, _ = CASES[name]
    config.validate(name)
    type(config)().validate(name)
    assert {config: 1}[config] == 1
    assert config.whole == 1
    assert config.takes_sinks


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (SparseStridedConfig(stride=0), "mixers.kind.stride must be >= 1; given 0"),
        (SparseStridedConfig(heads="x"), "mixers.kind.heads=x is not known; known are merged, alternate"),
        (SparseFixedConfig(heads="x"), "mixers.kind.heads=x is not known"),
        (SparseFixedConfig(columns=0), "mixers.kind.columns must be >= 1"),
        (SparseFixedConfig(stride=4, columns=5), "mixers.kind.columns=5 are more tokens than a block has"),
        (NeighborhoodConfig(window=4, stride=5), "mixers.kind.stride=5 is more than a window"),
        (NeighborhoodConfig(dilation=0), "mixers.kind.dilation must be >= 1"),
        (S2Config(local=0), "mixers.kind.local must be >= 1"),
        (VerticalSlashConfig(window=0), "mixers.kind.window must be >= 1"),
        (VerticalSlashConfig(vertical=(0, -3)), "mixers.kind.vertical must be offsets >= 0; given -3"),
        (VerticalSlashConfig(slash=(-1,)), "mixers.kind.slash must be offsets >= 0; given -1"),
    ],
)
def test_impossible_settings_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        config.validate("kind")


@pytest.mark.parametrize("config", [SparseStridedConfig(heads="alternate"), SparseFixedConfig(heads="alternate")])
def test_one_kv_head_cannot_alternate(config):
    with pytest.raises(ValueError, match="model.num_kv_heads=1: set heads=merged"):
        config.make(SIZES._replace(kv_heads=1))


@pytest.mark.parametrize(("heads", "kv_heads", "stride"), [(1, 1, 1), (4, 1, 2), (2, 2, 2), (6, 3, 3), (8, 8, 8)])
def test_without_a_stride_heads_share_out_all_of_the_past(heads, kv_heads, stride):
    config = S2Config(block_size=4, local=1)
    config.validate("s2")
    sizes = SIZES._replace(heads=heads, kv_heads=kv_heads)
    mixer = config.make(sizes)
    assert config.of_model(heads=heads, kv_heads=kv_heads) == S2Config(block_size=4, local=1, stride=stride)
    place = WholeSparse(document_of=DOCUMENTS)
    selection = selection_at(mixer.pattern, place, num_heads=heads, num_kv_heads=kv_heads)
    seen = allowed(selection, torch.arange(TOTAL))
    assert torch.equal(seen.any(1), predicate(lambda i, j, h: j <= i)[:, 0])


def test_a_stride_that_is_given_stays():
    config = S2Config(stride=7)
    assert config.of_model(heads=4, kv_heads=2) is config


def test_offsets_may_be_lists():
    """As OmegaConf makes them."""
    schema = OmegaConf.structured(VerticalSlashConfig)
    OmegaConf.set_readonly(schema, False)
    given = OmegaConf.to_object(OmegaConf.merge(schema, {"vertical": [0, 9], "slash": [64]}))
    assert given == VerticalSlashConfig(vertical=(0, 9), slash=(64,))
    assert hash(given) == hash(VerticalSlashConfig(vertical=(0, 9), slash=(64,)))
