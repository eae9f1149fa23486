"""Landmark, MoSA, Routing Transformer and SLA against their formulas, query by query; what a token may move."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.kernels.block_sparse.selection import Selection, allowed
from longctx.mixers.sparse.base import Inputs, Sizes, SparseMixer, SparseMixerConfig
from longctx.mixers.sparse.landmark import LandmarkConfig
from longctx.mixers.sparse.mosa import MosaConfig
from longctx.mixers.sparse.routing import RoutingConfig
from longctx.mixers.sparse.sla import SlaConfig
from longctx.model import ModelConfig, initial_weight
from longctx.rope import apply_rope, rope_table
from longctx.verification.whole_sparse import WholeSparse

DIM, HEAD_DIM = 10, 6
SAMPLES = ((13, 1, 7, 25, 1), (5, 42), (47,))  # documents of rows of 47 tokens
TOTAL = 47

LANDMARK = LandmarkConfig(block_size=4, topk=3)
CHUNK = MosaConfig(chunk=6, sparsity=3, block_size=8)
EXPERT = MosaConfig(selection="expert", sparsity=3, block_size=8)
ROUTING = RoutingConfig(clusters=3, window=4, commitment=0.3, block_size=8)
SLA = SlaConfig(block_size=4, topk=3)
ALL = {"landmark": LANDMARK, "chunk": CHUNK, "expert": EXPERT, "routing": ROUTING, "sla": SLA}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def document_of(*rows: tuple[int, ...]) -> Tensor:
    return torch.stack([torch.tensor((0, *row[:-1])).cumsum(0).repeat_interleave(torch.tensor(row)) for row in rows])


def made(config: SparseMixerConfig, heads: int = 4, kv_heads: int = 2) -> SparseMixer:
    config.validate("kind")
    mixer = config.make(Sizes(DIM, heads, kv_heads, HEAD_DIM)).double()
    for seed, parameter in enumerate(mixer.parameters()):
        parameter.data = draw(*parameter.shape, seed=100 + seed)
    return mixer


def made_inputs(batch: int, heads: int = 4, kv_heads: int = 2, *, sinks: bool = False) -> Inputs:
    sizes = {"q": heads, "k": kv_heads, "v": kv_heads, "plain_q": heads, "plain_k": kv_heads}
    parts = {
        name: draw(batch, TOTAL, count, HEAD_DIM, seed=seed).requires_grad_()
        for seed, (name, count) in enumerate(sizes.items(), start=1)
    }
    logits = draw(heads, seed=7).requires_grad_() if sinks else None
    return Inputs(x=draw(batch, TOTAL, DIM).requires_grad_(), **parts, sink_logits=logits)


Row = tuple[list[int], list[Tensor]]  # keys and their weights


def best(scores: Tensor, count: int) -> list[int]:
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda at: (-values[at], at))[:count]


def softmax(scores: Tensor, sink: Tensor | None) -> Tensor:
    weights = torch.softmax(scores if sink is None else torch.cat([scores, sink[None]]), dim=0)
    return weights[: len(scores)]


class Formulas:
    """The papers' formulas for row `b`, query `t` and head `h`, with nothing of ours but `best`."""

    def __init__(self, mixer: SparseMixer, inputs: Inputs, documents: Tensor, softcap: float | None = None) -> None:
        self.mixer, self.settings, self.inputs, self.documents = mixer, mixer.settings, inputs, documents
        self.softcap = softcap
        self.group = inputs.q.shape[2] // inputs.k.shape[2]

    def first(self, b: int, t: int) -> int:
        return int(self.documents[b if len(self.documents) > 1 else 0, t])

    def end(self, b: int, t: int) -> int:
        same = self.documents[b if len(self.documents) > 1 else 0] == self.first(b, t)
        return int(same.nonzero().max()) + 1

    def scores(self, b: int, t: int, h: int, keys: Tensor) -> Tensor:
        raw = keys @ self.inputs.q[b, t, h] * HEAD_DIM**-0.5
        return raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)

    def sink(self, h: int) -> Tensor | None:
        return None if self.inputs.sink_logits is None else self.inputs.sink_logits[h]

    def attend(self, b: int, t: int, h: int, keys: list[int], v: Tensor | None = None) -> Tensor:
        kv = h // self.group
        values = self.inputs.v[b, :, kv] if v is None else v
        return softmax(self.scores(b, t, h, self.inputs.k[b, keys, kv]), self.sink(h)) @ values[keys]

    def blocks_before(self, b: int, t: int) -> list[list[int]]:
        size, first = self.settings.block_size, self.first(b, t)
        before = range(first // size, t // size)
        return [list(range(max(n * size, first), (n + 1) * size)) for n in before]

    def own_block(self, b: int, t: int) -> list[int]:
        return list(range(max(t // self.settings.block_size * self.settings.block_size, self.first(b, t)), t + 1))

    def landmark(self, b: int, t: int, h: int) -> Tensor:
        kv, before, own = h // self.group, self.blocks_before(b, t), self.own_block(b, t)
        k, v = self.inputs.k[b, :, kv], self.inputs.v[b, :, kv]
        marks = torch.stack([k[keys[-1]] @ self.mixer.landmark_weight[kv] for keys in before]) if before else k[:0]
        marks = self.scores(b, t, h, marks)
        picked = best(marks.detach(), self.settings.topk - 1)
        items = torch.cat([self.scores(b, t, h, k[own]), marks[picked]])
        weights = softmax(items, self.sink(h))
        out = weights[: len(own)] @ v[own]
        for at, block in enumerate(picked):
            inside = torch.softmax(self.scores(b, t, h, k[before[block]]), dim=0)
            out = out + weights[len(own) + at] * (inside @ v[before[block]])
        return out

    def router(self, b: int, keys: list[int] | int, h: int) -> Tensor:
        return torch.sigmoid(self.inputs.x[b, keys] @ self.mixer.router.weight[h // self.group])

    def chunk(self, b: int, t: int, h: int) -> Tensor:
        size, first = self.settings.chunk, self.first(b, t)
        start = first + (t - first) // size * size
        keys = list(range(start, t + 1))
        for begin in range(first, start, size):
            r = self.router(b, list(range(begin, begin + size)), h).detach()
            keys += [begin + at for at in best(r, size // self.settings.sparsity)]
        r = self.router(b, list(range(TOTAL)), h)
        return self.attend(b, t, h, keys, self.inputs.v[b, :, h // self.group] * r[:, None])

    def expert(self, b: int, t: int, h: int) -> Tensor:
        first, end = self.first(b, t), self.end(b, t)
        r = self.router(b, list(range(first, end)), h)
        keys = [first + at for at in best(r.detach(), math.ceil((end - first) / self.settings.sparsity))]
        if t not in keys:
            return torch.zeros(HEAD_DIM, dtype=torch.float64)
        return self.attend(b, t, h, [key for key in keys if key <= t]) * r[t - first]

    def cluster(self, x: Tensor, kv: int) -> int:
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        cosines = F.normalize(self.mixer.centroids[kv], dim=-1) @ x
        return best(cosines.detach(), 1)[0]

    def routing(self, b: int, t: int, h: int) -> Tensor:
        kv = h // self.group
        mine = self.cluster(self.inputs.plain_q[b, t].unflatten(0, (-1, self.group))[kv].mean(0), kv)
        before = range(self.first(b, t), t + 1)
        keys = [key for key in before if self.cluster(self.inputs.plain_k[b, key, kv], kv) == mine]
        return self.attend(b, t, h, sorted({*keys[-self.settings.window :], t}))

    def sla(self, b: int, t: int, h: int) -> Tensor:
        kv, before = h // self.group, self.blocks_before(b, t)
        k, v, q = self.inputs.k[b, :, kv], self.inputs.v[b, :, kv], self.inputs.q[b, t, h]
        means = torch.stack([k[keys].mean(0) for keys in before]) if before else k[:0]
        picked = best((means @ q).detach(), self.settings.topk - 1)
        keys = self.own_block(b, t) + [key for block in picked for key in before[block]]
        rest = [key for block, keys in enumerate(before) if block not in picked for key in keys]
        out = self.attend(b, t, h, keys)
        if rest:
            weights = torch.softmax(k[rest], dim=-1) @ torch.softmax(q, dim=-1)
            out = out + (weights / weights.sum()) @ v[rest] @ self.mixer.rest_weight[h]
        return out

    def all(self, formula: str) -> Tensor:
        query: Callable[[int, int, int], Tensor] = getattr(self, formula)
        batch, tokens, heads = self.inputs.q.shape[:3]
        rows = [torch.stack([query(b, t, h) for h in range(heads)]) for b in range(batch) for t in range(tokens)]
        return torch.stack(rows).unflatten(0, (batch, tokens))


def compare(formula: str, config: SparseMixerConfig, inputs: Inputs, documents: Tensor, softcap: float | None) -> None:
    mixer = made(config, inputs.q.shape[2], inputs.k.shape[2])
    got = mixer(inputs, place=WholeSparse(document_of=documents, softcap=softcap))
    want = Formulas(mixer, inputs, documents, softcap).all(formula)
    assert (got - want).abs().max() < 1e-10
    leaves = [x for x in (*inputs, *mixer.parameters()) if x is not None]
    dout = draw(*got.shape, seed=50)
    ours, true = (
        torch.autograd.grad(out, leaves, dout, materialize_grads=True, allow_unused=True) for out in (got, want)
    )
    for mine, theirs in zip(ours, true, strict=True):
        assert (mine - theirs).abs().max() < 1e-10
    reached = {
        name
        for (name, _), grad in zip(mixer.named_parameters(), ours[-len(list(mixer.parameters())) :], strict=True)
        if grad.any()
    }
    assert reached == {name for name, _ in mixer.named_parameters()} - {"centroids"}


@pytest.mark.parametrize("heads", [(4, 2), (2, 2)])
@pytest.mark.parametrize("name", ALL)
def test_outputs_and_gradients_are_those_of_the_formulas(name, heads):
    sinks = ALL[name].takes_sinks
    compare(name, ALL[name], made_inputs(3, *heads, sinks=sinks), document_of(*SAMPLES), softcap=None)


@pytest.mark.parametrize("name", ALL)
def test_rows_may_share_their_documents_and_scores_be_capped(name):
    compare(name, ALL[name], made_inputs(2), document_of(SAMPLES[0]), softcap=1.5)


@pytest.mark.parametrize("name", ["landmark", "sla"])
@pytest.mark.parametrize("topk", [1, 100])
def test_the_own_block_alone_and_all_blocks(name, topk):
    inputs, documents = made_inputs(1), document_of(SAMPLES[1])
    mixer = made(replace(ALL[name], topk=topk))
    got = mixer(inputs, place=WholeSparse(document_of=documents))
    formulas = Formulas(mixer, inputs, documents)
    assert (got - formulas.all(name)).abs().max() < 1e-10
    if name == "sla" and topk == 100:
        whole = torch.stack([formulas.attend(0, t, 0, list(range(formulas.first(0, t), t + 1))) for t in range(TOTAL)])
        assert (got[0, :, 0] - whole).abs().max() < 1e-10
    torch.autograd.grad(got.sum(), inputs.q)


def test_landmark_with_all_blocks_is_the_papers_grouped_softmax():
    """GroupedSoftmax(x, g)_i = exp(x_i) / sum of exp(x_j) over j with g_j = g_i, of tokens and landmarks."""
    inputs, mixer = made_inputs(1), made(replace(LANDMARK, topk=100))
    got = mixer(inputs, place=WholeSparse(document_of=document_of(SAMPLES[2])))
    size, whole = LANDMARK.block_size, TOTAL // LANDMARK.block_size
    for head in (0, 3):
        k, v, q = inputs.k[0, :, head // 2], inputs.v[0, :, head // 2], inputs.q[0, :, head]
        marks = k[size - 1 :: size][:whole] @ mixer.landmark_weight[head // 2]
        for t in range(TOTAL):
            own = t // size
            x = torch.cat([k[: t + 1] @ q[t], marks[:own] @ q[t]]) * HEAD_DIM**-0.5
            group = torch.cat([torch.arange(t + 1) // size, torch.full((own,), own)])  # landmarks join the own block
            e = torch.exp(x)
            grouped = e / torch.zeros(own + 1, dtype=e.dtype).index_add(0, group, e)[group]
            of_landmark = torch.cat([grouped[t + 1 :], torch.ones(1, dtype=e.dtype)])  # own tokens are not multiplied
            weights = grouped[: t + 1] * of_landmark[group[: t + 1]]
            assert (weights.sum() - 1).abs() < 1e-12
            assert (got[0, t, head] - weights @ v[: t + 1]).abs().max() < 1e-10


def test_centroids_learn_the_means_of_their_clusters():
    inputs, mixer = made_inputs(2), made(ROUTING)
    place = WholeSparse(document_of=document_of(SAMPLES[0]))
    mixer(inputs, place=place)
    (loss,) = place.losses
    formulas, want = Formulas(mixer, inputs, place.document_of), torch.zeros((), dtype=torch.float64)
    for b in range(2):
        for t in range(TOTAL):
            for kv in range(2):
                for x in (inputs.plain_k[b, t, kv], inputs.plain_q[b, t, 2 * kv : 2 * kv + 2].mean(0)):
                    centre = mixer.centroids[kv, formulas.cluster(x, kv)]
                    want = want + (F.layer_norm(x, (HEAD_DIM,)).detach() - centre).square().sum()
    want = want * ROUTING.commitment / (HEAD_DIM * 2)
    assert (loss - want).abs() < 1e-10
    (dc,), (true,) = (torch.autograd.grad(each, mixer.centroids) for each in (loss, want))
    assert (dc - true).abs().max() < 1e-10 and dc.any()
    place.losses.clear()
    mixer.eval()(inputs, place=place)
    assert not place.losses, "centroids stand still in evaluation"


def outputs(mixer: SparseMixer, x: Tensor, documents: Tensor) -> Tensor:
    """Return a layer's outputs for x `[1, T, DIM]`: everything that it is given is made of x."""
    q, k, v = (
        (x @ draw(DIM, count * HEAD_DIM, seed=seed)).unflatten(-1, (-1, HEAD_DIM))
        for seed, count in ((1, 4), (2, 2), (3, 2))
    )
    rope = rope_table(torch.arange(TOTAL), head_dim=HEAD_DIM, theta=100.0, dtype=torch.float64)
    inputs = Inputs(x, apply_rope(q, rope), apply_rope(k, rope), v, plain_q=q, plain_k=k, sink_logits=None)
    return mixer(inputs, place=WholeSparse(document_of=documents))[0]


def moved(config: SparseMixerConfig, documents: Tensor) -> Tensor:
    """Return which outputs move with which token: bool `[token, output]`."""
    mixer, x = made(config), draw(1, TOTAL, DIM)
    before, rows = outputs(mixer, x, documents), []
    for token in range(TOTAL):
        other = x.clone()
        other[0, token] = -2 * x[0, token] + draw(DIM, seed=token)
        rows.append((outputs(mixer, other, documents) - before).abs().amax((1, 2)) > 1e-9)
    return torch.stack(rows)


@pytest.mark.parametrize("name", ALL)
def test_a_token_moves_nothing_before_it_and_no_other_document(name):
    documents = document_of(SAMPLES[0])
    found, place = moved(ALL[name], documents), torch.arange(TOTAL)
    same = documents[0][:, None] == documents[0]
    assert not found[~same].any()
    backwards = found & (place < place[:, None])
    if name == "expert":
        assert backwards.any(), "expert choice is not causal: if it has become so, say so in its settings"
    else:
        assert not backwards.any()
        assert found.diagonal().all(), "every output depends on its own token"
    ahead = found & (place > place[:, None])
    assert ahead.sum() > TOTAL, "the probe sees what moves"


@pytest.mark.parametrize(("name", "weight"), [("landmark", "landmark_weight"), ("sla", "rest_weight")])
def test_what_layers_begin_as(name, weight):
    mixer = made(ALL[name])
    shape = getattr(mixer, weight).shape
    start = initial_weight(f"blocks.0.attention.mixer.{weight}", shape, config=ModelConfig(), seed=1)
    assert torch.equal(start, torch.eye(HEAD_DIM).expand(shape) if name == "landmark" else torch.zeros(shape))


def seen_pairs(config: SparseMixerConfig, begin: int, length: int) -> float:
    """Return the pairs of a head that attention is asked for, on the average, in the document of that length."""
    found: list[Tensor] = []

    class Counting(WholeSparse):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, *, selection: Selection, **options: object) -> Tensor:
            found.append(allowed(selection, self.positions))
            return super().attend(q, k, v, selection=selection, **options)

    rest = TOTAL - begin - length
    documents = document_of(tuple(size for size in (begin, length, rest) if size))
    made(config)(made_inputs(1), place=Counting(document_of=documents))
    return found[0][0, :, begin : begin + length].sum().item() / found[0].shape[1]


@pytest.mark.parametrize(("begin", "length"), [(0, 47), (8, 30), (4, 1), (12, 27)])
def test_pairs(begin, length):
    for config in (LANDMARK, replace(LANDMARK, topk=1), CHUNK, EXPERT, RoutingConfig(clusters=1, window=4)):
        assert config.pairs(begin, length) == seen_pairs(config, begin, length)
    assert SLA.pairs(begin, length) == 2 * seen_pairs(SLA, begin, length)
    even = sum(min(4, (t + 1) / 3) + 2 / 3 for t in range(length))  # clusters with the same share of keys
    assert ROUTING.pairs(begin, length) == pytest.approx(even, abs=1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LandmarkConfig(topk=0), "mixers.kind.topk must be >= 1; given 0"),
        (SlaConfig(block_size=0), "mixers.kind.block_size must be >= 1; given 0"),
        (SlaConfig(feature_map="relu"), "mixers.kind.feature_map=relu is not known; known are softmax, elu1"),
        (MosaConfig(selection="expert", chunk=100), "mixers.kind.chunk=100 has no effect"),
        (MosaConfig(selection="token"), "mixers.kind.selection=token is not known; known are chunk, expert"),
        (MosaConfig(chunk=100), "mixers.kind.chunk=100 must be a multiple of mixers.kind.sparsity=16"),
        (MosaConfig(sparsity=0), "mixers.kind.sparsity must be >= 1; given 0"),
        (RoutingConfig(window=0), "mixers.kind.window must be >= 1; given 0"),
        (RoutingConfig(commitment=0.0), "mixers.kind.commitment must be > 0 and finite"),
    ],
)
def test_settings_that_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        config.validate("kind")


def test_what_layouts_and_models_are_told():
    for config in ALL.values():
        config.validate("kind")
        assert config.whole == (4 if config in (LANDMARK, SLA) else 1)
        assert config.takes_sinks == (config is not SLA)
    MosaConfig(selection="expert").validate("kind")
