"""The training loop: `torchrun --nproc-per-node N -m longctx.train [overrides]`."""

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longctx.attention import ContextParallelAttention
from longctx.batch import BatchSource
from longctx.checkpoint.checkpointer import Checkpointer
from longctx.checkpoint.compare import compare_models
from longctx.checkpoint.durable import write_synced
from longctx.checkpoint.rng import KEY as RNG
from longctx.checkpoint.rng import reseed, restore_rng, rng_state
from longctx.checkpoint.version import code_version
from longctx.cli import TRAIN_HELP
from longctx.config import Config, load_config
from longctx.data.batches import grad_accum_steps
from longctx.data.indexed import TokenStore
from longctx.data.prepare import prepare
from longctx.data.stream import PackedStream
from longctx.data.tokenizer import build_tokenizer
from longctx.engines.native import NativeEngine
from longctx.metrics.flops import Peak, model_flops_per_step, peak_flops
from longctx.metrics.logger import MetricsLogger
from longctx.metrics.meter import StepMeter
from longctx.model import ModelConfig, matmul_parameters
from longctx.optim import lr_at
from longctx.parallel.agree import all_succeed, check_equal, from_rank_zero
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Degrees, build_mesh, init_distributed, read_launch, resolve_degrees
from longctx.parallel.plan import describe
from longctx.parallel.registry import resolve_schedule
from longctx.parallel.transport import ProcessGroupTransport
from longctx.run_lock import lock_run_directory


