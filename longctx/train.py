"""The training loop: `torchrun --nproc-per-node N -m longctx.train [overrides]`."""

import logging
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from longctx.checkpoint.checkpointer import Checkpointer
from longctx.checkpoint.durable import write_synced
from longctx.checkpoint.rng import KEY as RNG
from longctx.checkpoint.rng import reseed, rng_state
from longctx.checkpoint.version import code_version
from longctx.cli import TRAIN_HELP, leave
from longctx.config import Config, load_config
from longctx.data.batches import grad_accum_steps
from longctx.engines.engine import DTYPES
from longctx.metrics.flops import Peak, model_flops_per_step, peak_flops
from longctx.metrics.logger import MetricsLogger
from longctx.metrics.meter import StepMeter
from longctx.metrics.sparse import SparseSummary
from longctx.model import matmul_parameters
from longctx.optim import lr_at
from longctx.parallel.balance import describe
from longctx.parallel.mesh import Degrees, init_distributed, read_launch
from longctx.parallel.ranks import Ranks
from longctx.run_lock import lock_run_directory
from longctx.setup import (
    Run,
    check_kernel,
    check_world,
    data_order,
    layer_shape,
    layer_stack,
    model_shape,
    resume,
    set_aside,
    setup,
)
from longctx.stack import describe_linear


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
        degrees = check_world(config, world_size=launch.world_size, per_machine=launch.local_world_size)
        device = init_distributed(launch)
        try:
            train(
                config,
                degrees=degrees,
                per_machine=launch.local_world_size,
                device=device,
                overrides=arguments,
            )
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


def train(
    config: Config, *, degrees: Degrees, per_machine: int, device: torch.device, overrides: Sequence[str]
) -> None:
    """Set up, resume, train, evaluate, and say where everything is (collective)."""
    run_dir = Path(config.run_dir)
    with ExitStack() as stack:
        ranks = stack.enter_context(Ranks())
        say: Callable[[str], None] = _print if ranks.first else _silent
        ranks.check_equal(config.digest(), what="the configuration")
        if config.logger.debug and ranks.first:
            logging.basicConfig(format="%(name)s: %(message)s")
            logging.getLogger("longctx").setLevel(logging.DEBUG)
        kernels = check_kernel(config, device_type=device.type)
        run = setup(config, degrees=degrees, per_machine=per_machine, device=device, ranks=ranks, say=say)
        config = run.config
        # The lock is left last: the checkpoint under way when the loop ends belongs to this run.
        lock = ranks.all_succeed(lambda: lock_run_directory(run_dir, report=say) if ranks.first else None)
        if lock is not None:
            stack.enter_context(lock)
        if config.checkpoint.resume == "never":
            moved = ranks.from_first(lambda: set_aside(run_dir))
            if moved:
                say(moved)
        checkpointer = Checkpointer(run_dir, config=config.checkpoint, report=lambda text: run.say(text))
        stack.callback(checkpointer.close)
        reseed(seed=config.train.seed, step=0, rank=ranks.rank)
        step, saved = resume(run, checkpointer)
        ranks.from_first(lambda: save_config(run_dir, config))
        peak = ranks.from_first(
            lambda: peak_flops(device.type, DTYPES[config.engine.dtype], override=config.logger.peak_flops)
        )
        if ranks.first:
            announce(run, peak=peak, kernels=kernels, step=step)
        logger = ranks.all_succeed(
            lambda: MetricsLogger(
                config.logger,
                run_dir=run_dir,
                rank=ranks.rank,
                total_steps=config.train.steps,
                start_step=step,
                resolved_config=config.as_dict(),
                state=saved.get("logger"),
            )
        )
        stack.enter_context(logger)
        run.say = logger.message
        meter = StepMeter(world_size=ranks.size, device_type=device.type, peak_flops=peak.value)
        try:
            loop(run, checkpointer=checkpointer, logger=logger, meter=meter, step=step)
        except ValueError as error:  # not the user's: the configuration and the data have been checked
            raise RuntimeError("training failed") from error
    say(closing_words(config, overrides, steps=max(step, config.train.steps), world_size=ranks.size))


