"""Illegal products of the four factors, each with its error; what the mask keys mean; the library entry."""

import pytest
import torch

from longctx.attention import ContextParallelAttention, context_parallel_attention
from longctx.attention_config import AttentionConfig
from longctx.config import load_config
from longctx.kernels.mask import causal, chunked, documents, per_head, predicate, prefix_lm, sliding_window
from longctx.loss import IGNORED
from longctx.parallel.layout import Layout
from longctx.parallel.loopback import run_ranks
from longctx.parallel.registry import ScheduleOptions, resolve_schedule
from longctx.parallel.schedules.ring import DoubleRing, Ring, Ulysses, Usp
from longctx.setup import mask_changes
from tests.support.attention import LAYOUTS, SCHEDULES, assert_equal, dense, make_problem, make_schedule

BOUNDS = (0, 10, 15, 40)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"schedule": "tree"}, "attention.schedule=tree is not known; known are ring, double_ring"),
        ({"layout": "spiral"}, "attention.layout=spiral is not known"),
        ({"width": 0}, "attention.width must be >= 1"),
        ({"layout": "zigzag", "width": 2}, "attention.width=2 needs attention.layout=striped"),
        ({"schedule": "local"}, "attention.layout must be contiguous; given striped. Use attention.schedule=ring"),
        (
            {"inner": 2},
            "attention.inner=2 is an option of attention.schedule=double_ring; given attention.schedule=ring",
        ),
        ({"ulysses": 2}, "attention.ulysses=2 is an option of attention.schedule=usp"),
        ({"innermost": "ring"}, "attention.innermost=ring is an option of attention.schedule=usp"),
        ({"gather_heads": 2}, "attention.gather_heads=2 is an option of attention.schedule=all_gather"),
        ({"schedule": "all_gather", "backward": "rotate_q"}, "attention.backward=rotate_q is an option of .*ring"),
        ({"schedule": "ulysses", "backward": "rotate_kv"}, "attention.backward=rotate_kv is an option of .*ring"),
        ({"backward": "sideways"}, "attention.backward=sideways is not known; known are auto, rotate_kv, rotate_q"),
        ({"schedule": "usp", "innermost": "heads"}, "attention.innermost=heads is not known; known are ulysses, ring"),
        ({"schedule": "usp", "ulysses": 0}, "attention.ulysses must be >= 1 or null; given 0"),
        ({"schedule": "double_ring", "inner": -1}, "attention.inner must be >= 1 or null; given -1"),
        ({"layout": "auto", "width": 4}, "attention.layout=auto chooses attention.width too"),
        ({"schedule": "auto", "inner": 4}, "attention.schedule=auto chooses attention.inner too"),
        ({"window": 0}, "attention.window must be >= 1 or null; given 0"),
        ({"chunk": 0}, "attention.chunk must be >= 1 or null; given 0"),
        ({"prefix": 0}, "attention.prefix must be >= 1 or null; given 0"),
        ({"sinks": -1, "window": 2}, "attention.sinks must be >= 0; given -1"),
        ({"sinks": 4, "head_windows": [None, None]}, "attention.sinks=4 keeps"),
        ({"sinks": 4}, "attention.sinks=4 keeps tokens visible outside a window; set attention.window, or sinks=0"),
        ({"window": 4, "head_windows": [4, None]}, "attention.window and attention.head_windows exclude each other"),
        ({"head_windows": [4, 0]}, "attention.head_windows must be >= 1 or null each"),
        (
            {"kernel": "cuda"},
            "attention.kernel=cuda is not known; known are auto, torch, triton",
        ),
        ({"layers": "gdm"}, "attention.layers: 'gdm' is no kind of layer"),
        (
            {"layers": "gdn", "window": 64},
            "attention.window is that of layers of kind window, of which .* names none",
        ),
        ({"layers": "gdn", "head_windows": [4, None]}, "attention.head_windows is that of layers of kind window"),
        ({"layers": "window + full"}, "names layers of kind window: set attention.window"),
        (
            {"layers": "gdn", "chunk": 64},
            "chunk=64 has no effect: no layer of attention.layers=gdn is softmax",
        ),
        ({"layers": "gdn", "kernel": "torch"}, "kernels of other layers are set by mixers.<kind>.kernel"),
        ({"layers": "gdn", "backward": "rotate_q"}, "attention.backward=rotate_q has no effect"),
        (
            {"state_passing": "ring"},
            "attention.state_passing=ring has no effect: no layer of attention.layers=null is linear",
        ),
        ({"layers": "full", "state_layout": "same"}, "attention.state_layout=same has no effect"),
        (
            {"layers": "gdn", "state_passing": "tree"},
            "attention.state_passing=tree is not known; known are ring",
        ),
        ({"layers": "gdn", "state_splits": 2}, "attention.state_splits=2 is an option of .*=pipelined"),
        (
            {"layers": "gdn", "state_layout": "striped"},
            "attention.state_layout=striped is not known; known are same",
        ),
        ({"layers": "gdn + full", "width": 15, "state_layout": "same"}, "stripe of 15 token.* attention.width >= 16"),
    ],
)
def test_what_can_never_work_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        AttentionConfig(**given).validate()


