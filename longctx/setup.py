"""Build all that the loop works with, check that it fits together, and take up a checkpoint."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longctx import liger
from longctx.attention_config import MASK_KEYS, AttentionConfig
from longctx.batch import BatchSource
from longctx.checkpoint.checkpointer import Checkpointer
from longctx.checkpoint.compare import compare_models
from longctx.checkpoint.layers import compare_layers, describe_loaded
from longctx.checkpoint.rng import restore_rng
from longctx.config import Config
from longctx.data.batches import grad_accum_steps
from longctx.data.indexed import TokenStore
from longctx.data.prepare import prepare
from longctx.data.stream import PackedStream
from longctx.data.tokenizer import build_tokenizer
from longctx.engines.build import build_engine
from longctx.engines.engine import DTYPES, Engine
from longctx.kernels.block_sparse.op import resolve_kernel as resolve_sparse_kernel
from longctx.kernels.contract import Request
from longctx.kernels.linear.op import resolve_kernel as resolve_linear_kernel
from longctx.kernels.softmax.op import resolve_kernel
from longctx.metrics.flops import gpu_peak
from longctx.mixers.shape import linear_shape
from longctx.model import ModelConfig
from longctx.parallel.block_layout import block_layout
from longctx.parallel.links import Speeds, resolve_speeds
from longctx.parallel.mesh import Degrees, build_far_group, build_mesh, resolve_degrees
from longctx.parallel.ranks import Ranks
from longctx.parallel.schedule import Shape
from longctx.parallel.transport import ProcessGroupTransport
from longctx.planner import SAMPLES, Choice, choose
from longctx.sparse_moves import SELECTIVE
from longctx.stack import build_stack


@dataclass(kw_only=True)
class Run:
    """All that the loop works with: `config` has a name wherever the user's has `auto` for layout or schedule, `say`
    prints on rank 0, later through the progress bar."""

    config: Config
    degrees: Degrees
    model: ModelConfig
    engine: Engine
    batches: BatchSource
    training: PackedStream
    held_out: PackedStream | None
    say: Callable[[str], None]

    @property
    def tokens_per_step(self) -> int:
        """Return the tokens of one optimizer step, over all ranks."""
        return self.config.train.global_batch * self.config.data.seq_len


def check_world(config: Config, *, world_size: int, per_machine: int) -> Degrees:
    """Resolve the mesh and refuse what does not fit it, before any process group exists."""
    degrees = resolve_degrees(config.parallel, world_size=world_size, distributed_schedule=config.attention.distributed)
    if config.engine.parameters == "replicate" and degrees.dp_shard > 1:
        raise ValueError(
            f"parallel.dp_shard={degrees.dp_shard} shares parameters between data-parallel ranks, so it needs "
            "engine.parameters=shard; given replicate (use parallel.dp_replicate)"
        )
    layout = config.attention.layout
    named = config.attention if layout != "auto" else dataclasses.replace(config.attention, layout="contiguous")
    named.make_layout(degrees.cp).check_total(config.data.seq_len)
    if config.attention.schedule != "auto":
        config.attention.make_schedule(degrees.cp, **heads(config), per_machine=per_machine)
    check_moves(config, cp=degrees.cp, per_machine=per_machine)
    check_blocks(config, cp=degrees.cp)
    grad_accum_steps(global_batch=config.train.global_batch, micro_batch=config.train.micro_batch, dp_size=degrees.dp)
    return degrees


def check_blocks(config: Config, *, cp: int) -> None:
    """Refuse layouts that cut the blocks which sparse layers summarise."""
    for kind in config.layers.sparse_kinds:
        size = config.mixers.sparse_kind(kind).whole
        if size > 1:
            try:
                block_layout(config.attention.make_layout(cp), block_size=size, total=config.data.seq_len)
            except ValueError as error:
                raise ValueError(f"mixers.{kind}.block_size={size} at parallel.cp={cp}: {error}") from error


def check_moves(config: Config, *, cp: int, per_machine: int) -> None:
    """Refuse ways of moving what is selected where all ranks share heads, so that nothing selected moves."""
    attention = config.attention
    if not config.layers.sparse or attention.kv_moves not in SELECTIVE or cp == 1:
        return
    schedule = attention.make_schedule(cp, **heads(config), per_machine=per_machine)
    if schedule.teams(cp).count == 1:
        ulysses = "null" if attention.ulysses is None else attention.ulysses
        raise ValueError(
            f"attention.kv_moves={attention.kv_moves} has no effect with attention.schedule={schedule.name} and "
            f"attention.ulysses={ulysses} at parallel.cp={cp}, where all ranks share heads and nothing that is "
            "selected travels: leave it auto, or lower attention.ulysses"
        )


def check_kernel(config: Config, *, device_type: str) -> dict[str, str]:
    """Return the name of the kernel that will compute each kind of layer, or refuse a named one that cannot.

    All softmax layers, whatever their kind, are computed by the one that stands under `softmax`.
    """
    layers, model = config.layers, config.model
    if model.ops == "liger":
        reason = liger.unsupported(device_type=device_type, dtype=config.engine.dtype)
        if reason is not None:
            raise ValueError(f"model.ops=liger cannot be used: {reason}; set model.ops=torch")
    kernels = {"softmax": check_softmax_kernel(config, device_type=device_type)} if layers.masked else {}
    kernels |= {kind: check_sparse_kernel(config, kind, device_type=device_type) for kind in layers.sparse_kinds}
    return kernels | {kind: check_linear_kernel(config, kind, device_type=device_type) for kind in layers.linear_kinds}


def check_softmax_kernel(config: Config, *, device_type: str) -> str:
    """Return the name of the kernel that will compute softmax layers, or refuse a named one that cannot."""
    model = config.model
    request = Request(
        device_type=device_type,
        dtype=DTYPES[config.engine.dtype],
        head_dim=model.head_size,
        v_head_dim=model.head_size,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        softcap=model.softcap is not None,
    )
    return resolve_kernel(config.attention.kernel, request).name


def check_sparse_kernel(config: Config, kind: str, *, device_type: str) -> str:
    """Return the name of the kernel that will compute a kind of sparse layer, or refuse a named one that cannot.

    The names, where its parts are computed by different ones.
    """
    name, model = config.mixers.sparse_kind(kind).kernel, config.model
    request = Request(
        device_type=device_type,
        dtype=DTYPES[config.engine.dtype],
        head_dim=model.head_size,
        v_head_dim=model.head_size,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        softcap=model.softcap is not None,
    )
    try:
        asked = config.mixers.sparse_kind(kind).requests(request)
        found = [resolve_sparse_kernel(name, *each) for each in asked]
    except ValueError as error:
        raise ValueError(f"mixers.{kind}.kernel={name}: {error}") from error
    names = dict.fromkeys(kernel.name for kernel in found)
    return " and ".join(names) if found else check_softmax_kernel(config, device_type=device_type)


def check_linear_kernel(config: Config, kind: str, *, device_type: str) -> str:
    """Return the name of the kernel that will compute a kind of linear layer, or refuse a named one that cannot."""
    layers, model = config.layers, config.model
    shape = linear_shape(layers, kind, heads=model.num_heads, head_dim=model.head_size)
    requests = shape.requests(device_type=device_type, dtype=DTYPES[config.engine.dtype])
    try:
        found = [resolve_linear_kernel(shape.kernel, request) for request in requests]
    except ValueError as error:
        size = "" if shape.chunk_size is None else f", mixers.{kind}.chunk_size={shape.chunk_size}"
        raise ValueError(f"mixers.{kind}.kernel={shape.kernel}{size}: {error}") from error
    return found[0].name


def heads(config: Config) -> dict[str, int]:
    """Return the head counts of a layer, by the names that schedules use."""
    return {"heads": config.model.num_heads, "kv_heads": config.model.num_kv_heads}


def layer_shape(config: Config) -> Shape:
    """Return the shape of one layer of attention."""
    size = config.model.head_size
    return Shape(**heads(config), head_dim=size, v_head_dim=size, dtype=DTYPES[config.engine.dtype])


def speeds(config: Config, *, device: torch.device) -> Speeds:
    """Return what predictions are made of, from config, the name of the GPU, and what is usual."""
    peak = None
    if device.type == "cuda":
        tf32 = torch.get_float32_matmul_precision() != "highest"
        peak = gpu_peak(torch.cuda.get_device_name(device), dtype=DTYPES[config.engine.dtype], tf32=tf32)
    return resolve_speeds(config.parallel, device_type=device.type, peak_flops=peak.value if peak else None)


def choose_attention(
    config: Config, stream: PackedStream, *, degrees: Degrees, per_machine: int, device: torch.device
) -> Choice:
    """Predict what is fastest for the run's first sequences, where config leaves layout or schedule open.

    It is chosen for the softmax layers; where some see everything and some a window, for those that see everything.
    """
    count = min(SAMPLES, stream.samples_per_epoch)
    kind = "full" if "full" in config.layers.used else "window"
    return choose(
        config.attention,
        [config.attention.mask(stream.sample(index).cu_seqlens, kind=kind) for index in range(count)],
        total=config.data.seq_len,
        cp=degrees.cp,
        shape=layer_shape(config),
        speeds=speeds(config, device=device),
        per_machine=per_machine,
    )


def with_vocabulary(config: Config) -> ModelConfig:
    """Return the model with the tokenizer's vocabulary size, where config leaves it open."""
    vocab_size = build_tokenizer(config.data.tokenizer, eod_token=config.data.eod_token).vocab_size
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or vocab_size)
    assert model.vocab_size is not None
    if config.data.source != "bin" and model.vocab_size < vocab_size:
        raise ValueError(
            f"model.vocab_size={model.vocab_size} is smaller than the tokenizer's {vocab_size}; set it to null"
        )
    return model


