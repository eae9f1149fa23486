"""MoBA, NSA and SeerAttention as layers: against the papers token by token, in every gradient; what must not leak."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longctx.kernels.block_sparse.patterns.counts import triangle
from longctx.mixers.sparse.base import Inputs, Sizes, SparseMixer
from longctx.mixers.sparse.moba import MobaConfig
from longctx.mixers.sparse.nsa import NsaConfig
from longctx.mixers.sparse.seer import SeerConfig
from longctx.model import ModelConfig, initial_weight
from longctx.rope import apply_rope, rope_table
from longctx.verification.whole_sparse import WholeSparse
from tests.kernels.block_sparse.routing_cases import (
    attend,
    documents,
    draw,
    moba_choice,
    nsa_choice,
    nsa_compressed,
    seer_choice,
    seer_logits,
    seer_target,
    tokens_of,
)

DIM, HEAD_DIM, THETA = 5, 4, 100.0
ROWS = ((13, 1, 7, 16, 2), (5, 3, 1, 1, 29))
TOTAL = 39
HEADS = [(2, 2), (4, 2), (3, 1)]

MOBA = MobaConfig(block_size=4, topk=3)
NSA = NsaConfig(block_size=4, compress_size=4, compress_stride=2, select=4, local=2, window=5)
SEER = SeerConfig(block_size=4, topk=3, gate_dim=6, rope_theta=THETA, mode="sparse")
KINDS = {
    "moba": MOBA,
    "moba-own": replace(MOBA, topk=1),
    "nsa": NSA,
    "nsa-same": replace(NSA, compress_size=2, select=6, local=1),
    "seer": SEER,
    "seer-nope": replace(SEER, rope=False, gate_dim=None),
    "seer-threshold": replace(SEER, topk=6, threshold=0.2),
}


def make(config, heads=(4, 2)) -> SparseMixer:
    """Return a layer with random parameters, float64."""
    mixer = config.make(Sizes(DIM, heads[0], heads[1], HEAD_DIM)).double()
    with torch.no_grad():
        for seed, parameter in enumerate(mixer.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=100 + seed))
    return mixer


def random_inputs(heads=(4, 2), *, total=TOTAL, batch=2, grad=True, sinks=False) -> Inputs:
    sizes = (heads[0], heads[1], heads[1], heads[0], heads[1])
    x = draw(batch, total, DIM, seed=1).requires_grad_(grad)
    parts = [draw(batch, total, count, HEAD_DIM, seed=2 + n).requires_grad_(grad) for n, count in enumerate(sizes)]
    return Inputs(x, *parts, sink_logits=draw(heads[0], seed=9).requires_grad_(grad) if sinks else None)


def from_x(x: Tensor, heads=(4, 2)) -> Inputs:
    """Return the inputs of a layer with fixed projections and RoPE."""
    weights = [draw(DIM, count * HEAD_DIM, seed=20 + n) for n, count in enumerate((heads[0], heads[1], heads[1]))]
    q, k, v = ((x @ weight).unflatten(-1, (-1, HEAD_DIM)) for weight in weights)
    rope = rope_table(torch.arange(x.shape[1]), head_dim=HEAD_DIM, theta=THETA, dtype=torch.float64)
    return Inputs(x, apply_rope(q, rope), apply_rope(k, rope), v, q, k, None)


def selected(q, k, v, blocks, t, start, size):
    return attend(q[t], k, v, [j for block in sorted(blocks) for j in tokens_of(block, size, start, t)])


def naive_moba(config, mixer, one, t, start, head):
    """Return the outputs of a KV head's group at t: `[G, D]`; `one` is the row's q `[G, T, D]`, k, v, ..."""
    choices = [moba_choice(q, one["k"], t, start, size=config.block_size, topk=config.topk) for q in one["q"]]
    return torch.stack(
        [
            selected(q, one["k"], one["v"], blocks, t, start, config.block_size)
            for q, blocks in zip(one["q"], choices, strict=True)
        ]
    )


def naive_nsa(config, mixer, one, t, start, head):
    grid = {"size": config.compress_size, "stride": config.compress_stride}
    keys, values = (list(nsa_compressed(one[name], t, start, **grid).values()) for name in "kv")
    blocks = nsa_choice(
        one["q"], one["k"], t, start, **grid, block_size=config.block_size, select=config.select, local=config.local
    )
    gates = torch.sigmoid(mixer.branch_gates.weight @ one["x"][t]).unflatten(0, (3, -1))
    outs = []
    for index, q in enumerate(one["q"]):
        branches = (
            attend(q[t], torch.stack(keys), torch.stack(values), range(len(keys))) if keys else torch.zeros(HEAD_DIM),
            selected(q, one["k"], one["v"], blocks, t, start, config.block_size),
            attend(q[t], one["k"], one["v"], range(max(start, t - config.window + 1), t + 1)),
        )
        of_head = gates[:, head * len(one["q"]) + index]
        outs.append(sum(gate * out for gate, out in zip(of_head, branches, strict=True)))
    return torch.stack(outs)


def naive_gate(config, mixer, one, t, start, head):
    theta = config.rope_theta if config.rope else None
    weights = (mixer.gate_q[head], mixer.gate_k[head])
    return seer_logits(one["plain_q"], one["plain_k"], *weights, t, start, size=config.block_size, theta=theta)


def naive_seer(config, mixer, one, t, start, head):
    logits = naive_gate(config, mixer, one, t, start, head)
    blocks = seer_choice(logits, t, size=config.block_size, topk=config.topk, threshold=config.threshold)
    return torch.stack([selected(q, one["k"], one["v"], blocks, t, start, config.block_size) for q in one["q"]])


NAIVE = {MobaConfig: naive_moba, NsaConfig: naive_nsa, SeerConfig: naive_seer}


def each_group(inputs: Inputs, document_of: Tensor):
    """Yield row, t, KV head, what a group has of a row, and where t's document starts."""
    kv_heads = inputs.k.shape[2]
    for row in range(len(inputs.q)):
        for head in range(kv_heads):
            one = {"x": inputs.x[row]}
            one |= {name: getattr(inputs, name)[row, :, head] for name in ("k", "v", "plain_k")}
            for name in ("q", "plain_q"):
                one[name] = getattr(inputs, name)[row].unflatten(1, (kv_heads, -1))[:, head].transpose(0, 1)
            for t in range(inputs.q.shape[1]):
                yield row, t, head, one, int(document_of[row, t])