@pytest.mark.parametrize(
    ("given", "cp", "heads", "kv_heads", "words"),
    [
        (
            {"schedule": "double_ring", "inner": 3},
            4,
            8,
            8,
            "attention.inner=3 .* must divide parallel.cp=4; .* 1, 2, 4",
        ),
        ({"schedule": "usp", "ulysses": 3}, 4, 8, 8, "attention.ulysses=3 .* must divide parallel.cp=4; .* 1, 2, 4"),
        ({"schedule": "usp", "ulysses": 4}, 8, 6, 6, "attention.ulysses=4 .* must divide model.num_heads=6; .* 1, 2$"),
        (
            {"schedule": "ulysses"},
            4,
            6,
            6,
            "parallel.cp=4 must divide model.num_heads=6; use attention.schedule=usp with",
        ),
        ({"schedule": "all_gather", "gather_heads": 4}, 2, 8, 2, "between 1 and model.num_kv_heads=2"),
        ({"schedule": "local", "layout": "contiguous"}, 2, 8, 2, "keeps a sequence on one rank; the group has 2"),
    ],
)
def test_what_does_not_fit_the_ranks_or_the_heads_is_refused(given, cp, heads, kv_heads, words):
    config = AttentionConfig(**given)
    config.validate()
    with pytest.raises(ValueError, match=words):
        config.make_schedule(cp, heads=heads, kv_heads=kv_heads, per_machine=cp)


def test_head_windows_need_a_window_for_each_head():
    with pytest.raises(ValueError, match=r"attention.head_windows needs model.num_heads=4 entries; given 3"):
        AttentionConfig(head_windows=[1, 2, 3]).check_heads(4)


def test_options_reach_the_schedule():
    def make(cp=8, per_machine=4, **given):
        return AttentionConfig(**given).make_schedule(cp, heads=8, kv_heads=2, per_machine=per_machine)

    assert make() == Ring() and make(backward="rotate_q") == Ring(backward_moves="rotate_q")
    assert make(schedule="double_ring") == DoubleRing(ranks_per_ring=4)
    assert make(schedule="double_ring", inner=2) == DoubleRing(ranks_per_ring=2)
    assert make(schedule="ulysses") == Ulysses()
    assert make(schedule="usp") == Usp(ulysses=4)
    assert make(schedule="usp", ulysses=2, innermost="ring") == Usp(ulysses=2, innermost="ring")
    assert make(schedule="usp", cp=6, per_machine=8).ulysses == 2  # divides six ranks and eight heads
    assert resolve_schedule("usp", ScheduleOptions(ulysses=8)).teams(8).count == 1


@pytest.mark.parametrize(
    ("given", "mask"),
    [
        ({}, causal() & documents(BOUNDS)),
        ({"documents": False}, causal()),
        ({"window": 5}, sliding_window(4) & documents(BOUNDS)),
        ({"window": 5, "sinks": 2}, sliding_window(4, sinks=2) & documents(BOUNDS)),
        ({"chunk": 6}, causal() & chunked(6) & documents(BOUNDS)),
        ({"prefix": 4}, prefix_lm(4) & documents(BOUNDS)),
        ({"prefix": 4, "window": 3}, prefix_lm(4) & documents(BOUNDS) & sliding_window(2, None)),
        ({"head_windows": [3, None]}, per_head([sliding_window(2), causal()]) & documents(BOUNDS)),
    ],
)
def test_mask_keys(given, mask):
    assert AttentionConfig(**given).mask(BOUNDS) == mask