def open_stream(config: Config, model: ModelConfig, prefix: Path, *, split: str) -> PackedStream:
    """Return the sequences of a prepared corpus."""
    return PackedStream(
        TokenStore(prefix),
        seq_len=config.data.seq_len,
        seed=config.data.seed,
        held_out=config.data.held_out,
        split=split,
        vocab_size=model.vocab_size,
    )


def setup(
    config: Config,
    *,
    degrees: Degrees,
    per_machine: int,
    device: torch.device,
    ranks: Ranks,
    say: Callable[[str], None],
) -> Run:
    """Prepare the corpus (rank 0) and build streams, attention and engine (collective)."""
    store_at = ranks.from_first(lambda: prepare(config.data, report=say))
    model = with_vocabulary(config)
    training = ranks.all_succeed(lambda: open_stream(config, model, store_at.prefix, split="train"))
    evaluates = config.train.eval_samples > 0 and config.data.held_out > 0
    held_out = (
        ranks.all_succeed(lambda: open_stream(config, model, store_at.prefix, split="held_out")) if evaluates else None
    )
    if "auto" in (config.attention.layout, config.attention.schedule):
        choice = ranks.from_first(
            lambda: choose_attention(config, training, degrees=degrees, per_machine=per_machine, device=device)
        )
        say(choice.explain())
        config = dataclasses.replace(config, attention=choice.config)
    # This mesh is for data and attention; parameters lie on one of their own over the same ranks (the engine's).
    mesh = build_mesh(degrees, device_type=device.type)
    stack = build_stack(
        config.attention,
        layers=config.layers,
        model=model,
        total=config.data.seq_len,
        dtype=DTYPES[config.engine.dtype],
        transport=ProcessGroupTransport(
            mesh.get_group("cp"), far_group=build_far_group(mesh, config.attention.schedule)
        ),
        per_machine=per_machine,
    )
    engine = build_engine(
        config.engine,
        optim=config.optim,
        stack=stack,
        degrees=degrees,
        device=device,
        seed=config.train.seed,
    )
    batches = BatchSource(
        stack=stack,
        device=device,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        dp_rank=degrees.coordinates(ranks.rank)[0],
        dp_size=degrees.dp,
    )
    return Run(
        config=config,
        degrees=degrees,
        model=model,
        engine=engine,
        batches=batches,
        training=training,
        held_out=held_out,
        say=say,
    )


