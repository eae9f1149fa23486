"""Context-parallel attention for Hugging Face models: importing this registers `attn_implementation="longctx"`.

transformers calls two functions of ours. The mask interface is called once per forward pass and kind of layer. In place
of a dense mask it returns a `LayerMask`, which the model hands to its layers like any mask, and the attention interface
gets it back with q, k, v. What backward and activation checkpointing need travels in that object, not in the active
context: only the forward pass has to be inside `context_parallel`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from longctx.attention import context_parallel_attention
from longctx.integrations.huggingface_batch import document_positions, rows_of
from longctx.integrations.huggingface_checks import NAME, PREFIX, check_arguments, check_model
from longctx.integrations.huggingface_mask import CAUSAL, FULL, Pattern, causal_window, read_mask_function
from longctx.kernels.mask import HeadMasks, Mask, documents
from longctx.parallel.layout import Layout
from longctx.parallel.schedule import Schedule

OWN_ATTENTION = f"{PREFIX}: this model computes attention itself, not through transformers' AttentionInterface"


@dataclass(kw_only=True)
class ContextParallel:
    """How the sequences of a forward pass are shared between ranks."""

    layout: Layout
    group: dist.ProcessGroup | None
    schedule: Schedule | str
    kernel: str
    cu_seqlens: tuple[tuple[int, ...], ...]
    checked_positions: Tensor | None = field(default=None, repr=False)
    used: bool = False

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    def bind(self, pattern: Pattern) -> "LayerMask":
        """Return the mask of a kind of layer, with this context's documents."""
        masks = [pattern.mask & documents(cu_seqlens) for cu_seqlens in self.cu_seqlens] or [pattern.mask]
        return LayerMask(self, pattern, tuple(masks))

    def check_positions(self, position_ids: Tensor, *, tokens: int) -> None:
        """Refuse position ids that are not this rank's. The layers of a pass share the tensor: looked at once."""
        if position_ids is self.checked_positions:
            return
        total = tokens * self.layout.cp
        everywhere = self.layout.positions(self.rank, total)
        wanted = [everywhere.expand_as(position_ids)] if position_ids.shape[-1:] == everywhere.shape else []
        if wanted and self.cu_seqlens and position_ids.ndim == 2:
            ours = [document_positions(bounds, total=total)[everywhere] for bounds in self.cu_seqlens]
            if len(ours) in (1, position_ids.shape[0]):
                wanted.append(torch.stack(ours).expand_as(position_ids))
        given = position_ids.cpu()
        if position_ids.ndim != 2 or not any(torch.equal(given, positions) for positions in wanted):
            raise ValueError(
                f"{PREFIX}: position_ids must be the positions of rank {self.rank}'s tokens in layout "
                f"{self.layout.describe()}, [B, {tokens}] of a sequence of {total}, counted from the start of the "
                f"sequence or of the document; given {tuple(position_ids.shape)} starting with "
                f"{given.flatten()[:6].tolist()}. shard_batch makes them; a model that gets none counts 0, 1, 2, ..."
            )
        self.checked_positions = position_ids


@dataclass(frozen=True)
class LayerMask:
    """What layers get in place of a dense mask: the context and what one kind of layer sees, for all rows or each."""

    context: ContextParallel
    pattern: Pattern
    masks: tuple[Mask | HeadMasks, ...]

    def __getattr__(self, name: str) -> NoReturn:  # for attributes that this class does not have
        raise AttributeError(f"{OWN_ATTENTION} (it looks for {name!r} in the mask)")

    def __radd__(self, scores: object) -> NoReturn:
        raise ValueError(f"{OWN_ATTENTION} (it adds the mask to its scores)")


_current: ContextVar[ContextParallel | None] = ContextVar("longctx.integrations.huggingface", default=None)


@contextmanager
def context_parallel(
    *,
    layout: Layout,
    group: dist.ProcessGroup | None = None,
    schedule: Schedule | str = "ring",
    kernel: str = "auto",
    cu_seqlens: Sequence[int] | Sequence[Sequence[int]] | None = None,
) -> Iterator[None]:
    """Share the sequences of the forward passes inside between the ranks of `group`; backward may run outside.

    Args:
        layout: which positions a rank owns; the batch was sharded with the same one (`shard_batch`).
        group: ranks that share each sequence; None = this rank alone, for a layout of cp=1.
        schedule: whose K/V arrives when: a schedule, or its name.
        kernel: who computes a tile.
        cu_seqlens: document bounds of the whole sequence, from 0 to its length: one for all rows, or one per row;
            None = each row is one document.

    Raises:
        ValueError: a group whose size is not the layout's; at the end, when no attention layer came by: a model with
            another attn_implementation would have attended to its own tokens only.
    """
    size = 1 if group is None else dist.get_world_size(group)
    if size != layout.cp:
        raise ValueError(f"the layout is for cp={layout.cp}, the group has {size} rank(s)")
    context = ContextParallel(
        layout=layout, group=group, schedule=schedule, kernel=kernel, cu_seqlens=rows_of(cu_seqlens)
    )
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)
    if not context.used:
        raise ValueError(
            "no attention layer ran inside context_parallel: make the model with "
            f"attn_implementation={NAME!r}, and call it inside"
        )