def loop(run: Run, *, checkpointer: Checkpointer, logger: MetricsLogger, meter: StepMeter, step: int) -> None:
    """Train from `step` to the end of the run."""
    config, total = run.config, run.config.train.steps
    ways: dict[str, tuple[str, ...]] = {}
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
            num_params_in_matmuls=matmul_parameters(run.model, run.config.layers),
            visible_pairs=result.visible_pairs,
            num_heads=run.model.num_heads,
            head_dim=run.model.head_size,
            recurrences=run.batches.stack.shape.linear_flops_per_token,
        )
        measured = meter.end(tokens=run.tokens_per_step, model_flops=flops)
        step += 1
        progress = {
            "samples_seen": step * config.train.global_batch,
            "tokens_seen": step * run.tokens_per_step,
        }
        selected = run.batches.stack.monitor.take()
        ways = tell_moves(run, selected, ways)
        told = {"loss": result.loss, "grad_norm": result.grad_norm, "lr": lr, **measured, **progress}
        if result.added_loss:
            told["added_loss"] = result.added_loss
        logger.log(step, {**told, **selected.metrics()})
        checkpointer.poll()
        if result.num_labels == 0:
            run.say(f"note: step {step} has no label, every document being one token long: nothing was learned")
        every = config.checkpoint.every
        # Before the checkpoint: a run that continues from it does not evaluate that step again.
        if step == total or (config.train.eval_every and step % config.train.eval_every == 0):
            evaluate(run, step=step, logger=logger)
        if step == total or (every and step % every == 0):
            save(run, checkpointer=checkpointer, step=step, logger=logger)


