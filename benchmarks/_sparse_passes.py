"""Forward and backward passes of sparse attention: the kernel alone, its routing, a whole layer; dense beside them."""

from collections.abc import Callable
from functools import partial

import torch
from _ranks import Pass, Problem
from torch import Tensor

from longctx.attention import ContextParallelAttention
from longctx.attention_config import AttentionConfig
from longctx.kernels.block_sparse.blocks import Blocks, block_mean, blocks_of
from longctx.kernels.block_sparse.routing.moba import moba_blocks
from longctx.kernels.block_sparse.selection import Selection, selected_blocks
from longctx.kernels.mask import causal
from longctx.mixers.config import MixersConfig
from longctx.mixers.layers import Layers
from longctx.mixers.sparse.moba import MobaConfig
from longctx.model import Block, ModelConfig, initial_weight
from longctx.parallel.layout import Layout
from longctx.parallel.registry import resolve_schedule
from longctx.parallel.transport import Alone
from longctx.sparse_attention import ContextParallelSparseAttention
from longctx.stack import build_stack

ONE = Layout("contiguous", 1)


def all_blocks(tokens: int, block_size: int, device: torch.device) -> Blocks:
    """Return the blocks of one document."""
    index = torch.arange(-(-tokens // block_size), device=device)
    return blocks_of(index, block_size=block_size, total=tokens, document_of=_start(tokens, device))


def route(problem: Problem, *, block_size: int, topk: int) -> Tensor:
    """Route as a layer of MoBA does: the blocks of every query, int64 `[1, T, H, topk]`."""
    tokens, device = problem.q.shape[1], problem.q.device
    blocks = all_blocks(tokens, block_size, device)
    means = block_mean(problem.k, blocks)
    positions = torch.arange(tokens, device=device)
    return moba_blocks(problem.q, means, blocks=blocks, positions=positions, first=_start(tokens, device), topk=topk)


def alike_in_blocks(chosen: Tensor, block_size: int) -> Tensor:
    """Give all queries of a block what its last one chose: as much as a table of blocks can say."""
    tokens = chosen.shape[1]
    begin = torch.arange(tokens, device=chosen.device) // block_size * block_size
    return chosen[:, (begin + block_size - 1).clamp(max=tokens - 1)]


def selection_of(chosen: Tensor, block_size: int) -> Selection:
    """Return the selection of chosen blocks."""
    tokens, device = chosen.shape[1], chosen.device
    return selected_blocks(
        chosen,
        block_size=block_size,
        positions=torch.arange(tokens, device=device),
        first=_start(tokens, device),
    )


def pairs_of(selection: Selection) -> int:
    """Return the visible pairs of a selection, the mean over its heads."""
    return int((selection.hi - selection.lo + 1).clamp(min=0).sum()) // selection.heads


class SelectedPass(Pass):
    """Attention to a selection that is there already: no routing."""

    def __init__(self, problem: Problem, selection: Selection, kernel: str) -> None:
        super().__init__(problem)
        self.selection = selection
        self.attention = ContextParallelSparseAttention(
            layout=ONE, schedule=resolve_schedule("local"), transport=Alone(), kernel=kernel
        )
        self.plan = self.attention.plan(None, total=problem.q.shape[1], device=problem.q.device)

    def forward(self) -> None:
        self.out = self.attention(self.q, self.k, self.v, selection=self.selection, plan=self.plan)


class DensePass(Pass):
    """Causal attention by the library's fastest kernel."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.attention = ContextParallelAttention(
            layout=ONE, schedule=resolve_schedule("local"), transport=Alone(), kernel="auto"
        )
        self.plan = self.attention.plan([causal()], total=problem.q.shape[1])

    def forward(self) -> None:
        self.out = self.attention(self.q, self.k, self.v, plan=self.plan)


class FlexPass(Pass):
    """flex_attention, compiled, on the table of blocks that a selection was made of."""

    def __init__(self, problem: Problem, chosen: Tensor, block_size: int) -> None:
        super().__init__(problem)
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        tokens, heads = problem.q.shape[1], problem.q.shape[2]
        table = chosen[0, block_size - 1 :: block_size].permute(1, 0, 2)  # [H, blocks, topk]
        count = -(-tokens // block_size)
        kept = table >= 0
        indices = torch.where(kept, table, count).sort(dim=-1).values.clamp(max=count - 1).to(torch.int32)

        def see(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return q >= k

        self.mask = BlockMask.from_kv_blocks(
            kept.sum(-1).to(torch.int32)[None],
            torch.nn.functional.pad(indices, (0, count - indices.shape[-1]))[None].contiguous(),
            BLOCK_SIZE=block_size,
            mask_mod=see,
            seq_lengths=(tokens, tokens),
        )
        self.op: Callable[..., Tensor] = partial(torch.compile(flex_attention), enable_gqa=heads != problem.k.shape[2])

    def forward(self) -> None:
        by_head = [x.transpose(1, 2) for x in (self.q, self.k, self.v)]
        self.out = self.op(*by_head, block_mask=self.mask).transpose(1, 2)


class LayerPass:
    """One decoder block, norms, projections and MLP included, forward and backward."""

    def __init__(
        self, problem: Problem, *, kind: str, block_size: int = 64, topk: int = 1, kernel: str = "auto"
    ) -> None:
        _, tokens, heads, head_dim = problem.q.shape
        device, dtype = problem.q.device, problem.q.dtype
        settings = MobaConfig(block_size=block_size, topk=topk, kernel=kernel)
        layers = Layers(kinds=(kind,), mixers=MixersConfig(moba=settings))
        dim = heads * head_dim
        config = ModelConfig(
            dim=dim, num_layers=1, num_heads=heads, num_kv_heads=problem.k.shape[2], hidden_dim=3 * dim, vocab_size=2
        )
        self.stack = build_stack(
            AttentionConfig(layout="contiguous", schedule="local", layers=None if kind == "full" else kind),
            layers=layers,
            model=config,
            total=tokens,
            dtype=dtype,
            transport=Alone(),
            per_machine=1,
        )
        self.block = Block(config, layers, 0)
        for name, weight in self.block.named_parameters():
            weight.data = initial_weight(name, weight.shape, config=config, seed=0)
        self.block.to(device=device, dtype=dtype)
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(1, tokens, dim, generator=generator).to(device, dtype).requires_grad_()
        self.dout = torch.randn(1, tokens, dim, generator=generator).to(device, dtype)
        plan = self.stack.plan([(0, tokens)], total=tokens, device=device)
        self.place = self.stack.places(plan)[0]
        self.out: Tensor

    def forward(self) -> None:
        self.out = self.block(self.x, rope=None, place=self.place)

    def backward(self) -> None:
        torch.autograd.grad(self.out, (self.x, *self.block.parameters()), self.dout)


def _start(tokens: int, device: torch.device) -> Tensor:
    return torch.zeros(1, tokens, dtype=torch.int64, device=device)
