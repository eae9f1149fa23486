"""GPTModel with our core_attention at cp=2 against cp=1 and against dense attention: logits, loss, all gradients.

megatron-core is imported by the ranks only, inside of functions: it takes seconds.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx.kernels.mask import full, per_head, sliding_window
from longctx.parallel.layout import Layout
from tests.support.megatron import HEAD_DIM, HEADS, TIMEOUT, VOCABULARY, Case, build, float32_rope, megatron

if importlib.util.find_spec("megatron") is None:
    pytest.skip("megatron-core is not installed", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[3]


CASES = {
    "zigzag-megatron_rope": Case(layout="zigzag", rope="megatron"),
    "zigzag-odd_shard": Case(layout="zigzag", total=22),
    "striped-gqa": Case(),
    "striped-mha": Case(kv_heads=4),
    "striped3-mqa": Case(width=3, kv_heads=1),
    "contiguous-all_gather": Case(layout="contiguous", schedule="all_gather"),
    "striped-a2a": Case(config={"cp_comm_type": "a2a"}),
    "zigzag-bidirectional": Case(layout="zigzag", mask="no_mask"),
    "striped-window": Case(config={"window_size": (5, 0), "window_attn_skip_freq": 2}),
    "striped-documents": Case(batch=1, cu_seqlens=(0, 1, 8, 8, 19, 24)),
    "contiguous-documents-padding_causal": Case(
        layout="contiguous", batch=1, cu_seqlens=(0, 7, 24), mask="padding_causal", config={"no_rope_freq": [0, 1]}
    ),
    "striped-learnable": Case(config={"softmax_type": "learnable"}),
    "zigzag-off_by_one": Case(layout="zigzag", config={"softmax_type": "off-by-one", "softmax_scale": 0.5}),
}


class DenseCoreAttention(nn.Module):
    """Attention as its definition reads, on whole sequences."""

    def __init__(
        self, config, layer_number, attn_mask_type, attention_type, cp_comm_type, softmax_scale, pg_collection
    ):
        super().__init__()
        self.scale = HEAD_DIM**-0.5 if softmax_scale is None else softmax_scale
        self.causal = "causal" in attn_mask_type.name
        self.window = None if config.window_size is None or layer_number % 2 == 0 else config.window_size[0]
        self.sinks = config.softmax_type != "vanilla"
        if config.softmax_type == "learnable":
            self.softmax_offset = nn.Parameter(torch.empty(HEADS))
        else:
            self.register_buffer("softmax_offset", torch.zeros(HEADS), persistent=False)

    def forward(self, q, k, v, attention_mask, *, attn_mask_type, attention_bias, packed_seq_params):
        packed = q.dim() == 3
        q, k, v = (x.unsqueeze(1) if packed else x for x in (q, k, v))
        total, batch, heads, _ = q.shape
        k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
        i, j = torch.arange(total)[:, None], torch.arange(total)[None, :]
        seen = (j <= i) if self.causal else torch.ones(total, total, dtype=torch.bool)
        if self.window is not None:
            seen = seen & (i - j <= self.window)
        if packed:
            cu_seqlens = packed_seq_params.cu_seqlens_q
            document = (torch.arange(total)[:, None] >= cu_seqlens[None, :]).sum(1)
            seen = seen & (document[:, None] == document[None, :])
        scores = self.scale * torch.einsum("ibhd,jbhd->bhij", q, k)
        scores = scores.masked_fill(~seen, float("-inf"))
        if self.sinks:
            offset = self.softmax_offset.view(1, -1, 1, 1).expand(batch, -1, total, 1)
            scores = torch.cat((scores, offset), dim=-1)
        weights = scores.softmax(dim=-1)[..., :total]
        out = torch.einsum("bhij,jbhd->ibhd", weights, v)
        return out.flatten(2).squeeze(1) if packed else out.flatten(2)


def step(model: nn.Module, case: Case, layout: Layout, rank: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return this rank's logits and sum of token losses over the number of all tokens, and gradients of its loss."""
    from megatron.core.packed_seq_params import PackedSeqParams

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (case.batch, case.total + 1), generator=generator)
    tokens, labels = (layout.shard(x, rank=rank, dim=1) for x in (tokens[:, :-1], tokens[:, 1:]))
    packed = None
    if case.cu_seqlens is not None:
        bounds = torch.tensor(case.cu_seqlens, dtype=torch.int32)
        longest = int(bounds.diff().max())
        packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
    positions = layout.positions(rank, case.total).expand(case.batch, -1)
    logits = model(tokens, positions, attention_mask=None, packed_seq_params=packed)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / (case.batch * case.total)
    loss.backward()
    return logits.detach(), loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def dense_and_sharded(rank: int, world_size: int, group: Any, name: str) -> dict[str, Any]:
    """Return what dense attention, ours on one rank and ours on this rank's shard make of a case."""
    from longctx.integrations.megatron import check_model, longctx_core_attention

    case = CASES[name]
    own = case.rope == "ours"
    core = longctx_core_attention(
        layout=case.layout, width=case.width, schedule=case.schedule, rope=float32_rope if own else "megatron"
    )
    position_embedding = "none" if own else "rope"
    results = {}
    with megatron(cp=1):
        reference = build(case, cp=1, core=DenseCoreAttention, position_embedding="rope")
        for parameter in reference.parameters():
            nn.init.normal_(parameter, std=0.3)
        weights = reference.state_dict()
        results["dense"] = step(reference, case, Layout("contiguous", 1), 0)
        model = build(case, cp=1, core=core, position_embedding=position_embedding)
        model.load_state_dict(weights)
        results["one rank"] = step(model, case, Layout("contiguous", 1), 0)
    with megatron(cp=world_size):
        from megatron.core import parallel_state

        assert parallel_state.get_context_parallel_world_size() == world_size
        model = build(case, cp=world_size, core=core, position_embedding=position_embedding)
        check_model(model)
        model.load_state_dict(weights)
        layout = Layout(case.layout, world_size, case.width)
        results["schedule"] = model.decoder.layers[0].self_attention.core_attention.schedule
        results["sharded"] = step(model, case, layout, parallel_state.get_context_parallel_rank())
    return results