def tell_moves(run: Run, selected: SparseSummary, before: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Say how K/V of sparse layers moved when that is new or has changed; return how they did."""
    ways = {**before, **selected.ways()}
    if run.degrees.cp == 1:  # nothing moves
        return ways
    for kind, told in selected.choices().items():
        if ways[kind] != before.get(kind):
            run.say(f"{kind}: attention.kv_moves={run.config.attention.kv_moves} is {told}")
    return ways


def evaluate(run: Run, *, step: int, logger: MetricsLogger) -> None:
    """Report the loss on held-out documents: samples spread evenly over all of them, the same at every evaluation."""
    if run.held_out is None:
        return
    available = run.held_out.samples
    count = min(run.config.train.eval_samples, available)
    indices = [i * available // count for i in range(count)]
    loss = run.engine.evaluate(run.batches.evaluation(run.held_out, indices, step=step))
    logger.evaluation(step, {"held_out_loss": loss})


def save(run: Run, *, checkpointer: Checkpointer, step: int, logger: MetricsLogger) -> None:
    """Start to write a checkpoint."""
    config = run.config
    extra = {
        "step": step,
        "samples_seen": step * config.train.global_batch,
        "tokens_seen": step * run.tokens_per_step,
        "lr": lr_at(step - 1, config=config.optim, total_steps=config.train.steps),
        "model": model_shape(run),
        "layers": layer_stack(run),
        "kinds": list(config.layers.kinds),
        "data_order": data_order(run),
        "config": config.as_dict(),
        "code_version": code_version(),
        "logger": logger.state(),
    }
    tensors = {**run.engine.state_dict(), RNG: rng_state(dist.get_rank())}
    checkpointer.save(step, tensors, extra)


def save_config(run_dir: Path, config: Config) -> None:
    """Write the resolved config into the run directory."""
    try:
        write_synced(run_dir / "config.yaml", config.to_yaml())
    except OSError as error:
        raise ValueError(f"the run directory {run_dir} cannot be written ({error}); set run_dir") from error


def announce(run: Run, *, peak: Peak, kernels: dict[str, str], step: int) -> None:
    """Print what is about to run, and the plan of the first sequence (rank 0)."""
    config, degrees, stack = run.config, run.degrees, run.batches.stack
    train, seq_len = config.train, config.data.seq_len
    sample = run.training.sample(step * train.global_batch)
    accumulation = grad_accum_steps(global_batch=train.global_batch, micro_batch=train.micro_batch, dp_size=degrees.dp)
    run.say(
        f"model: {run.engine.num_parameters:,} parameters, {config.engine.dtype}, engine.parameters="
        f"{config.engine.parameters} over dp_replicate={degrees.dp_replicate} x dp_shard={degrees.dp_shard} x "
        f"cp={degrees.cp}"
    )
    run.say(
        f"step: {run.tokens_per_step:,} tokens = {train.global_batch} x {seq_len:,} ({accumulation} micro-batch(es) of "
        f"{train.micro_batch} per data-parallel rank); an epoch has {run.training.samples_per_epoch:,} sequences"
    )
    for kind, mask in stack.masks(sample.cu_seqlens).items():
        told = describe(stack.softmax.layout, [mask], stack.softmax.schedule, total=seq_len, shape=layer_shape(config))
        where = f" of {kind} layers" if config.attention.layers is not None else ""
        run.say(f"plan{where}: {told}; kernel {kernels['softmax']}")
    for line in describe_linear(stack.shape, states=stack.states, sequences=train.global_batch // degrees.dp):
        run.say(line)
    for kind in stack.layers.linear_kinds:
        run.say(f"kernel of {kind}: {kernels[kind]}")
    for kind in stack.layers.sparse_kinds:
        run.say(f"kernel of {kind}: {kernels[kind]}")
        settings = stack.layers.mixers.sparse_kind(kind)
        note = settings.note(heads=run.model.num_heads, kv_heads=run.model.num_kv_heads)
        if note is not None:
            run.say(f"note: mixers.{kind}: {note}")
    if not stack.layers.softmax and not stack.layers.sparse:
        model = config.model
        unused = {"attention.schedule": config.attention.schedule, "model.num_kv_heads": model.num_kv_heads}
        unused |= {f"model.{key}": getattr(model, key) for key in ("qk_norm", "softcap", "sink_logits")}
        told = ", ".join(f"{key}={value}" for key, value in unused.items() if value not in ("none", None, False))
        run.say(f"note: no layer is softmax attention, so {told} have no effect")
    if kernels.get("softmax") == "reference" and config.attention.kernel == "auto":
        run.say("note: no fast kernel serves this device, dtype and head size: the reference kernel is slow")
    if run.held_out is None:
        run.say("note: nothing is evaluated (data.held_out or train.eval_samples is 0)")
    run.say(f"mfu: of {peak.description}")


def closing_words(config: Config, overrides: Sequence[str], *, steps: int, world_size: int) -> str:
    """Say how far the run is, where everything is, and the command that continues it."""
    run_dir = Path(config.run_dir)
    kept = [override for override in overrides if not override.startswith(("train.steps=", "checkpoint.resume="))]
    command = shlex.join(["./launch/train.sh", *kept, f"train.steps={2 * steps}"])
    again = "\n  (the learning rate rises again: its curve is drawn over all train.steps)"
    return (
        f"finished {steps} steps\n"
        f"  checkpoints  {run_dir / 'checkpoints'}\n"
        f"  metrics      {run_dir / 'metrics.jsonl'}\n"
        f"  loss curve   {run_dir / 'loss.png'}\n"
        f"  config       {run_dir / 'config.yaml'}\n"
        f"continue with: NPROC={world_size} {command}{again if config.optim.schedule == 'cosine' else ''}"
    )


def _print(text: str) -> None:
    print(text, flush=True)


def _silent(text: str) -> None:
    pass


if __name__ == "__main__":
    leave(main())