def naive(config, mixer, inputs: Inputs, document_of: Tensor) -> Tensor:
    outs = [
        NAIVE[type(config)](config, mixer, one, t, start, head)
        for _, t, head, one, start in each_group(inputs, document_of)
    ]
    batch, total, _, size = inputs.q.shape
    return (
        torch.stack(outs)
        .view(batch, -1, total, inputs.q.shape[2] // inputs.k.shape[2], size)
        .permute(0, 2, 1, 3, 4)
        .flatten(2, 3)
    )


def leaves(mixer, inputs) -> list[Tensor]:
    return [x for x in (*inputs, *mixer.parameters()) if x is not None and x.requires_grad]


def gradients(out, wrt) -> list[Tensor]:
    grads = torch.autograd.grad((out * draw(*out.shape, seed=50)).sum(), wrt, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(wrt, grads, strict=True)]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients(kind, heads):
    config, document_of = KINDS[kind], documents(*ROWS)
    mixer, inputs = make(config, heads), random_inputs(heads)
    out = mixer(inputs, place=WholeSparse(document_of=document_of))
    want = naive(config, mixer, inputs, document_of)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-10)
    wrt = leaves(mixer, inputs)
    assert len(wrt) == 6 + (kind.startswith("nsa"))
    for ours, theirs in zip(gradients(out, wrt), gradients(want, wrt), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_leaks_to_earlier_tokens_or_other_documents(kind):
    mixer, document_of = make(KINDS[kind]), documents(ROWS[0])
    place = WholeSparse(document_of=document_of)
    x = draw(1, TOTAL, DIM, seed=3)
    with torch.no_grad():
        out = mixer(from_x(x), place=place)
        for t in range(TOTAL):
            for size in (-5.0, 0.1, 7.0):  # so much that selections change, in either direction
                moved = x.clone()
                moved[0, t] += size
                difference = (mixer(from_x(moved), place=place) - out).abs().amax((0, 2, 3))
                inside = (torch.arange(TOTAL) >= t) & (document_of[0] == document_of[0, t])
                assert (difference[~inside] == 0).all() and difference[t] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_beginning_gives_what_it_gives_in_the_whole(kind):
    mixer, document_of = make(KINDS[kind]), documents((39,))
    x = draw(1, TOTAL, DIM, seed=3)
    with torch.no_grad():
        out = mixer(from_x(x), place=WholeSparse(document_of=document_of))
        for count in (1, 3, 16, 30):
            got = mixer(from_x(x[:, :count]), place=WholeSparse(document_of=document_of[:, :count]))
            torch.testing.assert_close(got, out[:, :count], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_that_begin_with_a_block_give_what_they_give_alone(kind):
    mixer, lengths = make(KINDS[kind]), (12, 4, 19)
    x = draw(1, sum(lengths), DIM, seed=3)
    whole = from_x(x)
    with torch.no_grad():
        packed = mixer(whole, place=WholeSparse(document_of=documents(lengths)))
        for one, out in zip(x.split(lengths, dim=1), packed.split(lengths, dim=1), strict=True):
            alone = mixer(from_x(one), place=WholeSparse(document_of=documents((one.shape[1],))))
            torch.testing.assert_close(alone, out, rtol=0, atol=1e-10)


@pytest.mark.parametrize("config", [replace(MOBA, topk=10), replace(SEER, topk=10)])
def test_all_blocks_are_dense_attention(config):
    mixer, inputs = make(config), random_inputs(sinks=True)
    place = WholeSparse(document_of=documents(*ROWS), softcap=2.0)
    out = mixer(inputs, place=place)
    want = place.attend_dense(inputs.q, inputs.k, inputs.v, sink_logits=inputs.sink_logits)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-10)
    wrt = leaves(mixer, inputs)
    for ours, theirs in zip(gradients(out, wrt), gradients(want, wrt), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("config", [replace(MOBA, topk=1), replace(SEER, topk=1)])
def test_one_block_is_causal_attention_in_blocks(config):
    mixer, inputs, document_of = make(config), random_inputs(), documents(*ROWS)
    place = WholeSparse(document_of=document_of)
    blocks = WholeSparse(document_of=torch.maximum(document_of, torch.arange(TOTAL) // 4 * 4))
    want = blocks.attend_dense(inputs.q, inputs.k, inputs.v, sink_logits=None)
    torch.testing.assert_close(mixer(inputs, place=place), want, rtol=0, atol=1e-10)


def test_all_of_nsa_is_two_dense_branches_and_the_compressed_one():
    mixer, inputs = make(replace(NSA, select=10, window=TOTAL)), random_inputs()
    place = WholeSparse(document_of=documents(*ROWS))
    dense = place.attend_dense(inputs.q, inputs.k, inputs.v, sink_logits=None)
    with torch.no_grad():
        mixer.branch_gates.weight[:4] = -1e3  # closes the compressed branch where x > 0
    x = draw(2, TOTAL, DIM, seed=1).abs()
    gates = torch.sigmoid(x @ mixer.branch_gates.weight.T).unflatten(-1, (3, -1))
    out = mixer(inputs._replace(x=x), place=place)
    torch.testing.assert_close(out, (gates[:, :, 1] + gates[:, :, 2])[..., None] * dense, rtol=0, atol=1e-10)


def test_bfloat16_stays_bfloat16():
    for config in KINDS.values():
        mixer, inputs = make(config).bfloat16(), Inputs(*(x.bfloat16() for x in random_inputs()[:6]), None)
        out = mixer(inputs, place=WholeSparse(document_of=documents(*ROWS)))
        assert out.dtype == torch.bfloat16 and out.isfinite().all()


def naive_loss(config, mixer, inputs: Inputs, document_of: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    group = inputs.q.shape[2] // inputs.k.shape[2]
    for _, t, head, one, start in each_group(inputs, document_of):
        logits = naive_gate(config, mixer, one, t, start, head)
        if logits:
            sinks = None
            if inputs.sink_logits is not None:
                sinks = inputs.sink_logits[head * group : (head + 1) * group].detach()
            target = seer_target(one["q"].detach(), one["k"].detach(), t, start, size=config.block_size, sinks=sinks)
            total = total + (target * (target.log() - torch.stack(list(logits.values())).log_softmax(0))).sum()
    return total / inputs.k.shape[2]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("sinks", [False, True])
def test_distillation(heads, sinks):
    config, document_of = replace(SEER, mode="distill"), documents(*ROWS)
    mixer, inputs = make(config, heads), random_inputs(heads, sinks=sinks)
    place = WholeSparse(document_of=document_of)
    out = mixer(inputs, place=place)
    dense = place.attend_dense(inputs.q, inputs.k, inputs.v, sink_logits=inputs.sink_logits)
    torch.testing.assert_close(out, dense, rtol=0, atol=0)
    (loss,) = place.losses
    want = naive_loss(config, mixer, inputs, document_of)
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=0)
    weights = list(mixer.parameters())
    for ours, theirs in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(want, weights), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10 * float(theirs.abs().max()))
    again = WholeSparse(document_of=document_of)
    mixer(inputs, place=again)
    rest = [x for x in inputs if x is not None]
    assert all(grad is None for grad in torch.autograd.grad(again.losses[0], rest, allow_unused=True))


def test_only_training_distills_and_sparse_gates_are_frozen():
    document_of = documents(*ROWS)
    place = WholeSparse(document_of=document_of)
    mixer = make(replace(SEER, mode="distill")).eval()
    mixer(random_inputs(), place=place)
    sparse = make(SEER)
    sparse(random_inputs(), place=place)
    assert place.losses == []
    assert not any(parameter.requires_grad for parameter in sparse.parameters())


def test_distillation_learns():
    """Keys of a block have something in common: from the repository's initial weights KL falls by far."""
    config = SeerConfig(block_size=4, topk=3, rope_theta=THETA)
    model = ModelConfig(vocab_size=2)
    mixer = config.make(Sizes(DIM, 4, 2, 8))
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            parameter.copy_(initial_weight(name, parameter.shape, config=model, seed=0))
    document_of = documents((30, 66))
    q, k = draw(1, 96, 4, 8, seed=1).float(), draw(1, 96, 2, 8, seed=2).float()
    k = k + 2 * draw(1, 24, 2, 8, seed=3).float().repeat_interleave(4, dim=1)
    inputs = Inputs(draw(1, 96, DIM, seed=4).float(), q, k, k, q, k, None)
    optimizer = torch.optim.Adam(mixer.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        place = WholeSparse(document_of=document_of)
        mixer(inputs, place=place)
        optimizer.zero_grad()
        place.losses[0].backward()
        optimizer.step()
        losses.append(float(place.losses[0].detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (MobaConfig(block_size=0), "mixers.x.block_size must be >= 1; given 0"),
        (MobaConfig(topk=0), "mixers.x.topk must be >= 1"),
        (NsaConfig(compress_stride=0), "compress_stride must be >= 1"),
        (NsaConfig(compress_size=24), "compress_size=24 must be a multiple of mixers.x.compress_stride=16"),
        (NsaConfig(block_size=40), "block_size=40 must be a multiple of mixers.x.compress_stride=16"),
        (NsaConfig(compress_size=128), "compress_size=128 must be <= mixers.x.block_size=64"),
        (NsaConfig(select=2), "select=2 must be >= 3"),
        (NsaConfig(window=0), "window must be >= 1"),
        (SeerConfig(mode="both"), "mode=both is not known; known are distill, sparse"),
        (SeerConfig(threshold=1.5), "threshold must be > 0 and < 1"),
        (SeerConfig(gate_dim=7), "gate_dim=7 must be even"),
        (SeerConfig(rope_theta=0.0), "rope_theta must be > 0"),
    ],
)
def test_impossible_settings(config, match):
    with pytest.raises(ValueError, match=match):
        config.validate("x")


def test_defaults_are_possible():
    for config, whole, sinks in ((MobaConfig(), 512, True), (NsaConfig(), 64, False), (SeerConfig(), 64, True)):
        config.validate("x")
        assert config.whole == whole and config.takes_sinks == sinks
    SeerConfig(gate_dim=7, rope=False).validate("x")


@pytest.mark.parametrize("begin", [0, 3, 8])
@pytest.mark.parametrize("length", [1, 6, 31])
def test_pairs(begin, length):
    def routed(t, others):
        return t - max(begin, t // 4 * 4) + 1 + 4 * min(others, t // 4 - begin // 4)

    tokens = range(begin, begin + length)
    assert MOBA.pairs(begin, length) == sum(routed(t, 2) for t in tokens)
    assert SEER.pairs(begin, length) == sum(routed(t, 2) for t in tokens)
    assert replace(SEER, mode="distill").pairs(begin, length) == triangle(length)
    seen = {t: len(nsa_compressed(torch.zeros(begin + length, 1), t, begin, size=4, stride=2)) for t in tokens}
    want = sum(routed(t, 3) + min(5, t - begin + 1) + seen[t] for t in tokens)
    assert NSA.pairs(begin, length) == want