@pytest.mark.parametrize("name", CASES)
def test_context_parallel_equals_one_rank_equals_dense(gloo_pool, name):
    case = CASES[name]
    ranks = gloo_pool.run(dense_and_sharded, 2, name, timeout=TIMEOUT)
    logits, loss, gradients = ranks[0]["dense"]
    assert ranks[0]["one rank"][2].keys() == gradients.keys()
    assert ranks[0]["schedule"] == ("ulysses" if "cp_comm_type" in case.config else case.schedule or "ring")
    sharded = [rank["sharded"] for rank in ranks]
    layout = Layout(case.layout, 2, case.width)
    together = (
        layout.unshard([one[0] for one in sharded], dim=1),
        sharded[0][1] + sharded[1][1],
        {key: sharded[0][2][key] + sharded[1][2][key] for key in gradients},
    )
    for got in (ranks[0]["one rank"], together):
        torch.testing.assert_close(got[0], logits, rtol=0, atol=1e-10)
        torch.testing.assert_close(got[1], loss, rtol=0, atol=1e-10)
        for key, want in gradients.items():
            assert want.abs().max() > 1e-6, key
            torch.testing.assert_close(
                got[2][key], want, rtol=0, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}"
            )


WINDOWS = (1, 3, 6, None)


def heads_of_one_rank(rank: int, world_size: int, group: Any) -> dict[str, Any]:
    """Return what a tensor-parallel rank's attention makes of its half of the heads, and how it saves its offsets."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from longctx.integrations.megatron import longctx_core_attention

    mask = per_head([full() if window is None else sliding_window(window, sinks=2) for window in WINDOWS])
    core = longctx_core_attention(mask=mask, softcap=1.5)
    config = TransformerConfig(num_layers=1, hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS)
    config.attention_dropout, config.use_cpu_initialization, config.softmax_type = 0.0, True, "learnable"
    with megatron(cp=1, tp=world_size):
        attention = core(
            config=config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self"
        ).double()
        own = slice(rank * HEADS // world_size, (rank + 1) * HEADS // world_size)
        q, k, v, offsets = whole_heads()
        attention.load_state_dict({"softmax_offset": offsets[own]})
        out = attention(*(x[:, :, own] for x in (q, k, v)), None)
        saved = attention.sharded_state_dict("core_attention.")["core_attention.softmax_offset"]
    parallel = attention.softmax_offset.tensor_model_parallel
    return {"out": out.detach(), "saved": (saved.global_shape, saved.global_offset), "tensor_parallel": parallel}


def whole_heads() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    shape = (12, 1, HEADS, HEAD_DIM)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return q, k, v, torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)


def test_tensor_parallel_ranks_take_their_heads_of_masks_and_offsets(gloo_pool):
    ranks = gloo_pool.run(heads_of_one_rank, 2, timeout=TIMEOUT)
    q, k, v, offsets = whole_heads()
    i, j = torch.arange(12)[:, None], torch.arange(12)[None, :]
    scores = torch.einsum("ibhd,jbhd->bhij", q, k) * HEAD_DIM**-0.5
    scores = 1.5 * torch.tanh(scores / 1.5)
    for head, window in enumerate(WINDOWS):
        seen = (j <= i) & (torch.ones_like(j, dtype=torch.bool) if window is None else (i - j <= window) | (j < 2))
        scores[:, head] = scores[:, head].masked_fill(~seen, float("-inf"))
    scores = torch.cat((scores, offsets.view(1, -1, 1, 1).expand(1, -1, 12, 1)), dim=-1)
    want = torch.einsum("bhij,jbhd->ibhd", scores.softmax(-1)[..., :-1], v).flatten(2)
    torch.testing.assert_close(torch.cat([rank["out"] for rank in ranks], dim=-1), want, rtol=0, atol=1e-12)
    assert [rank["saved"] for rank in ranks] == [((4,), (0,)), ((4,), (2,))]
    assert all(rank["tensor_parallel"] for rank in ranks)


@pytest.mark.slow
def test_the_documented_example_learns(tmp_path):
    text = (ROOT / "docs/integrations.md").read_text()
    (code,) = re.findall(r"## megatron-core.*?```python\n(.*?)```", text, re.DOTALL)
    script = tmp_path / "gpt.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(losses) == 20
    assert losses[-1] < 0.5 * losses[0]
