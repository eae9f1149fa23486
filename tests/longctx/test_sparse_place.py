"""The library's entry for sparse attention: what it refuses, what ranks agree on once, and what is kept."""

import pytest
import torch

from longctx import sparse_attention, sparse_ranks
from longctx.kernels.block_sparse.selection import narrowed, widened
from longctx.mixers.sparse.base import Inputs, Sizes
from longctx.mixers.sparse.moba import Moba, MobaConfig
from longctx.mixers.sparse.mosa import MosaConfig
from longctx.mixers.sparse.nsa import NsaConfig
from longctx.mixers.sparse.seer import SeerConfig
from longctx.mixers.sparse.sla import SlaConfig
from longctx.mixers.sparse.static import S2Config, SparseStridedConfig
from longctx.parallel.demand import agreed_bytes
from longctx.parallel.layout import Layout
from longctx.parallel.loopback import run_ranks
from longctx.sparse_attention import BUCKETS
from longctx.sparse_function import SelectedAttention
from longctx.sparse_ranks import sparse_place
from tests.support.selections import document_starts, random_blocks

TOTAL, CPU = 48, torch.device("cpu")


def qkv(tokens, heads=(4, 2), dim=8):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, tokens, h, dim, generator=generator, dtype=torch.float64) for h in (*heads, heads[1])]


@pytest.mark.parametrize(
    "bounds", [[(5, 48)], [(0, 60)], [(0, 10)], [(0, 20, 20, 48)], [(0, 30, 20, 48)], [], (0, 48)], ids=str
)
def test_documents_that_are_none_are_refused(bounds):
    with pytest.raises(ValueError, match="cu_seqlens"):
        sparse_place(total=TOTAL, device=CPU, bounds=bounds)


def test_unknown_moves_and_other_rows_are_refused():
    with pytest.raises(ValueError, match="moves=foo is not known; known are auto, all, hops, blocks"):
        sparse_place(total=TOTAL, device=CPU, moves="foo")
    with pytest.raises(ValueError, match="kernel=foo is not known; known are auto, torch, triton, reference"):
        sparse_place(total=TOTAL, device=CPU, kernel="foo")
    place = sparse_place(total=TOTAL, device=CPU, bounds=[(0, 9, TOTAL), (0, TOTAL)])
    q, k, v = qkv(TOTAL)
    selection = random_blocks(place.positions, place.document_of[:1], heads=4, slots=3)
    with pytest.raises(ValueError, match="given 2 for 1 rows"):
        place.attend(q, k, v, selection=selection)


def test_moves_without_effect_are_refused():
    def on_rank(group):
        share = {"total": TOTAL, "device": CPU, "layout": "contiguous", "group": group, "heads": 4}
        with pytest.raises(ValueError, match="moves=blocks has no effect with schedule=ulysses on 2 ranks"):
            sparse_place(**share, schedule="ulysses", moves="blocks")
        sparse_place(**share, schedule="ulysses", moves="all"), sparse_place(**share, schedule="ring", moves="blocks")

    run_ranks(2, on_rank)


@pytest.mark.parametrize("config", [NsaConfig(block_size=8, compress_size=4, compress_stride=4), SlaConfig()])
def test_sinks_are_refused_where_there_is_more_than_one_softmax(config):
    mixer = config.make(Sizes(16, 4, 2, 8)).double()
    q, k, v = qkv(TOTAL)
    inputs = Inputs(torch.zeros(1, TOTAL, 16, dtype=torch.float64), q, k, v, q, k, torch.zeros(4))
    with pytest.raises(ValueError, match="more than one softmax"):
        mixer(inputs, place=sparse_place(total=TOTAL, device=CPU))


