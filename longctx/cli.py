"""The `longctx` command: name a command, hand it its arguments.

Only the standard library is imported here; a command's own module is imported when it runs. So help is instant, and
works where torch is missing or broken.
"""

import atexit
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

USAGE = """\
usage: longctx <command> [arguments]

Train language models on long contexts:
attention = token layout x communication schedule x mask x local kernel

commands:
{commands}

`longctx <command> --help` explains a command. `python -m longctx` is the same as `longctx`.
"""

TRAIN_HELP = """\
usage: longctx train [key=value ...]
       torchrun --nproc-per-node N -m longctx.train [key=value ...]      one process per rank
       ./launch/train.sh [key=value ...]                                 makes the environment, then two ranks

Train a model, or continue a run: a run directory that holds a checkpoint is continued from the newest one.
Every argument is a hydra override; without any, the default run is a small model on Python's own source code.

config groups, `group=choice`:
  attention=all_gather|auto|burst|double_ring|local|ring|striped|ulysses|usp|window|window_sink|zigzag|
            window_full_3_1|deltanet|gdn|gdn_3_1|gla|kda|lightning|minimax_7_1|transnormer|
            moba|moba_full|nsa|seer|landmark|mosa|routing|sla|
            sparse_strided|sparse_fixed|s2|neighborhood|vertical_slash
                                             token layout, schedule, mask and kernel of the attention
  mixers=default                             what surrounds attention or recurrence in each kind of layer
  model=tiny|llama3_8b|qwen3_8b              the decoder
  data=stdlib|folder|txt|jsonl|bin           where documents come from, how they are tokenized and packed
  parallel=auto                              how ranks are arranged: replicas, shards, context parallelism
  engine=native                              who owns parameters, gradients and optimizer state
  optim=adamw_cosine|adamw_wsd               optimizer and learning-rate schedule
  checkpoint=default                         when to save, how many to keep, where to continue from
  logger=default                             console, TensorBoard, wandb
  experiment=smoke                           several of these at once (none by default)

keys used most, `group.key=value` (all of them, with what they mean: the files of configs/):
  run_dir=PATH                               where checkpoints, metrics and the resolved config go
  data.seq_len=N                             tokens per sequence, over all ranks that share it
  parallel.cp=N                              ranks that share one sequence (context parallelism)
  attention.layout=contiguous|zigzag|striped|auto
                                             which positions a rank owns; auto: what is predicted to be fastest
  attention.schedule=ring|double_ring|all_gather|ulysses|usp|auto
                                             whose keys and values arrive when, and how
  attention.layers="gdn*3 + full"            kinds of layers, softmax, sparse and linear, repeated over the depth
  mixers.moba.topk=8                         settings of a kind of layer: configs/mixers/default.yaml has all
  attention.kv_moves=blocks                  sparse layers: which K/V travel: auto | all | hops | blocks
  attention.window=N                         keys that a token sees; attention.sinks=N first tokens stay visible
  train.steps=N                              optimizer steps of the whole run
  train.global_batch=N                       sequences per optimizer step, over all ranks
  optim.lr=X                                 peak learning rate
  engine.parameters=replicate|shard          a copy of the parameters on every rank, or a share of them (FSDP2)
  engine.dtype=float32|bfloat16|float64      arithmetic of forward and backward
  checkpoint.every=N                         steps between two checkpoints
  checkpoint.resume=auto|never|PATH          auto: from the newest checkpoint of run_dir if there is one
  logger.wandb.mode=off|offline|online       log to Weights & Biases too

examples:
  longctx train                                         one rank, no launcher
  ./launch/train.sh attention=zigzag data.seq_len=16384
  NPROC=4 ./launch/train.sh parallel.cp=4 run_dir=runs/cp4

An unknown key, a wrong type or a combination that cannot work is refused before anything is built; the message names
the key and the alternatives.
"""

