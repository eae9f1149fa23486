"""The four factors of attention by name, as config has them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, get_args

from torch import Tensor

from longctx.kernels.mask import HeadMasks, Mask, causal, chunked, documents, full, per_head, prefix_lm, sliding_window
from longctx.kernels.softmax.op import KERNELS
from longctx.loss import IGNORED
from longctx.mixers.pattern import LINEAR_KINDS, SPARSE_KINDS, parse_layers, parse_round
from longctx.parallel.layout import Layout, LayoutName
from longctx.parallel.registry import ScheduleOptions, check_schedule, resolve_schedule
from longctx.parallel.schedule import Schedule
from longctx.parallel.state_passing import resolve_passing
from longctx.sparse_moves import MOVES, SELECTIVE, MovesName

STATE_LAYOUTS = ("same", "contiguous", "zigzag")
LEAST_STRIPE = 16  # tokens of the narrowest stripes between which states are passed: each has a state of its own
ONE_TEAM = ("ulysses", "local")  # schedules under which all ranks share heads, or there is one rank
MASK_KEYS = ("documents", "window", "head_windows", "sinks", "chunk", "prefix")  # who sees whom


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """The four factors, by name.

    Attributes:
        layout: `contiguous`, `zigzag` or `striped`: which positions a rank owns; `auto`: the fastest by prediction.
        width: tokens per stripe; `striped` only.
        schedule: `ring`, `double_ring`, `all_gather`, `ulysses`, `usp` or `local`: whose K/V arrives when; `auto`.
        backward: what travels in the backward pass of a ring: `auto`, `rotate_kv` or `rotate_q` (BurstAttention).
        inner: ranks of an inner ring, `double_ring` only; null = ranks per machine.
        ulysses: ranks that share heads, `usp` only; null = as many on a machine as divide the heads.
        innermost: `ulysses` or `ring`: whether neighbouring ranks share heads or K/V; `usp` only.
        gather_heads: KV heads that `all_gather` collects at a time.
        documents: hide other documents of a packed sequence.
        window: keys that a token sees, itself included; null = all before it.
        head_windows: a window for each query head (null = all before it) instead of `window`.
        sinks: first tokens of each document that stay visible outside the window.
        chunk: a token sees its own chunk of so many tokens only, counted from the document's start; null = no chunks.
        prefix: first tokens of each document that see each other both ways (prefix LM), and are not predicted.
        kernel: who computes tiles: `auto`, `torch`, `triton`, `flash_attn` or `reference` (`kernels.softmax.op`).
        layers: kinds of layers as a pattern such as `gdn*3 + full`, repeated over the depth, or as a list with a kind
            for each; null = all are softmax attention under this mask. The mask's window is that of kind `window`.
        state_layout: which positions a rank owns in linear layers: `same` as in the others, `contiguous` or `zigzag`,
            through a relayout; null = the same where states are cheaper to pass than tokens to move, else contiguous.
        state_passing: `ring`, `all_gather`, `log_depth` or `pipelined`: whose state arrives when.
        state_splits: blocks that `pipelined` cuts a state into; null = 4.
        kv_moves: sparse layers: which K/V travel, and how: `all` (as for dense attention), `hops` (on the schedule, but
            without what nobody selected), `blocks` (the selected blocks alone), or `auto`: what sends less, with
            `gather_heads` always `hops`.
    """

    layout: str = "striped"
    width: int = 1
    schedule: str = "ring"
    backward: str | None = None
    inner: int | None = None
    ulysses: int | None = None
    innermost: str | None = None
    gather_heads: int | None = None
    documents: bool = True
    window: int | None = None
    head_windows: list[int | None] | None = None
    sinks: int = 0
    chunk: int | None = None
    prefix: int | None = None
    kernel: str = "auto"
    layers: Any = None
    state_layout: str | None = None
    state_passing: str = "all_gather"
    state_splits: int | None = None
    kv_moves: str = "auto"

    def validate(self) -> None:
        """Refuse unknown names and impossible products."""
        if self.layout not in (*get_args(LayoutName), "auto"):
            known = ", ".join((*get_args(LayoutName), "auto"))
            raise ValueError(f"attention.layout={self.layout} is not known; known are {known}")
        if self.layout != "auto":
            self.make_layout(cp=1)
        elif self.width != 1:
            raise ValueError(f"attention.layout=auto chooses attention.width too; given {self.width}. Leave it 1")
        if self.schedule == "auto":
            given = [key for key, value in vars(self.options).items() if value is not None]
            if given:
                raise ValueError(f"attention.schedule=auto chooses attention.{given[0]} too; leave it null")
        else:
            check_schedule(self.schedule, self.options, also=("auto",))
            if self.schedule == "local" and self.layout not in ("contiguous", "auto"):
                raise ValueError(
                    f"attention.schedule=local keeps a sequence on one rank in its order, so attention.layout "
                    f"must be contiguous; given {self.layout}. Use attention.schedule=ring for layout {self.layout}"
                )
        if self.kernel not in KERNELS:
            raise ValueError(f"attention.kernel={self.kernel} is not known; known are {', '.join(KERNELS)}")
        self._validate_mask()
        self._validate_layers()

    def _validate_layers(self) -> None:
        kinds = {"full"} if self.layers is None else set(parse_round(self.layers))
        linear = kinds.intersection(LINEAR_KINDS)
        if self.layers is not None and self.windowed != ("window" in kinds):
            key = "attention.window" if self.head_windows is None else "attention.head_windows"
            raise ValueError(
                f"{key} is that of layers of kind window, of which attention.layers={self.layers} names none: leave it "
                "null, or name some"
                if self.windowed
                else f"attention.layers={self.layers} names layers of kind window: set attention.window"
            )
        self._validate_sparse(kinds)
        if kinds == linear:
            schedule = () if self.schedule == "auto" else ("schedule",)
            keys = (*schedule, "backward", "inner", "ulysses", "innermost", "gather_heads", "chunk", "prefix", "kernel")
            self._refuse_without("softmax attention", keys)
        if not linear:
            self._refuse_without("linear", ("state_layout", "state_passing", "state_splits"))
        resolve_passing(self.state_passing, splits=self.state_splits)
        if self.state_layout not in (None, *STATE_LAYOUTS):
            known = ", ".join(STATE_LAYOUTS)
            raise ValueError(f"attention.state_layout={self.state_layout} is not known; known are {known}, or null")
        if self.state_layout == "same" and self.layout == "striped" and self.width < LEAST_STRIPE:
            raise ValueError(
                f"attention.state_layout=same would pass a state for every stripe of {self.width} token(s): set "
                f"attention.width >= {LEAST_STRIPE}, another attention.layout, or attention.state_layout=contiguous"
            )

    def _validate_sparse(self, kinds: set[str]) -> None:
        sparse = sorted(kinds.intersection(SPARSE_KINDS))
        if self.kv_moves not in MOVES:
            raise ValueError(f"attention.kv_moves={self.kv_moves} is not known; known are {', '.join(MOVES)}")
        if not sparse:
            self._refuse_without("sparse", ("kv_moves",))
            return
        for key in ("chunk", "prefix"):
            if (value := getattr(self, key)) is not None:
                raise ValueError(
                    f"attention.{key}={value} cannot be honoured by layers of kind {', '.join(sparse)}, which see what "
                    f"they select of all before them: leave it null, or use layers of kind full, window"
                )
        for key in ("layout", "schedule"):
            if getattr(self, key) == "auto":
                raise ValueError(
                    f"attention.{key}=auto is predicted from masks, which do not say what layers of kind "
                    f"{', '.join(sparse)} select: name a {key}"
                )
        if self.kv_moves in SELECTIVE and self.schedule in ONE_TEAM:
            raise ValueError(
                f"attention.kv_moves={self.kv_moves} has no effect with attention.schedule={self.schedule}, where "
                "every rank has all tokens of its heads and nothing that is selected travels: leave it auto, or use "
                "attention.schedule=ring|double_ring|all_gather|usp"
            )
        if self.kv_moves == "blocks" and self.gather_heads is not None:
            raise ValueError(
                f"attention.kv_moves=blocks collects selected blocks of all KV heads at once, so that "
                f"attention.gather_heads={self.gather_heads} cannot be honoured: set attention.kv_moves=hops, or leave "
                "attention.gather_heads null"
            )

    def refuse_moves(self, dense: Sequence[str]) -> None:
        """Refuse to move only what is selected where all sparse layers are of kinds that are `dense` (ValueError)."""
        if self.kv_moves in SELECTIVE:
            modes = ", ".join(f"mixers.{kind}.mode" for kind in dense)
            raise ValueError(
                f"attention.kv_moves={self.kv_moves} has no effect with {modes}=distill, whose attention is dense: "
                f"leave it auto, or set {modes}=sparse"
            )

    def refuse_dense(self) -> None:
        """Refuse settings of attention under a mask, where no layer has any (ValueError)."""
        self._refuse_without("attention under a mask", ("backward", "kernel"))

    def _refuse_without(self, what: str, keys: Sequence[str]) -> None:
        default = AttentionConfig()
        for key in keys:
            if (value := getattr(self, key)) != getattr(default, key):
                hint = "; kernels of other layers are set by mixers.<kind>.kernel" if key == "kernel" else ""
                leave = "null" if getattr(default, key) is None else getattr(default, key)
                raise ValueError(
                    f"attention.{key}={value} has no effect: no layer of attention.layers={self.layers or 'null'} is "
                    f"{what}; leave it {leave}{hint}"
                )

    def _validate_mask(self) -> None:
        for key in ("window", "chunk", "prefix"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"attention.{key} must be >= 1 or null; given {value}")
        if self.head_windows is not None:
            if self.window is not None:
                raise ValueError("attention.window and attention.head_windows exclude each other; leave one null")
            if any(window is not None and window < 1 for window in self.head_windows):
                raise ValueError(f"attention.head_windows must be >= 1 or null each; given {self.head_windows}")
        if self.sinks < 0:
            raise ValueError(f"attention.sinks must be >= 0; given {self.sinks}")
        if self.sinks and all(window is None for window in (self.window, *(self.head_windows or ()))):
            raise ValueError(
                f"attention.sinks={self.sinks} keeps tokens visible outside a window; set attention.window, or sinks=0"
            )

    def check_heads(self, num_heads: int) -> None:
        """Refuse per-head windows of another number of heads."""
        if self.head_windows is not None and len(self.head_windows) != num_heads:
            raise ValueError(
                f"attention.head_windows needs model.num_heads={num_heads} entries; given {len(self.head_windows)}"
            )

    @property
    def windowed(self) -> bool:
        """Tell whether some tokens see less than all before them because of a window."""
        return self.window is not None or self.head_windows is not None

    def kinds(self, num_layers: int) -> tuple[str, ...]:
        """Return the kind of each layer."""
        if self.layers is None:
            return ("window" if self.windowed else "full",) * num_layers
        return parse_layers(self.layers, num_layers=num_layers)

    @property
    def options(self) -> ScheduleOptions:
        """Return the options of the schedule."""
        return ScheduleOptions(
            backward=self.backward,
            inner=self.inner,
            ulysses=self.ulysses,
            innermost=self.innermost,
            gather_heads=self.gather_heads,
        )

    def without_auto(self) -> "AttentionConfig":
        """Return plain names for `auto`: contiguous shards, and a ring."""
        layout = "contiguous" if self.layout == "auto" else self.layout
        return replace(self, layout=layout, schedule="ring" if self.schedule == "auto" else self.schedule)

    @property
    def moves(self) -> MovesName:
        """Return how K/V of sparse layers move: `kv_moves`, but never blocks by choice where heads are to be gathered
        a few at a time."""
        assert self.kv_moves in MOVES, self.kv_moves
        return "hops" if self.kv_moves == "auto" and self.gather_heads is not None else self.kv_moves  # type: ignore[return-value]

    @property
    def distributed(self) -> bool:
        """Tell whether the schedule can share a sequence between ranks."""
        return self.schedule != "local"

    def make_layout(self, cp: int) -> Layout:
        """Return the token layout over `cp` ranks."""
        return Layout(self.layout, cp, self.width)  # type: ignore[arg-type]

    def make_schedule(self, cp: int, *, heads: int, kv_heads: int, per_machine: int) -> Schedule:
        """Return the schedule over `cp` ranks, `per_machine` neighbours of which are on one machine.

        Raises:
            ValueError: ranks or heads that it cannot arrange; names the key and what would do.
        """
        schedule = resolve_schedule(self.schedule, self.options, cp=cp, heads=heads, per_machine=per_machine)
        schedule.teams(cp)
        schedule.check(cp, heads=heads, kv_heads=kv_heads)
        return schedule

    def mask(self, cu_seqlens: Sequence[int], *, kind: str = "window") -> Mask | HeadMasks:
        """Return the mask of one packed sequence with these document bounds, in layers `full` or `window`."""
        mask: Mask | HeadMasks = causal() if self.prefix is None else prefix_lm(self.prefix)
        if self.documents:
            mask = mask & documents(tuple(cu_seqlens))
        if self.chunk is not None:
            mask = mask & chunked(self.chunk)
        if kind == "full":
            return mask
        if self.head_windows is not None:
            return mask & per_head([self._window(window) for window in self.head_windows])
        return mask & self._window(self.window)

    def hide_visible_labels(self, labels: Tensor, cu_seqlens: Sequence[int]) -> None:
        """Ignore, in place, labels `[T]` of one sequence that their own token sees: those inside a prefix."""
        if self.prefix is None:
            return
        bounds = cu_seqlens if self.documents else (0, len(labels))
        for first, end in pairwise(bounds):
            labels[first : min(first + self.prefix, end) - 1] = IGNORED

    def _window(self, window: int | None) -> Mask:
        return full() if window is None else sliding_window(window - 1, None, sinks=self.sinks)