def test_a_rank_may_observe_alone_and_a_selection_is_agreed_on_once():
    layout = Layout("zigzag", 2)

    def on_rank(transport):
        seen = []
        place = sparse_place(
            total=TOTAL,
            device=CPU,
            layout=layout,
            group=transport,
            moves="all",
            observe=seen.append if transport.rank == 0 else None,
        )
        q, k, v = (layout.shard(x, rank=transport.rank, dim=1) for x in qkv(TOTAL))
        starts = document_starts((0, TOTAL))[None]
        selection = random_blocks(place.positions, starts, heads=4, slots=3)
        sent = []
        for attend in (place.attend, place.attend_sum):
            before = transport.traffic.bytes
            attend(q, k, v, selection=selection)
            sent.append(transport.traffic.bytes - before)
        return sent, len(seen)

    for rank, (sent, seen) in enumerate(run_ranks(2, on_rank)):
        assert sent[0] - sent[1] == agreed_bytes(TOTAL // 4, BUCKETS)
        assert seen == (2 if rank == 0 else 0)


def test_a_selection_is_kept_in_half_the_memory():
    selection = random_blocks(torch.arange(TOTAL), document_starts((0, 5, TOTAL))[None], heads=2, slots=4)
    kept = narrowed(selection, total=TOTAL)
    assert kept.lo.dtype == kept.hi.dtype == torch.int32
    back = widened(kept)
    assert torch.equal(back.lo, selection.lo) and torch.equal(back.hi, selection.hi) and back.lo.dtype == torch.int64
    assert narrowed(selection, total=2**31) is selection  # positions do not fit


@pytest.mark.parametrize(
    ("config", "layers"), [(SlaConfig(block_size=8, topk=3), 1), (SparseStridedConfig(heads="alternate", stride=4), 2)]
)
def test_what_attends_to_the_same_selection_keeps_one_copy_of_it(config, layers, monkeypatch):
    kept = []

    class Watched(SelectedAttention):
        @staticmethod
        def forward(ctx, *args):
            kept.append(args[-1].selection)
            return SelectedAttention.forward(ctx, *args)

    monkeypatch.setattr(sparse_attention, "SelectedAttention", Watched)
    place = sparse_place(total=TOTAL, device=CPU)
    q, k, v = qkv(TOTAL)
    for _ in range(layers):
        config.make(Sizes(16, 4, 2, 8)).double()(
            Inputs(torch.zeros(1, TOTAL, 16, dtype=torch.float64), q, k, v, q, k, None), place=place
        )
    first, second = kept
    assert first.lo.dtype == torch.int32
    assert first.lo is second.lo and first.hi is second.hi


def test_what_is_alike_for_all_heads_is_kept_once(monkeypatch):
    kept, attend_here = [], sparse_ranks.attend_here

    def watched(*args, selection, **options):
        kept.append(selection)
        return attend_here(*args, selection=selection, **options)

    monkeypatch.setattr(sparse_ranks, "attend_here", watched)
    mixer = NsaConfig(block_size=8, compress_size=4, compress_stride=4).make(Sizes(16, 4, 2, 8)).double()
    q, k, v = qkv(TOTAL)
    mixer(
        Inputs(torch.zeros(1, TOTAL, 16, dtype=torch.float64), q, k, v, q, k, None),
        place=sparse_place(total=TOTAL, device=CPU),
    )
    (compressed,) = kept
    assert compressed.heads == 2 and compressed.lo.stride(2) == compressed.hi.stride(2) == 0


def test_losses_are_computed_where_they_are_minimised():
    mixer = SeerConfig(block_size=8, gate_dim=4).make(Sizes(16, 4, 2, 8)).double()
    for weight in mixer.parameters():
        torch.nn.init.normal_(weight)
    q, k, v = qkv(TOTAL)
    inputs = Inputs(torch.zeros(1, TOTAL, 16, dtype=torch.float64), q, k, v, q, k, None)
    losses = []
    mixer(inputs, place=sparse_place(total=TOTAL, device=CPU, losses=losses))
    assert len(losses) == 1 and losses[0] > 0
    mixer(inputs, place=sparse_place(total=TOTAL, device=CPU))  # nobody asks


def test_what_users_ought_to_know_is_said():
    heads = {"heads": 4, "kv_heads": 2}
    assert "not causal" in MosaConfig(selection="expert").note(**heads)
    assert "at random" in SeerConfig(mode="sparse").note(**heads)
    assert "no head sees" in S2Config(stride=9).note(**heads) and "copied" in S2Config(stride=3).note(**heads)
    for quiet in (MosaConfig(), SeerConfig(), S2Config(), S2Config(stride=2), MobaConfig()):
        assert quiet.note(**heads) is None


def test_blocks_of_one_token_are_whole_on_any_layout():
    layout = Layout("striped", 3)

    def on_rank(transport):
        place = sparse_place(total=TOTAL, device=CPU, layout=layout, group=transport)
        shards = [layout.shard(x, rank=transport.rank, dim=1) for x in qkv(TOTAL)]
        return Moba(MobaConfig(block_size=1, topk=TOTAL))(Inputs(shards[0], *shards, *shards[:2], None), place=place)

    whole = qkv(TOTAL)
    dense = sparse_place(total=TOTAL, device=CPU).attend_dense(*whole, sink_logits=None)
    got = layout.unshard(run_ranks(3, on_rank), dim=1)
    assert (got - dense).abs().max() < 1e-12
