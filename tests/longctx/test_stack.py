"""Stacks over ranks: which layout each layer has, and that what is sent is what was said."""

import dataclasses

import pytest
import torch

from longctx.attention_config import AttentionConfig
from longctx.batch import shard_samples
from longctx.loss import token_loss_sum
from longctx.mixers.layers import Layers
from longctx.parallel.cost import traffic
from longctx.parallel.layout import Layout
from longctx.parallel.loopback import run_ranks
from longctx.parallel.schedule import Shape
from longctx.parallel.transport import Alone
from longctx.stack import build_stack, describe_linear, stack_shape
from longctx.stack_traffic import choose_state_layout
from tests.longctx.test_mixers import BOUNDS, TOTAL, decoder, model_of, samples


def layers_of(attention: AttentionConfig, num_layers: int) -> Layers:
    return Layers(kinds=attention.kinds(num_layers), max_positions=TOTAL)


def shape_of(attention: AttentionConfig, num_layers: int = 4, *, cp: int = 4, total: int = TOTAL):
    layers, model = layers_of(attention, num_layers), model_of(num_layers)
    return stack_shape(attention, layers=layers, model=model, cp=cp, total=total, dtype=torch.float32)


@pytest.mark.parametrize(
    ("given", "total", "where"),
    [
        ({"layout": "contiguous"}, TOTAL, Layout("contiguous", 4)),
        ({"layout": "zigzag"}, TOTAL, Layout("zigzag", 4)),
        ({"layout": "striped"}, TOTAL, Layout("contiguous", 4)),
        ({"layout": "striped", "width": 15}, 1 << 14, Layout("contiguous", 4)),
        ({"layout": "striped", "width": 1 << 12}, 1 << 16, Layout("striped", 4, 1 << 12)),  # few states, many tokens
        ({"layout": "striped", "width": 16}, 1 << 12, Layout("contiguous", 4)),  # a state for every 16 tokens
        ({"layout": "striped", "state_layout": "zigzag"}, TOTAL, Layout("zigzag", 4)),
        ({"layout": "zigzag", "state_layout": "contiguous"}, TOTAL, Layout("contiguous", 4)),
        ({"layout": "striped", "width": 16, "state_layout": "same"}, TOTAL, Layout("striped", 4, 16)),
    ],
)
def test_where_linear_layers_run(given, total, where):
    attention = AttentionConfig(layers="gdn*3 + full", **given)
    attention.validate()
    shape = shape_of(attention, total=total)
    chosen = choose_state_layout(shape, attention.state_layout)
    assert chosen == where
    assert shape.layouts(chosen) == (where, where, where, attention.make_layout(4))
    if attention.state_layout is None and attention.width >= 16:
        sent = {each: shape.most(each).total for each in (attention.make_layout(4), Layout("contiguous", 4))}
        assert sent[chosen] == min(sent.values())


def test_without_softmax_layers_wide_stripes_have_no_reason():
    attention = AttentionConfig(layers="gdn", layout="striped", width=1 << 12)
    assert choose_state_layout(shape_of(attention, total=1 << 16), None) == Layout("contiguous", 4)


def test_one_rank_keeps_its_layout_and_sends_nothing():
    shape = shape_of(AttentionConfig(layers="gdn + full"), 2, cp=1)
    where = choose_state_layout(shape, None)
    assert where == Layout("striped", 1) and shape.traffic(where, rank=0).total == 0
    assert describe_linear(shape, states=where) == ["linear layers: 1 of gdn + full"]
    assert describe_linear(shape_of(AttentionConfig(), 2), states=where) == []


@pytest.mark.parametrize(
    ("layers", "relayouts"), [("gdn*3 + full", 1), ("full + gdn*2 + full", 2), ("gdn*4", 0), ("full + gdn", 3)]
)
@pytest.mark.parametrize("passing", ["all_gather", "ring"])
def test_what_is_sent_is_what_was_said(layers, relayouts, passing):
    """A run of neighbouring linear layers pays one relayout in and one out, and none at the ends of the stack."""
    attention = AttentionConfig(layers=layers, layout="striped", state_passing=passing)
    model = model_of(4)

    def work(transport):
        stack = build_stack(
            attention,
            layers=layers_of(attention, 4),
            model=model,
            total=TOTAL,
            dtype=torch.float64,
            transport=transport,
            per_machine=3,
        )
        batch = shard_samples(samples()[:1], stack=stack, device=torch.device("cpu"))
        module = decoder(stack)
        token_loss_sum(module(batch.tokens, places=stack.places(batch.plan)), batch.labels).backward()
        size = model.head_size
        heads = Shape(heads=2, kv_heads=1, head_dim=size, v_head_dim=size, dtype=torch.float64)
        kv = sum(sum(sent.bytes for sent in traffic(plan, heads)) for plan in batch.plan.softmax.values())
        kv *= len(stack.layers.softmax)
        said = stack.shape.traffic(stack.states, rank=transport.rank).total
        assert stack.shape.relayouts(stack.states).total() == relayouts
        return transport.traffic.bytes, kv + said

    for sent, said in run_ranks(3, work):
        assert sent == said


def test_bytes_of_states_do_not_grow_with_the_sequence_and_are_told():
    attention = AttentionConfig(layers="gdn*3 + full", layout="striped")
    short, long = (shape_of(attention, total=total) for total in (1 << 10, 1 << 14))
    where = Layout("contiguous", 4)
    assert short.most(where).states == long.most(where).states > 0
    assert 16 * short.most(where).moved == long.most(where).moved > 0
    lines = describe_linear(long, states=where, sequences=2)
    sent = long.most(where)
    assert f"{2 * sent.states / 1e3:,.1f} kB of states" in lines[0] and "3 of gdn*3 + full, contiguous" in lines[0]
    assert f"{2 * sent.moved / 1e6:,.1f} MB" in lines[1] and "1 of the hidden states" in lines[1]


def test_pairs_are_those_of_every_softmax_layer():
    attention = AttentionConfig(layers="window*2 + full + gdn", window=4, layout="contiguous")
    stack = build_stack(
        attention,
        layers=layers_of(attention, 4),
        model=model_of(4),
        total=TOTAL,
        dtype=torch.float64,
        transport=Alone(),
        per_machine=1,
    )
    lengths = [b - a for a, b in zip(BOUNDS[0], BOUNDS[0][1:], strict=False)]
    full = sum(n * (n + 1) // 2 for n in lengths)
    window = sum(sum(min(i + 1, 4) for i in range(n)) for n in lengths)
    assert stack.visible_pairs(BOUNDS[0], total=TOTAL) == 2 * window + full
    batch = shard_samples(samples()[:1], stack=stack, device=torch.device("cpu"))
    assert batch.visible_pairs == 2 * window + full
    assert dataclasses.replace(attention, layers=None).kinds(2) == ("window", "window")
