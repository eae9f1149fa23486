"""How heads share the two sets of a factorized pattern (Sparse Transformers, arXiv 1904.10509, section 4.3)."""

import torch
from torch import Tensor

MERGED, ALTERNATE = "merged", "alternate"
HEADS = (MERGED, ALTERNATE)


def check_heads(heads: str) -> None:
    """Refuse unknown ways (ValueError)."""
    if heads not in HEADS:
        raise ValueError(f"heads={heads} is not known; known are {', '.join(HEADS)}")


def local_heads(num_kv_heads: int, *, device: torch.device) -> Tensor:
    """Return which KV heads have the local set, where they alternate: bool `[HK]`, the first, the third, ...

    Query heads of a KV head have the same set, so that they share what is read.
    """
    if num_kv_heads < 2:
        raise ValueError(
            f"heads={ALTERNATE} gives every other KV head another set and needs 2 of them or more; given "
            f"num_kv_heads={num_kv_heads}: use heads={MERGED}"
        )
    return torch.arange(num_kv_heads, device=device) % 2 == 0
