"""Read Hugging Face's mask functions: each is a closure over (batch, head, query, key) indices; we need bands.

A model of transformers asks its mask interface for a mask once per forward pass and kind of layer, and says what is
visible by a function made of a few known pieces. Indices in it are local, so it cannot be evaluated on a shard of a
sequence; its structure says the same in global terms. A piece that is not known here is refused.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from longctx.kernels.mask import Mask, causal, chunked, full, sliding_window


@dataclass(frozen=True)
class Pattern:
    """What a kind of layer sees within a document.

    Attributes:
        mask: visible keys, in global positions.
        causal: whether later keys are hidden.
        window: the number of tokens of a causal sliding window, the query's own included; None without one.
    """

    mask: Mask
    causal: bool = False
    window: int | None = None

    def __and__(self, other: "Pattern") -> "Pattern":
        mask = self.mask & other.mask
        assert isinstance(mask, Mask)
        return Pattern(mask, self.causal or other.causal, self.window if other.window is None else other.window)


FULL = Pattern(full())
CAUSAL = Pattern(causal(), causal=True)


def causal_window(tokens: int) -> Pattern:
    """Return a causal window of `tokens` tokens, the query's own included: Hugging Face's way to count."""
    return Pattern(sliding_window(tokens - 1), causal=True, window=tokens)


def read_mask_function(function: Callable[..., Any]) -> Pattern:
    """Return what a mask function of transformers lets through, documents apart.

    Documents that transformers recognises by restarting position ids are left out: a shard's positions jump without
    that. They come from `context_parallel(cu_seqlens=...)`, against which position ids are checked.

    Raises:
        ValueError: a function with a part that is not known.
    """
    if function is causal_mask_function:
        return CAUSAL
    if function is bidirectional_mask_function:
        return FULL
    maker = function.__qualname__.split(".")[0]
    inside = inspect.getclosurevars(function).nonlocals
    match maker:
        case "and_masks":
            pattern = FULL
            for part in inside["mask_functions"]:
                pattern = pattern & read_mask_function(part)
            return pattern
        case "sliding_window_overlay":  # says k > q - window and is always combined with causal
            return causal_window(inside["sliding_window"])
        case "sliding_window_bidirectional_overlay":  # |q - k| <= window
            return Pattern(sliding_window(inside["sliding_window"], inside["sliding_window"]))
        case "chunked_overlay":  # counts from left padding, of which there is none
            return Pattern(chunked(inside["chunk_size"]))
        case "packed_sequence_mask_function":
            return FULL
        case "remap_positions_for_packed_sequence":  # a chunk counts from its document's start, for us as well
            return read_mask_function(inside["mask_function"])
    raise ValueError(
        f"attn_implementation=longctx does not know the mask function {function.__qualname__!r} that this model uses: "
        "supported are causal, bidirectional, sliding-window and chunked masks of whole documents"
    )
