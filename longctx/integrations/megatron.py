"""Context-parallel attention in the `core_attention` slot of megatron-core layers; needs megatron-core >= 0.15.

    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = longctx_core_attention()

Megatron owns the model, the process groups and the sum of gradients over dp x cp; replaced is `softmax(q k) v` with its
communication. The batch must be cut by the same layout. Who rotates q and k is an argument, because Megatron's own RoPE
knows one layout only (zigzag: chunks r and 2 cp - 1 - r) and cannot be seen from here: see `rope` and `check_model`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from longctx.attention import context_parallel_attention
from longctx.integrations.megatron_config import (
    check_config,
    documents_of,
    head_masks_of,
    mask_of,
    schedule_of,
    window_of,
)
from longctx.kernels.mask import HeadMasks, Mask, full
from longctx.parallel.layout import Layout, LayoutName
from longctx.parallel.schedule import Schedule
from longctx.rope import apply_rope

# Global positions, int64 [T], to cosines and sines, [T, R / 2] each: the first R dims of a head are rotated.
Rope = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of `longctx_core_attention`, which explains them."""

    layout: LayoutName = "zigzag"
    width: int = 1
    schedule: Schedule | str | None = None
    kernel: str = "auto"
    rope: Rope | Literal["megatron"] | None = "megatron"
    mask: Mask | HeadMasks = field(default_factory=full)
    softcap: float | None = None