def test_a_token_whose_successor_it_sees_has_no_label():
    """In a prefix of 4 the first three tokens see the next one; the fourth predicts what it does not see."""
    labels = torch.arange(40)
    AttentionConfig(prefix=4).hide_visible_labels(labels, BOUNDS)
    hidden = {first + i for first in BOUNDS[:-1] for i in range(3)}
    assert {i for i in range(40) if labels[i] == IGNORED} == hidden
    positions = torch.arange(40)
    sees_next = AttentionConfig(prefix=4).mask(BOUNDS).allowed(positions[:-1], positions[1:]).diagonal()
    assert {i for i in range(39) if sees_next[i]} == hidden
    plain = torch.arange(40)
    AttentionConfig().hide_visible_labels(plain, BOUNDS)
    assert torch.equal(plain, torch.arange(40))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_library_entry(schedule):
    problem, layout, mask = make_problem(4 * 6, (8, 4), batch=2), Layout("zigzag", 4), causal() & documents((0, 9, 24))

    def rank(transport):
        q, k, v, dout = (
            layout.shard(x, rank=transport.rank, dim=1).requires_grad_()
            for x in (problem.q, problem.k, problem.v, problem.dout)
        )
        way = make_schedule(schedule, 4)
        options = {"layout": "zigzag", "schedule": way, "mask": mask, "group": transport}
        out, lse = context_parallel_attention(q, k, v, return_lse=True, **options)
        alone = context_parallel_attention(q, k, v, **options)
        assert torch.equal(alone, out)
        return [out.detach(), lse, *torch.autograd.grad(out, (q, k, v), dout)]

    ranks = run_ranks(4, rank)
    got = [layout.unshard([each[i] for each in ranks], dim=2 if i == 1 else 1) for i in range(5)]
    assert_equal(got, dense(problem, [mask])[:5], 1e-10)


def test_library_entry_on_one_process():
    problem = make_problem(11, (4, 2), batch=3)
    out = context_parallel_attention(problem.q, problem.k, problem.v)
    assert_equal([out], dense(problem, [causal()])[:1], 1e-12)
    masks = [causal(), sliding_window(2), documents((0, 4, 11))]
    out = context_parallel_attention(problem.q, problem.k, problem.v, mask=masks, layout="contiguous", schedule="local")
    assert_equal([out], dense(problem, masks)[:1], 1e-12)


@pytest.mark.parametrize("kernel", ["torch", "reference"])
def test_autocast_changes_nothing(kernel):
    """Inside, partial results keep the accumulators' dtype whatever the caller's autocast says."""
    problem = make_problem(16, (4, 2)).to(torch.float32)

    def grads(dtype, softcap):
        q, k, v = (x.to(dtype).requires_grad_() for x in (problem.q, problem.k, problem.v))
        out = context_parallel_attention(q, k, v, kernel=kernel, softcap=softcap)
        return [out, *torch.autograd.grad(out, (q, k, v), problem.dout.to(dtype))]

    for dtype, softcap in ((torch.float32, None), (torch.float32, 2.0), (torch.bfloat16, None)):
        plain = grads(dtype, softcap)
        with torch.autocast("cpu", torch.bfloat16):
            assert all(torch.equal(a, b) for a, b in zip(grads(dtype, softcap), plain, strict=True))


def test_masks_of_any_integers_are_equal_and_other_masks_are_refused():
    assert documents(torch.tensor([0, 3, 8])) == documents((0, 3, 8)) == documents([0, torch.tensor(3), 8])
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match="mask must be a mask of longctx.kernels.mask, or one per row; given Tensor"):
        context_parallel_attention(q, q, q, mask=torch.ones(4, 4, dtype=torch.bool))


