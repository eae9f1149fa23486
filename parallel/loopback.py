"""N simulated ranks in one process: every schedule, forward and backward, without a process group.

Each rank is a thread that runs the same function with its own transport; messages pass through queues. Results do not
depend on timing, since a rank reads each peer's messages in the order they were sent. One rank computes at a time,
until it has to wait for a message: threads that fight for the interpreter take two to three times as long.
"""

import queue
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from longctx.parallel.transport import Exchange, Parcels, Traffic

Result = TypeVar("Result")
TIMEOUT_SECONDS = 120.0


Route = tuple[int, int, int]  # sender, receiver, lane
Box = queue.SimpleQueue[tuple[Tensor, ...]]


class _Post:
    """All messages of a simulated group. The n-th one of a route is what the n-th receive asks for."""

    def __init__(self) -> None:
        self._boxes: dict[tuple[Route, int], Box] = defaultdict(queue.SimpleQueue)
        self._sent: Counter[Route] = Counter()
        self._asked: Counter[Route] = Counter()
        self._lock = threading.Lock()
        self.turn = threading.Lock()  # held by the rank that computes
        self.failed = threading.Event()

    def send(self, route: Route, message: tuple[Tensor, ...]) -> None:
        with self._lock:
            self._boxes[route, self._sent[route]].put(message)
            self._sent[route] += 1

    def receive(self, route: Route) -> Box:
        """Return where the next message of a route will be."""
        with self._lock:
            self._asked[route] += 1
            return self._boxes[route, self._asked[route] - 1]

    def undelivered(self) -> list[Route]:
        return [route for (route, _), box in self._boxes.items() if not box.empty()]


class LoopbackTransport:
    """One simulated rank's view of the group."""

    def __init__(self, rank: int, size: int, post: _Post) -> None:
        self.rank = rank
        self.size = size
        self.traffic = Traffic()
        self._post = post

    def exchange(self, outgoing: Parcels, incoming: Parcels, *, lane: int = 0) -> Exchange:
        assert outgoing or incoming, "an exchange without any message"
        self.traffic.add(outgoing)
        for peer, tensors in outgoing.items():
            self._post.send((self.rank, peer, lane), tuple(tensor.detach().clone() for tensor in tensors))
        boxes = [(self._post.receive((peer, self.rank, lane)), tensors) for peer, tensors in incoming.items()]
        return _LoopbackExchange(boxes, self._post)


class _LoopbackExchange:
    def __init__(
        self,
        boxes: Sequence[tuple[Box, Sequence[Tensor]]],
        post: _Post,
    ) -> None:
        self._boxes = boxes
        self._post = post

    def wait(self) -> None:
        for box, buffers in self._boxes:
            for buffer, tensor in zip(buffers, self._next(box), strict=True):
                assert buffer.shape == tensor.shape and buffer.dtype == tensor.dtype, (buffer.shape, tensor.shape)
                buffer.copy_(tensor)
        self._boxes = ()

    def _next(self, box: Box) -> tuple[Tensor, ...]:
        try:
            return box.get_nowait()
        except queue.Empty:
            self._post.turn.release()
        try:
            return self._later(box)
        finally:
            self._post.turn.acquire()

    def _later(self, box: Box) -> tuple[Tensor, ...]:
        waited = 0.0
        while True:
            try:
                return box.get(timeout=0.2)
            except queue.Empty:
                if self._post.failed.is_set():
                    raise RuntimeError("another simulated rank failed") from None
                if self._post.turn.locked():  # somebody computes, and may send
                    continue
                waited += 0.2
                if waited >= TIMEOUT_SECONDS:
                    raise RuntimeError("no message came: the simulated ranks disagree about the hops") from None


def run_ranks(size: int, function: Callable[[LoopbackTransport], Result]) -> list[Result]:
    """Run `function(transport)` on `size` simulated ranks and return their results in rank order.

    The first exception of any rank is raised here, and a hop without a partner fails after a time-out. All messages
    must have been received at the end.
    """
    post = _Post()
    results: list[Result | None] = [None] * size
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            with post.turn, torch.set_grad_enabled(True):
                results[rank] = function(LoopbackTransport(rank, size, post))
        except BaseException as error:  # handed to the caller below
            if not post.failed.is_set():
                errors.append(error)
            post.failed.set()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert not post.undelivered(), f"sent and never received (sender, receiver, lane): {post.undelivered()}"
    return results  # type: ignore[return-value]