class LongctxCoreAttention(MegatronModule):  # type: ignore[misc]  # megatron-core has no types for mypy
    """Attend over the context-parallel group that Megatron gives; one object per layer.

    Learnable `softmax_offset [heads of this tp rank]` if `config.softmax_type` is "learnable", under the name that
    Megatron's own attention has in checkpoints.
    """

    options: ClassVar[Options] = Options()
    softmax_offset: Tensor | None

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        """Read the layer's part of Megatron's config; a field that cannot be honoured is a ValueError."""
        super().__init__(config=config)
        check_config(config, attention_type=attention_type, attention_dropout=attention_dropout)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.tp_group: ProcessGroup = pg_collection.tp
        # A model part may be without context parallelism where others have a group for it.
        self.cp_group: ProcessGroup | None = pg_collection.cp if config.context_parallel_size > 1 else None
        self.cp_rank: int = 0 if self.cp_group is None else self.cp_group.rank()
        cp = 1 if self.cp_group is None else self.cp_group.size()
        if cp != config.context_parallel_size:
            raise ValueError(
                f"context_parallel_size={config.context_parallel_size}, but pg_collection.cp has {cp} rank(s)"
            )
        options = self.options
        self.layout = Layout(options.layout, cp, options.width)
        self.schedule = schedule_of(options.schedule, cp_comm_type)
        if options.rope == "megatron" and cp > 1 and options.layout != "zigzag":
            raise ValueError(
                f"Megatron rotates q and k as if layout were zigzag; given layout={options.layout} at cp={cp}. Build "
                'the model with position_embedding_type="none" and give rope=partial(rope_table, ...), or rope=None'
            )
        self.rope = None if isinstance(options.rope, str) else options.rope
        if self.rope is not None and config.rotary_interleaved:
            raise ValueError('rope=... rotates pairs (i, i + R/2); for rotary_interleaved=True use rope="megatron"')
        if config.no_rope_freq and config.no_rope_freq[layer_number - 1]:
            self.rope = None
        self.attn_mask_type = attn_mask_type
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        mask = head_masks_of(options.mask, rank=self.tp_group.rank(), size=self.tp_group.size())
        self.mask = mask & (window_of(*config.window_size) if windowed else full())
        # apply_query_key_layer_scaling divides here and multiplies again in float32: for us the same number.
        self.softmax_scale: float = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self._add_softmax_offset()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend this rank's queries to every rank's keys. All ranks of the cp group call it together.

        Args:
            query: `[s, b, hq, d]` with s this rank's tokens in the layout's order; `[s, hq, d]` with `thd`.
            key, value: `[s, b, hkv, d]`, or `[s, hkv, d]`; hkv divides hq.
            attention_mask: None. Megatron's dense one has s^2 elements; the mask comes from the other arguments.
            attn_mask_type: `causal` or `no_mask`; with documents `padding_causal` and `padding` mean the same.
            attention_bias: None.
            packed_seq_params: `thd`, unpadded, whose `cu_seqlens` are those of the whole sequence, in stream order.

        Returns:
            `[s, b, hq * d]`, or `[s, hq * d]` with `thd`, in query's dtype.

        Raises:
            ValueError: an argument that cannot be honoured, or that contradicts another.
        """
        if attention_mask is not None:
            raise ValueError(
                f"attention_mask must be None; given {tuple(attention_mask.shape)}. Pass none to the model "
                "(--no-create-attention-mask-in-dataloader) and documents as packed_seq_params"
            )
        if attention_bias is not None:
            raise ValueError("attention_bias must be None: longctx adds nothing to the logits")
        if key.shape[0] != query.shape[0]:
            raise ValueError(
                f"query has {query.shape[0]} tokens and key {key.shape[0]}: cross attention and inference with a KV "
                "cache are not supported"
            )
        total = query.shape[0] * self.layout.cp
        bounds = None if packed_seq_params is None else self._bounds(packed_seq_params, total)
        mask = self.mask & mask_of(attn_mask_type or self.attn_mask_type, bounds)
        if bounds is None:
            q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        else:
            q, k, v = (x.unsqueeze(0) for x in (query, key, value))
        if self.rope is not None:
            table = _tables(self.rope, self.layout, self.cp_rank, total, bounds, q.device)
            q, k = _rotate(q, table), _rotate(k, table)
        out = context_parallel_attention(
            q,
            k,
            v,
            layout=self.layout,
            schedule=self.schedule,
            mask=mask,
            group=self.cp_group,
            kernel=self.options.kernel,
            softmax_scale=self.softmax_scale,
            softcap=self.options.softcap,
            sink_logits=self.softmax_offset,
        )
        assert isinstance(out, Tensor)  # lse is not asked for
        out = out.flatten(2)
        return out.transpose(0, 1).contiguous() if bounds is None else out[0]

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return what Megatron's distributed checkpoints save: the learnable offsets, spread over tp."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )

    def _add_softmax_offset(self) -> None:
        """Set the logit per head that joins the softmax without a value: none, 0, or learnable."""
        config = self.config
        if config.softmax_type == "vanilla":
            self.softmax_offset = None
            return
        device = torch.device("cpu" if config.use_cpu_initialization else "cuda")
        heads = config.num_attention_heads // self.tp_group.size()
        zeros = torch.zeros(heads, dtype=config.params_dtype, device=device)
        if config.softmax_type == "off-by-one":
            self.register_buffer("softmax_offset", zeros, persistent=False)
            return
        self.softmax_offset = nn.Parameter(zeros)
        set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)
        if config.perform_initialization:
            config.init_method(self.softmax_offset)

    def _bounds(self, packed: PackedSeqParams, total: int) -> tuple[int, ...]:
        if self.options.rope == "megatron" and self.layout.cp > 1:
            raise ValueError(
                "at cp > 1 Megatron's RoPE takes each document to be cut zig-zag by itself; longctx cuts the stream: "
                'build the model with position_embedding_type="none" and give rope=partial(rope_table, ...)'
            )
        if packed.cp_group not in (None, self.cp_group) or packed.local_cp_size not in (None, self.layout.cp):
            raise ValueError(
                f"packed_seq_params asks for cp={packed.local_cp_size} or another cp_group; this layer keeps its own, "
                f"of {self.layout.cp} rank(s)"
            )
        return documents_of(packed, total=total)


def longctx_core_attention(
    *,
    layout: LayoutName = "zigzag",
    width: int = 1,
    schedule: Schedule | str | None = None,
    kernel: str = "auto",
    rope: Rope | Literal["megatron"] | None = "megatron",
    mask: Mask | HeadMasks | None = None,
    softcap: float | None = None,
) -> type[LongctxCoreAttention]:
    """Return the class to put into a layer spec's `core_attention`.

    Args:
        layout: the token layout by which the batch, labels and position ids are cut; `Layout(layout, cp, width).shard`.
        width: tokens per stripe, for `striped`.
        schedule: a schedule or its name; None takes what `config.cp_comm_type` asks for: p2p is ring, all_gather is
            all_gather, a2a is ulysses.
        kernel: `auto` or a kernel by name.
        rope: who rotates q and k. "megatron": the model, by `position_embedding_type="rope"` or "yarn", which is right
            with layout zigzag only. A function from positions to (cos, sin) such as `partial(rope_table, head_dim=128,
            theta=500_000)`: this class, at the layout's positions, counted from each document's start; the model has
            "none". None: nobody.
        mask: combined by `&` with what Megatron's config says: attention sinks, chunks, ... A mask per head is for all
            heads of the model, not only this tp rank's.
        softcap: logits s become softcap * tanh(s / softcap).

    Raises:
        ValueError: an unknown layout, or a width that it has no use for.
    """
    Layout(layout, 1, width)
    options = Options(
        layout=layout,
        width=width,
        schedule=schedule,
        kernel=kernel,
        rope=rope,
        mask=full() if mask is None else mask,
        softcap=softcap,
    )
    return type("LongctxCoreAttention", (LongctxCoreAttention,), {"options": options})


def check_model(model: nn.Module) -> None:
    """Refuse a model whose position embedding contradicts `rope`: q and k would be rotated twice, or not at all.

    Call it once on each built GPTModel. An attention sees rotated tensors only, so it cannot tell by itself.
    """
    for owner in model.modules():
        kind = getattr(owner, "position_embedding_type", None)
        if kind not in ("rope", "yarn", "mrope", "none"):
            continue
        for name, layer in owner.named_modules():
            if not isinstance(layer, LongctxCoreAttention):
                continue
            ours = layer.options.rope
            if (ours == "megatron") != (kind != "none"):
                raise ValueError(
                    f"the model has position_embedding_type={kind!r} and {name} has rope={ours!r}, but one of the two "
                    'must rotate q and k: give rope="megatron" with "rope" or "yarn", another rope with "none"'
                )
            if kind == "mrope" and layer.layout.cp > 1:
                raise ValueError('position_embedding_type="mrope" is not supported at cp > 1')


@lru_cache(maxsize=4)
def _tables(
    rope: Rope, layout: Layout, rank: int, total: int, bounds: tuple[int, ...] | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines for a rank's tokens; layers share them."""
    positions = layout.positions(rank, total)
    if bounds is not None:
        starts = torch.tensor(bounds[:-1])
        positions -= starts[torch.searchsorted(starts, positions, right=True) - 1]
    cos, sin = rope(positions.to(device))
    return cos, sin


def _rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first dims of `x [b, s, h, d]`, as many as the table has."""
    rotated = 2 * table[0].shape[-1]
    if rotated == x.shape[-1]:
        return apply_rope(x, table)
    return torch.cat((apply_rope(x[..., :rotated], table), x[..., rotated:]), dim=-1)