def resume(run: Run, checkpointer: Checkpointer) -> tuple[int, dict[str, Any]]:
    """Load the checkpoint that the config asks for, if there is one; return the finished steps and what was saved."""
    path = checkpointer.find()
    if path is None:
        return 0, {}
    saved = checkpointer.read_extra(path)
    absent = [key for key in ("step", "samples_seen", "model", "data_order") if key not in saved]
    if absent:
        raise ValueError(f"checkpoint {path}: extra.json lacks {', '.join(absent)}; set checkpoint.resume to another")
    # A checkpoint from before a key existed means the key's default.
    compare_models({"softcap": None, "sink_logits": False, **saved["model"]}, model_shape(run))
    change = compare_layers(
        saved.get("layers", {"attention.layers": None}),
        saved_kinds(saved, num_layers=run.model.num_layers),
        run.config.layers,
        heads=run.model.num_heads,
        head_dim=run.model.head_size,
    )
    compare_models(saved["data_order"], data_order(run), prefix="data order")
    changed = mask_changes(saved.get("config", {}).get("attention", {}), run.config.attention)
    if changed:
        run.say(f"note: the checkpoint was trained under another mask: {', '.join(changed)}")
    if change.words:
        run.say(f"note: the checkpoint was trained with other layers: {'; '.join(change.words)}")
    state = run.engine.state_dict()
    loaded = checkpointer.load(path, state, may_lack=change.may_begin)
    run.engine.load_state_dict(state)
    for line in describe_loaded(loaded):
        run.say(f"note: {line}")
    step = int(saved["step"])
    rank, world_size = dist.get_rank(), dist.get_world_size()
    restore_rng(path, rank=rank, world_size=world_size, seed=run.config.train.seed, step=step, report=run.say)
    run.say(f"resumed from {path} (step {step}, {saved['samples_seen']} samples seen)")
    return step, saved


