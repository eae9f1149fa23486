"""What surrounds softmax attention in a layer, whatever its queries see."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SoftmaxMixerConfig:
    """What surrounds softmax attention in layers of this kind.

    Attributes:
        rope: whether q and k are rotated by their positions; false = they know none (NoPE).
        gate: `none`, or `sigmoid`: outputs are multiplied with sigmoid(W x) (Qwen3-Next; arXiv 2505.06708).
    """

    rope: bool = True
    gate: str = "none"