def main(argv: Sequence[str] | None = None) -> int:
    """Train with these hydra overrides; return the exit status (2: the configuration, data or checkpoint is wrong)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(TRAIN_HELP, end="")
        return 0
    launch = read_launch()
    status = 2
    try:
        config = load_config(arguments)
        degrees = check_world(config, world_size=launch.world_size)
        device = init_distributed(launch)
        try:
            check_equal(config.digest(), what="the configuration")
            train(config, degrees=degrees, device=device, overrides=arguments)
        finally:
            dist.destroy_process_group()
        return 0
    except KeyboardInterrupt:
        return 130
    except FloatingPointError as error:
        problem, status = str(error), 1
    except ValueError as error:
        problem = str(error)
    where = ""
    if launch.rank > 0:
        # Nearly always rank 0 has the same to say, and the launcher ends every rank as soon as one has ended.
        time.sleep(10)
        where = f" on rank {launch.rank}"
    print(f"error{where}: {problem}", file=sys.stderr, flush=True)
    return status


def check_world(config: Config, *, world_size: int) -> Degrees:
    """Resolve the mesh and refuse what does not fit it, before any process group exists."""
    schedule = config.attention.schedule
    degrees = resolve_degrees(config.parallel, world_size=world_size, distributed_schedule=schedule != "local")
    Layout(config.attention.layout, degrees.cp, config.attention.width).check_total(config.data.seq_len)  # type: ignore[arg-type]
    grad_accum_steps(global_batch=config.train.global_batch, micro_batch=config.train.micro_batch, dp_size=degrees.dp)
    return degrees


@dataclass
class Run:
    """All that the loop works with."""

    config: Config
    model: ModelConfig
    engine: NativeEngine
    batches: BatchSource
    training: PackedStream
    held_out: PackedStream | None
    checkpointer: Checkpointer
    tokens_per_step: int
    say: Callable[[str], None] = print


def train(config: Config, *, degrees: Degrees, device: torch.device, overrides: Sequence[str]) -> None:
    """Set up, resume, train, evaluate, and say where everything is (collective)."""
    rank = dist.get_rank()
    say: Callable[[str], None] = (lambda text: print(text, flush=True)) if rank == 0 else (lambda text: None)
    run_dir = Path(config.run_dir)
    with ExitStack() as stack:
        run = setup(config, degrees=degrees, device=device, say=say)
        stack.callback(run.checkpointer.close)
        lock = all_succeed(lambda: lock_run_directory(run_dir) if rank == 0 else None)
        if lock is not None:
            stack.enter_context(lock)
        reseed(seed=config.train.seed, step=0, rank=rank)
        step, saved = resume(run)
        from_rank_zero(lambda: save_config(run_dir, config))
        peak = from_rank_zero(lambda: peak_flops(device.type, dtype_of(config), override=config.logger.peak_flops))
        announce(run, degrees=degrees, peak=peak, step=step)
        logger = all_succeed(
            lambda: MetricsLogger(
                config.logger,
                run_dir=run_dir,
                rank=rank,
                total_steps=config.train.steps,
                start_step=step,
                resolved_config=config.as_dict(),
                state=saved.get("logger"),
            )
        )
        stack.enter_context(logger)
        run.say = logger.message
        meter = StepMeter(world_size=dist.get_world_size(), device_type=device.type, peak_flops=peak.value)
        loop(run, logger=logger, meter=meter, step=step)
    say(closing_words(config, overrides, steps=max(step, config.train.steps)))


def setup(config: Config, *, degrees: Degrees, device: torch.device, say: Callable[[str], None]) -> Run:
    """Prepare the corpus (rank 0) and build streams, attention, engine and checkpointer."""
    store_at = from_rank_zero(lambda: prepare(config.data, report=say))
    vocab_size = build_tokenizer(config.data.tokenizer, eod_token=config.data.eod_token).vocab_size
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or vocab_size)
    assert model.vocab_size is not None
    if config.data.source != "bin" and model.vocab_size < vocab_size:
        raise ValueError(
            f"model.vocab_size={model.vocab_size} is smaller than the tokenizer's {vocab_size}; set it to null"
        )

    def stream(split: str) -> PackedStream:
        return PackedStream(
            TokenStore(store_at.prefix),
            seq_len=config.data.seq_len,
            seed=config.data.seed,
            held_out=config.data.held_out,
            split=split,
            vocab_size=model.vocab_size,
        )

    training = all_succeed(lambda: stream("train"))
    evaluates = config.train.eval_samples > 0 and config.data.held_out > 0
    held_out = all_succeed(lambda: stream("held_out")) if evaluates else None
    mesh = build_mesh(degrees, device_type=device.type)
    dp_rank, _ = degrees.coordinates(dist.get_rank())
    attention = ContextParallelAttention(
        Layout(config.attention.layout, degrees.cp, config.attention.width),  # type: ignore[arg-type]
        resolve_schedule(config.attention.schedule),
        ProcessGroupTransport(mesh.get_group("cp")),
        config.attention.kernel,
    )
    engine = NativeEngine(
        config=config.engine,
        model=model,
        optim=config.optim,
        attention=attention,
        degrees=degrees,
        device=device,
        seed=config.train.seed,
    )
    batches = BatchSource(
        attention=attention,
        config=config.attention,
        device=device,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        dp_rank=dp_rank,
        dp_size=degrees.dp,
    )
    checkpointer = Checkpointer(Path(config.run_dir), config=config.checkpoint, report=say)
    tokens_per_step = config.train.global_batch * config.data.seq_len
    return Run(config, model, engine, batches, training, held_out, checkpointer, tokens_per_step, say)


def resume(run: Run) -> tuple[int, dict[str, Any]]:
    """Load the checkpoint that the config asks for, if there is one; return the finished steps and what was saved."""
    path = run.checkpointer.find()
    if path is None:
        return 0, {}
    saved = run.checkpointer.read_extra(path)
    absent = [key for key in ("step", "samples_seen", "model", "data_order") if key not in saved]
    if absent:
        raise ValueError(f"checkpoint {path}: extra.json lacks {', '.join(absent)}; set checkpoint.resume to another")
    compare_models(saved["model"], dataclasses.asdict(run.model))
    compare_models(saved["data_order"], data_order(run), prefix="data order")
    state = run.engine.state_dict()
    run.checkpointer.load(path, state)
    run.engine.load_state_dict(state)
    step = int(saved["step"])
    rank, world_size = dist.get_rank(), dist.get_world_size()
    restore_rng(path, rank=rank, world_size=world_size, seed=run.config.train.seed, step=step, report=run.say)
    run.say(f"resumed from {path} (step {step}, {saved['samples_seen']} samples seen)")
    return step, saved


def loop(run: Run, *, logger: MetricsLogger, meter: StepMeter, step: int) -> None:
    """Train from `step` to the end of the run."""
    config, total = run.config, run.config.train.steps
    if step >= total:
        run.say(f"train.steps={total} is reached: nothing is left to do")
    while step < total:
        meter.begin()
        with meter.waiting_for_data():
            micro_batches = run.batches.training(run.training, step)
        lr = lr_at(step, config=config.optim, total_steps=total)
        result = run.engine.train_step(micro_batches, lr=lr)
        flops = model_flops_per_step(
            tokens=run.tokens_per_step,
            num_params_in_matmuls=matmul_parameters(run.model),
            visible_pairs=result.visible_pairs,
            num_heads=run.model.num_heads,
            head_dim=run.model.head_size,
            num_layers=run.model.num_layers,
        )
        measured = meter.end(tokens=run.tokens_per_step, model_flops=flops)
        step += 1
        progress = {
            "samples_seen": step * config.train.global_batch,
            "tokens_seen": step * run.tokens_per_step,
        }
        logger.log(step, {"loss": result.loss, "grad_norm": result.grad_norm, "lr": lr, **measured, **progress})
        run.checkpointer.poll()
        every = config.checkpoint.every
        # Before the checkpoint: a run that continues from it does not evaluate that step again.
        if step == total or (config.train.eval_every and step % config.train.eval_every == 0):
            evaluate(run, step=step, logger=logger)
        if step == total or (every and step % every == 0):
            save(run, step=step, logger=logger)


def evaluate(run: Run, *, step: int, logger: MetricsLogger) -> None:
    """Report the loss on held-out documents: samples spread evenly over all of them, the same at every evaluation."""
    if run.held_out is None:
        return
    available = run.held_out.samples
    count = min(run.config.train.eval_samples, available)
    indices = [i * available // count for i in range(count)]
    loss = run.engine.evaluate(run.batches.evaluation(run.held_out, indices))
    logger.evaluation(step, {"held_out_loss": loss})


def save(run: Run, *, step: int, logger: MetricsLogger) -> None:
    """Start to write a checkpoint."""
    config = run.config
    extra = {
        "step": step,
        "samples_seen": step * config.train.global_batch,
        "tokens_seen": step * run.tokens_per_step,
        "lr": lr_at(step - 1, config=config.optim, total_steps=config.train.steps),
        "model": dataclasses.asdict(run.model),
        "data_order": data_order(run),
        "config": config.as_dict(),
        "code_version": code_version(),
        "logger": logger.state(),
    }
    tensors = {**run.engine.state_dict(), RNG: rng_state(dist.get_rank())}
    run.checkpointer.save(step, tensors, extra)


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


def dtype_of(config: Config) -> torch.dtype:
    """Return the arithmetic's dtype."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[config.engine.dtype]