def current_context() -> ContextParallel:
    """Return the active context, or raise a ValueError that says how to make one."""
    context = _current.get()
    if context is None:
        raise ValueError(
            f"{PREFIX} needs to know how sequences are shared: call the model inside `with context_parallel("
            "layout=..., group=...)`; for a single rank, context_parallel(layout=Layout('contiguous', 1))"
        )
    return context


def make_mask(
    *,
    mask_function: object,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    config: PreTrainedConfig,
    **_: object,  # what only dense masks need: batch_size, dtype, device, whether a mask may be left out
) -> LayerMask:
    """Return what one kind of layer sees, in place of a dense mask (transformers' mask interface).

    Raises:
        ValueError: no active context; padding; a key/value cache with something in it; an unknown mask function; a
            model that is not exact on shards.
    """
    context = current_context()
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(
            f"{PREFIX} takes no padding: attention_mask has zeros. Pack documents instead (cu_seqlens of "
            "context_parallel), or pad on the right and ignore those labels: causal queries never see what is later"
        )
    if kv_length != q_length or int(q_offset) or kv_offset:
        raise ValueError(
            f"{PREFIX} takes no key/value cache: {q_length} queries at {int(q_offset)}, {kv_length} keys at "
            f"{kv_offset}; pass use_cache=False and no past_key_values"
        )
    if context.layout.cp > 1:
        check_model(config)
    assert callable(mask_function)
    return context.bind(read_mask_function(mask_function))


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LayerMask | Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attend over all ranks' tokens (transformers' attention interface).

    Args:
        module: the layer.
        query: `[B, H, T, D]`, T this rank's tokens.
        key, value: `[B, HK, T, D]`, `[B, HK, T, Dv]`.
        attention_mask: from `make_mask`; None from models that ask for no mask.
        dropout: 0.
        scaling: softmax scale; default `D ** -0.5`.
        sliding_window: tokens of a causal window, the query's own included.
        softcap: scores become `softcap * tanh(score / softcap)`.
        s_aux: learned sink logits `[H]`.
        is_causal: default: the layer's attribute.
        position_ids: checked against the layout.
        others: refused unless None, False or known to have nothing to do with attention.

    Returns:
        `[B, T, H, Dv]`, and None for the attention weights.
    """
    check_arguments(others)
    if dropout > 0:
        raise ValueError(f"{PREFIX} has no attention dropout; given {dropout}: set attention_dropout=0 in the config")
    if not query.shape[2] == key.shape[2] == value.shape[2]:
        raise ValueError(
            f"{PREFIX} is self-attention without a key/value cache: {query.shape[2]} queries, {key.shape[2]} keys"
        )
    if s_aux is not None and s_aux.shape != (query.shape[1],):
        raise ValueError(f"{PREFIX}: s_aux must be [{query.shape[1]}], one per head; given {tuple(s_aux.shape)}")
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    layer = layer_mask(attention_mask, causal=causal, sliding_window=sliding_window)
    if is_causal is not None and is_causal != layer.pattern.causal:
        raise ValueError(f"{PREFIX}: the layer says is_causal={is_causal}, the model's mask says otherwise")
    if sliding_window is not None and layer.pattern.causal and sliding_window != layer.pattern.window:
        raise ValueError(
            f"{PREFIX}: the layer says sliding_window={sliding_window}, the model's mask has {layer.pattern.window}"
        )
    layer.context.used = True
    if position_ids is not None:
        layer.context.check_positions(position_ids, tokens=query.shape[2])
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if torch.is_autocast_enabled(q.device.type):  # q and k may come in float32 from RoPE, v in the autocast dtype
        q, k, v = (x.to(torch.get_autocast_dtype(x.device.type)) for x in (q, k, v))
    context = layer.context
    out = context_parallel_attention(
        q,
        k,
        v,
        layout=context.layout,
        schedule=context.schedule,
        mask=layer.masks,
        group=context.group,
        kernel=context.kernel,
        softmax_scale=scaling,
        softcap=softcap,
        sink_logits=s_aux,
    )
    assert isinstance(out, Tensor)
    return out, None


def layer_mask(given: LayerMask | Tensor | None, *, causal: bool, sliding_window: int | None) -> LayerMask:
    """Return the layer's mask: `make_mask`'s, or from the layer's own arguments where the model asked for none."""
    if isinstance(given, LayerMask):
        return given
    if given is not None:
        raise ValueError(
            f"{PREFIX} takes no dense attention mask; given a tensor {tuple(given.shape)}. Leave attention_mask out; "
            "documents are cu_seqlens of context_parallel"
        )
    if sliding_window is None:
        return current_context().bind(CAUSAL if causal else FULL)
    if not causal:
        raise ValueError(f"{PREFIX}: sliding_window={sliding_window} on a bidirectional layer without a mask")
    return current_context().bind(causal_window(sliding_window))


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, make_mask)
