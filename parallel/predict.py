"""Predict how long a layer of attention takes, forward and backward, from the plan's integers and a few speeds.

Every rank's clock is moved through what it would do (`simulate.py`), with

    compute  = calls x call + FLOPs / flops      FLOPs = 2 (D + Dv) per visible pair and head; backward 2.5 x as many
    exchange = latency + bytes / bandwidth       from when both ends have posted it and the link is free; the slower of
                                                 both directions, and of the machine's own links and the network

Left out: the merges of partial results, memory, what a kernel computes outside the mask, and contention.
"""

from dataclasses import dataclass

from longctx.parallel.layout import Layout
from longctx.parallel.links import Speeds
from longctx.parallel.schedule import Schedule, Shape
from longctx.parallel.simulate import BACKWARD_FLOPS, Layer, Net
from longctx.parallel.workload import Counter


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A layer's times in seconds and bytes, each of the rank that has most.

    Attributes:
        forward, backward: until the last rank is done.
        ideal: the visible pairs' FLOPs, shared evenly by the ranks, and nothing else.
        compute: of the busiest rank, both passes.
        bytes, far_bytes: sent in both passes; to other machines.
        sampled: documents that stood for all when work was counted; None = all were counted.
    """

    layout: Layout
    schedule: Schedule
    forward: float
    backward: float
    ideal: float
    compute: float
    bytes: int
    far_bytes: int
    sampled: int | None = None

    @property
    def seconds(self) -> float:
        """Return the time of both passes."""
        return self.forward + self.backward

    @property
    def exposed(self) -> float:
        """Return the time in which the busiest rank computes nothing: messages and slower ranks are waited for."""
        return max(self.seconds - self.compute, 0.0)

    @property
    def efficiency(self) -> float:
        """Return ideal / predicted."""
        return self.ideal / self.seconds if self.seconds else 1.0


def predict(
    layout: Layout,
    schedule: Schedule,
    counter: Counter,
    *,
    shape: Shape,
    speeds: Speeds,
    per_machine: int,
) -> Prediction:
    """Predict one sequence through one layer.

    Args:
        counter: counts the sequence's work under its mask.
        shape: the heads of the whole layer.
        per_machine: neighbouring ranks of the group that are on one machine; the first rank begins one.

    Raises:
        ValueError: ranks or heads that the schedule cannot arrange.
    """
    schedule.check(layout.cp, heads=shape.heads, kv_heads=shape.kv_heads)
    workload = counter.workload(layout, schedule)
    layer = Layer(workload, schedule, shape, speeds, Net(layout.cp, per_machine, speeds))
    forward = max(layer.forward())
    layer.net.rest()
    backward = max(layer.backward())
    flops = (1 + BACKWARD_FLOPS) * workload.total_pairs * layer.flops_per_pair
    return Prediction(
        layout=layout,
        schedule=schedule,
        forward=forward,
        backward=backward,
        ideal=flops / layout.cp / speeds.flops,
        compute=max(layer.busy),
        bytes=max(layer.net.sent),
        far_bytes=max(layer.net.sent_far),
        sampled=workload.sampled,
    )