def saved_kinds(saved: dict[str, Any], *, num_layers: int) -> tuple[str, ...]:
    """Return the kinds of a checkpoint's layers; an older one has none but those of its config."""
    if "kinds" in saved:
        return tuple(saved["kinds"])
    keys = ("layers", "window", "head_windows")
    attention = saved.get("config", {}).get("attention", {})
    return AttentionConfig(**{key: attention[key] for key in keys if key in attention}).kinds(num_layers)


def mask_changes(saved: dict[str, Any], attention: AttentionConfig) -> list[str]:
    """Return the keys of the mask that differ, in words; what an older checkpoint does not know had its default."""
    default = AttentionConfig()
    before = {key: saved.get(key, getattr(default, key)) for key in MASK_KEYS}
    now = {key: getattr(attention, key) for key in MASK_KEYS}
    return [f"attention.{key} was {before[key]}, is {now[key]}" for key in MASK_KEYS if before[key] != now[key]]


def model_shape(run: Run) -> dict[str, Any]:
    """Return what decides the model's arithmetic; a run continues only with the same.

    Initial weights do not matter, nor does who computes what.
    """
    shape = {**dataclasses.asdict(run.model), "head_dim": run.model.head_size}
    del shape["init_std"], shape["ops"]
    return shape


def layer_stack(run: Run) -> dict[str, Any]:
    """Return what decides the arithmetic of what mixes tokens, likewise; masks may change, and are told."""
    return run.config.layers.arithmetic(run.model.num_heads, run.model.head_size)


def data_order(run: Run) -> dict[str, Any]:
    """Return what decides which sample comes when; a run continues only on the same order."""
    data = run.config.data
    return {
        "data.seq_len": data.seq_len,
        "data.seed": data.seed,
        "data.held_out": data.held_out,
        "train.global_batch": run.config.train.global_batch,
        "corpus": run.training.fingerprint(),
    }


def set_aside(run_dir: Path) -> str | None:
    """Move what an earlier run left in `run_dir` into a folder of its own there; return what to say, if it did."""
    left = [run_dir / name for name in ("checkpoints", "metrics.jsonl", "loss.png", "config.yaml", "tensorboard")]
    left = [path for path in left if path.exists()]
    if not left:
        return None
    number = next(n for n in range(1, 1_000_000) if not (run_dir / f"before-{n}").exists())
    folder = run_dir / f"before-{number}"
    folder.mkdir()
    for path in left:
        path.rename(folder / path.name)
    return f"checkpoint.resume=never: what an earlier run left in {run_dir} is now in {folder}"
