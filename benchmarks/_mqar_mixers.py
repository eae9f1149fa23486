"""What mixes tokens in the recall task's layers: patterns of kinds, and the settings of kinds for 64 to 128 tokens.

Sparse layers have blocks of 8 tokens, which is 4 pairs of the task. None of the layers knows positions.

`seer` is trained in two modes, as the papers do with a model that is there already: for the first `DISTILLED` of the
steps attention is dense and the gate is distilled from it; then the gate stays as it is, and attention is what it
chooses. Tests are always of what the gate chooses.
"""

from dataclasses import asdict, replace
from typing import Any

from torch import nn

from longctx.mixers.config import MixersConfig
from longctx.mixers.layers import Layers
from longctx.mixers.pattern import parse_round
from longctx.mixers.softmax_config import SoftmaxMixerConfig
from longctx.mixers.sparse.landmark import LandmarkConfig
from longctx.mixers.sparse.moba import MobaConfig
from longctx.mixers.sparse.mosa import MosaConfig
from longctx.mixers.sparse.nsa import NsaConfig
from longctx.mixers.sparse.routing import RoutingConfig
from longctx.mixers.sparse.seer import Seer, SeerConfig
from longctx.mixers.sparse.sla import SlaConfig

# The layers behind the convolution.
MIXERS = {
    "softmax": "full",
    "window": "window",
    "linear": "linear",
    "lightning": "lightning",
    "gla": "gla",
    "deltanet": "deltanet",
    "gdn": "gdn",
    "gdn_3_1": "gdn*3 + full",
    "moba": "moba",
    "nsa": "nsa",
    "seer": "seer",
    "landmark": "landmark",
    "mosa": "mosa",
    "routing": "routing",
    "sla": "sla",
    "moba_full": "moba + full",
    "moba_3_1": "moba*3 + full",
    "nsa_full": "nsa + full",
    "mosa_full": "mosa + full",
}
SETTINGS = MixersConfig(
    full=SoftmaxMixerConfig(rope=False),
    window=SoftmaxMixerConfig(rope=False),
    moba=MobaConfig(rope=False, block_size=8, topk=5),
    nsa=NsaConfig(rope=False, block_size=8, compress_size=8, compress_stride=4, select=5, local=1, window=8),
    seer=SeerConfig(rope=False, block_size=8, topk=5),
    landmark=LandmarkConfig(rope=False, block_size=8, topk=5),
    mosa=MosaConfig(rope=False, chunk=16, sparsity=2, block_size=8),
    routing=RoutingConfig(rope=False, clusters=4, window=16, block_size=8),
    sla=SlaConfig(rope=False, block_size=8, topk=5),
)
DISTILLED = 1 / 3


def layers_of(mixer: str, settings: MixersConfig = SETTINGS) -> Layers:
    """Return the layers behind the convolution."""
    return Layers(kinds=parse_round(MIXERS[mixer]), mixers=settings)


def told(mixer: str) -> dict[str, Any]:
    """Return the settings of a mixer's sparse kinds, by kind: a result with others is not one of this mixer."""
    layers = layers_of(mixer)
    found = {kind: asdict(layers.mixers.sparse_kind(kind)) for kind in layers.sparse_kinds}
    for kind, settings in found.items():
        del settings["kernel"]
        if kind == "seer":
            settings["mode"] = f"distill for {DISTILLED:.2f} of the steps, then sparse"
    return found


def set_mode(model: nn.Module, mode: str) -> None:
    """Let SeerAttention's layers, if there are any, `distill` or be `sparse`."""
    for module in model.modules():
        if isinstance(module, Seer):
            module.settings = replace(module.settings, mode=mode)