def test_bad_calls_are_refused():
    attention = ContextParallelAttention(layout=Layout("striped", 1), schedule=Ring(), transport=_alone())
    plan = attention.plan([causal()], total=8)
    q = torch.zeros(3, 8, 4, 8)
    refused = [
        ("one dtype", lambda: attention(q, q.double(), q, plan=plan)),
        (r"with T = 8 tokens, as planned; given \(3, 7, 4, 8\)", lambda: attention(*[q[:, :7]] * 3, plan=plan)),
        ("as planned", lambda: attention(q, q, q[:, :, :2], plan=plan)),
        ("must be .B, T, H, D.", lambda: attention(q[0], q[0], q[0], plan=plan)),
        ("multiple of num_kv_heads; given 4 and 3", lambda: attention(q, q[:, :, :3], q[:, :, :3], plan=plan)),
        (
            r"sink_logits must be \[H\] = \[4\]; given \(2,\)",
            lambda: attention(q, q, q, plan=plan, sink_logits=q[0, :2, 0, 0]),
        ),
        ("softcap must be a finite number > 0", lambda: attention(q, q, q, plan=plan, softcap=-1.0)),
        ("need one mask, or one per row; given none", lambda: attention.plan([], total=8)),
        (
            "one mask or one per row; given 2 for a batch of 3",
            lambda: attention(q, q, q, plan=attention.plan([causal(), sliding_window(2)], total=8)),
        ),
        (
            "the mask has 2 heads, q has 4",
            lambda: attention(q, q, q, plan=attention.plan([per_head([causal(), sliding_window(1)])], total=8)),
        ),
        (
            "attention.kernel=torch cannot serve this: an arbitrary predicate has no band",
            lambda: context_parallel_attention(q, q, q, mask=predicate(lambda i, j: i >= j), kernel="torch"),
        ),
        ("given 2 for a batch of 3", lambda: attention(q, q, q, plan=attention.plan([causal()] * 2, total=8))),
        ("must be float64, float32, bfloat16 or float16", lambda: context_parallel_attention(*[q.int()] * 3)),
        ("softmax_scale must be a finite number > 0", lambda: attention(q, q, q, plan=plan, softmax_scale=0.0)),
        ("one per row; given str", lambda: context_parallel_attention(q, q, q, mask="causal")),
        ("group must be a torch.distributed process group", lambda: context_parallel_attention(q, q, q, group=3)),
        ("attention.backward=sideways is not known", lambda: Ring(backward_moves="sideways")),
        ("attention.innermost=outermost is not known", lambda: Usp(ulysses=2, innermost="outermost")),
        ("attention.layout=spiral is not known", lambda: context_parallel_attention(q, q, q, layout="spiral")),
        ("attention.schedule=tree is not known", lambda: context_parallel_attention(q, q, q, schedule="tree")),
    ]
    for words, call in refused:
        with pytest.raises(ValueError, match=words):
            call()
    for layout, schedule in ((Layout("zigzag", 1), Ring()), (Layout("striped", 1), Ring(backward_moves="rotate_q"))):
        other = ContextParallelAttention(layout=layout, schedule=schedule, transport=_alone())
        with pytest.raises(ValueError, match="the plan is rank 0's for .*; this is rank 0 with"):
            other(q, q, q, plan=plan)
    with pytest.raises(ValueError, match="for cp=2, the transport's group has 1"):
        ContextParallelAttention(layout=Layout("striped", 2), schedule=Ring(), transport=_alone())


def _alone():
    from longctx.parallel.transport import Alone

    return Alone()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_total_that_ranks_cannot_share_is_refused(layout):
    with pytest.raises(ValueError, match="data.seq_len=30 cannot be divided by parallel.cp=4 .*: use a multiple of 4"):
        Layout(LAYOUTS[layout][0], 4, LAYOUTS[layout][1]).segments(0, 30)


def test_a_mask_that_differs_from_the_checkpoints_is_told_key_by_key():
    saved = {"documents": True, "window": 64, "layout": "zigzag"}
    assert mask_changes(saved, AttentionConfig(window=64)) == []
    assert mask_changes(saved, AttentionConfig(sinks=2, window=8)) == [
        "attention.window was 64, is 8",
        "attention.sinks was 0, is 2",
    ]


def test_a_prefix_of_whole_sequences_is_refused():
    with pytest.raises(ValueError, match="attention.prefix=8192 leaves nothing to predict in sequences"):
        load_config(["attention.prefix=8192"])
