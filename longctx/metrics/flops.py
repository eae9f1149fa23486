"""Count a decoder's model FLOPs over the attention pairs that the mask lets through, as a share of the peak.

Model FLOPs are what the mathematics needs, not what an implementation spends: nothing is added for recomputation, and
nothing for pairs behind the mask. Counting all T x T pairs instead would report almost twice the MFU at long context.
"""

import math
import re
import time
from typing import NamedTuple

import torch


def dense_flops_per_token(num_params_in_matmuls: int) -> int:
    """Return the forward and backward FLOPs per token of all weight matrices: 6 per parameter (2 forward, 4 backward).

    An embedding that is only looked up is no matmul: leave it out, unless it is tied to the output matrix.
    """
    return 6 * num_params_in_matmuls


def attention_flops(*, visible_pairs: int, num_heads: int, head_dim: int) -> int:
    """Return the forward and backward FLOPs of softmax attention: 12 per visible pair, head and channel.

    A pair is one (query position, key position) that the mask lets through, summed over all layers and all sequences of
    the step.
    Forward: q k^T and p v, 2 FLOPs each per channel. Backward: dq, dk, dv and dp, 2 each; recomputing p is not counted.
    """
    return 12 * visible_pairs * num_heads * head_dim


def model_flops_per_step(
    *,
    tokens: int,
    num_params_in_matmuls: int,
    visible_pairs: int,
    num_heads: int,
    head_dim: int,
    recurrences: int = 0,
) -> int:
    """Return the model FLOPs of one optimizer step over all ranks: the matmuls of `tokens`, and what mixes them.

    Args:
        visible_pairs, num_heads, head_dim: of softmax attention.
        recurrences: FLOPs per token of all linear layers, forward and backward.
    """
    softmax = attention_flops(visible_pairs=visible_pairs, num_heads=num_heads, head_dim=head_dim)
    return tokens * (dense_flops_per_token(num_params_in_matmuls) + recurrences) + softmax


class Peak(NamedTuple):
    """What one device can do at best: FLOP/s, and in words where the number is from."""

    value: float
    description: str


class _GpuPeaks(NamedTuple):
    pattern: str
    half: float  # bfloat16 and float16 on the tensor cores with float32 accumulation, dense, TFLOP/s
    single: float  # float32 outside the tensor cores, TFLOP/s


# Dense figures, that is, half of the "with sparsity" figure where only that is printed. Sources: NVIDIA's data sheets
# of the A100, A10, L4, L40, L40S, H100 (SXM, PCIe, NVL), H200, GH200, HGX B200 and GB200; NVIDIA's white papers on the
# GA102, Ada and Blackwell architectures (GeForce, RTX); AMD's data sheet of the MI300X. The first match counts.
_GPU_PEAKS = (
    _GpuPeaks(r"\bH[18]00 PCIe\b", 756.0, 51.0),
    _GpuPeaks(r"\bH[12]00 NVL\b", 835.0, 60.0),
    _GpuPeaks(r"\b(H100|H200|H800|GH200)\b", 989.0, 67.0),
    _GpuPeaks(r"\bH20\b", 148.0, 44.0),
    _GpuPeaks(r"\bGB200\b", 2500.0, 80.0),
    _GpuPeaks(r"\bB200\b", 2250.0, 75.0),
    _GpuPeaks(r"\bA[18]00\b", 312.0, 19.5),
    _GpuPeaks(r"\bA10\b", 125.0, 31.2),
    _GpuPeaks(r"\bL40S\b", 362.0, 91.6),
    _GpuPeaks(r"\bL40\b", 181.0, 90.5),
    _GpuPeaks(r"\bL4\b", 121.0, 30.3),
    _GpuPeaks(r"\bRTX 6000 Ada\b", 364.2, 91.1),
    _GpuPeaks(r"\bRTX A6000\b", 154.8, 38.7),
    _GpuPeaks(r"\bRTX 5090$", 209.5, 104.8),
    _GpuPeaks(r"\bRTX 4090$", 165.2, 82.6),
    _GpuPeaks(r"\bRTX 3090$", 71.0, 35.6),
    _GpuPeaks(r"\bMI300X\b", 1307.4, 163.4),
)


def gpu_peak(name: str, *, dtype: torch.dtype, tf32: bool) -> Peak | None:
    """Return the data sheet's dense peak of the GPU called `name`, or None if it is not known for this dtype.

    float32 matmuls count against the tensor cores' TF32 peak (half of bfloat16's) where `tf32` says that they use it.
    A part of a GPU (MIG) and a laptop's GPU of the same name have other peaks, which no table has.
    """
    if re.search(r"\bMIG\b|\b(Laptop|Mobile|Max-Q)\b", name):
        return None
    entry = next((entry for entry in _GPU_PEAKS if re.search(entry.pattern, name)), None)
    if entry is None or dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return None
    if dtype == torch.float32:
        value, kind = (entry.half / 2, "float32 as TF32") if tf32 else (entry.single, "float32")
    else:
        value, kind = entry.half, str(dtype).removeprefix("torch.")
    return Peak(value * 1e12, f"{value:g} TFLOP/s, data sheet, {name}, {kind}, dense")


def measured_peak(device_type: str, *, dtype: torch.dtype, seconds: float = 0.2) -> Peak:
    """Measure the best rate of a square matmul on this rank's device within about `seconds`, in FLOP/s.

    Uses the threads that torch is set to. Where several ranks share the cores, measure while the others are idle.
    """
    size = 4096 if device_type == "cuda" else 512
    a = torch.ones(size, size, dtype=dtype, device=device_type)
    best, repeats, deadline = math.inf, 0, time.perf_counter() + seconds
    # The first product also pays for set-up. It counts only if it was so slow that there is no time for another.
    while repeats < 2 or time.perf_counter() < deadline:
        begin = time.perf_counter()
        torch.mm(a, a)
        if device_type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
        repeats += 1
        if repeats == 1 and time.perf_counter() > deadline:
            break
    value = 2 * size**3 / best
    where = f"{torch.get_num_threads()} CPU thread(s)" if device_type == "cpu" else torch.cuda.get_device_name()
    name = str(dtype).removeprefix("torch.")
    return Peak(value, f"{value / 1e9:.0f} GFLOP/s, measured matmul of {size}x{size}, {name}, {where}")


def peak_flops(device_type: str, dtype: torch.dtype, *, override: float | None) -> Peak:
    """Return the peak FLOP/s of one rank's device, and its description, which belongs beside every MFU.

    `override` (`logger.peak_flops`) goes first; then the table of known GPUs; else (CPU, unknown GPU) a measurement.
    """
    if override is not None:
        return Peak(override, f"{override / 1e12:g} TFLOP/s, as given by logger.peak_flops")
    if device_type == "cuda":
        tf32 = torch.get_float32_matmul_precision() != "highest"
        known = gpu_peak(torch.cuda.get_device_name(), dtype=dtype, tf32=tf32)
        if known is not None:
            return known
    return measured_peak(device_type, dtype=dtype)


def mfu(*, model_flops: float, seconds: float, num_devices: int, peak: float) -> float:
    """Return model FLOPs utilisation, a share of 1: `model_flops` of all devices in `seconds` against their peak."""
    return model_flops / (seconds * num_devices * peak)