def save_config(run_dir: Path, config: Config) -> None:
    """Write the resolved config into the run directory."""
    try:
        write_synced(run_dir / "config.yaml", config.to_yaml())
    except OSError as error:
        raise ValueError(f"the run directory {run_dir} cannot be written ({error}); set run_dir") from error


def announce(run: Run, *, degrees: Degrees, peak: Peak, step: int) -> None:
    """Print what is about to run, and the plan of the first sequence."""
    config, attention = run.config, run.batches.attention
    parameters = sum(parameter.numel() for parameter in run.engine.model.parameters())
    sample = run.training.sample(step * config.train.global_batch)
    mask = config.attention.mask(sample.cu_seqlens)
    accumulation = config.train.global_batch // (config.train.micro_batch * degrees.dp)
    run.say(
        f"model: {parameters:,} parameters, {config.engine.dtype}, {config.engine.parameters}d over "
        f"dp_replicate={degrees.dp_replicate} x dp_shard={degrees.dp_shard} x cp={degrees.cp}"
    )
    run.say(
        f"step: {run.tokens_per_step:,} tokens = {config.train.global_batch} x {config.data.seq_len:,} "
        f"({accumulation} micro-batch(es) of {config.train.micro_batch} per data-parallel rank)"
    )
    run.say(f"plan: {describe(attention.layout, mask, attention.schedule, total=config.data.seq_len)}")
    run.say(f"mfu: of {peak.description}")


def closing_words(config: Config, overrides: Sequence[str], *, steps: int) -> str:
    """Say where everything is, and the command that continues the run."""
    run_dir = Path(config.run_dir)
    kept = [override for override in overrides if not override.startswith(("train.steps=", "checkpoint.resume="))]
    command = ["./launch/train.sh", *kept, f"train.steps={2 * steps}"]
    return (
        f"finished {steps} steps\n"
        f"  checkpoints  {run_dir / 'checkpoints'}\n"
        f"  metrics      {run_dir / 'metrics.jsonl'}\n"
        f"  loss curve   {run_dir / 'loss.png'}\n"
        f"  config       {run_dir / 'config.yaml'}\n"
        f"continue with: {shlex.join(command)}"
    )


if __name__ == "__main__":
    sys.exit(main())