VERIFY_HELP = """\
usage: longctx verify [--tokens N] [key=value ...]
       torchrun --nproc-per-node N -m longctx.verify [key=value ...]     on the real ranks, devices and network

Prove on your own configuration, at small size, that context parallelism changes nothing: every check is a line of a
table with what was measured, what it must be, and pass or FAIL with the place and the likely cause.

Takes the arguments of `longctx train` (see `longctx train --help`). Without torchrun the ranks are simulated in this
process: parallel.cp of them, or 4. Layers and tokens are few, heads, KV heads, mask, layout, schedule, kernel and dtype
are yours; windows, chunks and prefixes that would not cut inside so short a sequence are scaled, and that is printed.

checked:
  layout, positions, labels, mask            against the tokens of a corpus and the words of the configuration
  plan                                       every visible pair is computed once; nothing else is fetched
  attention                                  outputs and all gradients in float64 against dense attention, and in
                                             engine.dtype within 2x (gradients 3x) of torch's own error
  linear layers                              outputs, states, all gradients, convolutions against the recurrence
  leak probes                                change one token: exactly what may see it moves, forward and backward
  traffic                                    hops and bytes against the plan, and against the textbook's formulas;
                                             states, halos and relayouts likewise
  decoder                                    loss and every parameter's gradient against one rank; with torchrun also
                                             a step of the engine

  --tokens N                                 tokens per rank (default 67, fewer where heads x ranks are many)

examples:
  longctx verify attention=zigzag parallel.cp=8
  longctx verify attention.window=4096 attention.sinks=4 data.seq_len=131072 engine.dtype=bfloat16
  torchrun --nproc-per-node 8 -m longctx.verify model=llama3_8b attention.schedule=ulysses engine.dtype=bfloat16

Exit status: 0 all passed, 1 something failed, 2 the configuration cannot run.
"""


PLAN_HELP = """\
usage: longctx plan [--per-machine N] [key=value ...]

Print who computes and sends what for the first sequence of a run, without running it: pairs per rank and hop, balance,
tiles, hops that are needed, bytes per layer; with attention=auto also why. Takes the arguments of `longctx train`
(see `longctx train --help`). Ranks are imagined: parallel.cp of them, or 4.

  --per-machine N                            ranks per machine (default: half of them)

attention=auto is decided with the speeds of this machine; for another one set parallel.attention_tflops,
parallel.local_gb_per_s, parallel.network_gb_per_s and so on (docs/planner.md).

examples:
  longctx plan parallel.cp=8 data.seq_len=131072
  longctx plan attention=auto parallel.cp=64 --per-machine 8 data.seq_len=1048576 model=llama3_8b
  longctx plan attention=window attention.window=4096 parallel.cp=16 data.seq_len=262144
"""


@dataclass(frozen=True, kw_only=True)
class Command:
    """Describe a command: its module has `main(argv: list[str] | None) -> int`."""

    module: str
    summary: str
    help: str


COMMANDS: dict[str, Command] = {
    "train": Command(module="longctx.train", summary="train a model, or continue a run", help=TRAIN_HELP),
    "plan": Command(module="longctx.plan_command", summary="who computes and sends what, counted", help=PLAN_HELP),
    "verify": Command(
        module="longctx.verify", summary="prove a configuration at small size, in a table", help=VERIFY_HELP
    ),
}


def take_number(arguments: Sequence[str], option: str, *, what: str, least: int = 0) -> tuple[list[str], int | None]:
    """Split off `option N` (or `option=N`): return the other arguments, which are hydra overrides, and N or None.

    Raises:
        ValueError: no number, or one below `least`; `what` says what it is the number of.
    """
    overrides: list[str] = []
    number: int | None = None
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name != option:
            overrides.append(argument)
            continue
        text = value if equals else next(rest, "")
        if not text.isdecimal() or int(text) < least:
            raise ValueError(f"{option} needs a number of {what}; given {text!r}")
        number = int(text)
    return overrides, number


def usage() -> str:
    """Return the text of `longctx --help`."""
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return USAGE.format(commands="\n".join(lines))


def run() -> NoReturn:
    """Run the process's own command line and end the process with its status."""
    try:
        status = main()
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # whoever read the output has seen enough
        status = 128 + 13
    leave(status)


def leave(status: int) -> NoReturn:
    """End this process with `status`, after the exit handlers and without taking the interpreter apart.

    torch's caches hold device meshes, and those their gloo groups, whose threads live on after
    `destroy_process_group`. One that still has to let go of a tensor when Python is being taken apart aborts the
    process ("terminate called without an active exception"), and a finished run would look like a failed one.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:  # whoever read it has seen enough
            status = status or 128 + 13
        except OSError as error:
            os.write(2, f"error: output could not be written: {error}\n".encode())
            status = status or 1
    os._exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    `argv` is the command line without the program's name; None takes the process's own. Status 2 is a command line that
    cannot be understood; any other status is the command's.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        print(usage(), end="", file=sys.stderr)
        return 2
    name, rest = arguments[0], arguments[1:]
    if name in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    if name in ("-V", "--version"):
        from longctx import __version__

        print(f"longctx {__version__}")
        return 0
    command = COMMANDS.get(name)
    if command is None:
        print(f"longctx: unknown command '{name}'; the commands are: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if "-h" in rest or "--help" in rest:
        print(command.help, end="")
        return 0
    return int(importlib.import_module(command.module).main(rest))
