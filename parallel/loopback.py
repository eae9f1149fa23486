"""N simulated ranks in one process: every schedule, forward and backward, without a process group.

Each rank is a thread that runs the same function with its own transport; hops pass through queues. Results do not
depend on timing, since a rank reads each neighbour's messages in the order they were sent.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from longctx.parallel.transport import Exchange, Traffic

Result = TypeVar("Result")
TIMEOUT_SECONDS = 120.0


class LoopbackTransport:
    """One simulated rank's view of the group."""

    def __init__(
        self, rank: int, mailboxes: Sequence["queue.SimpleQueue[tuple[Tensor, ...]]"], failed: threading.Event
    ):
        self.rank = rank
        self.size = len(mailboxes)
        self.traffic = Traffic()
        self._mailboxes = mailboxes
        self._failed = failed

    def shift(self, tensors: Sequence[Tensor]) -> Exchange:
        outgoing = tuple(tensor.detach().clone() for tensor in tensors)
        self.traffic.add(outgoing)
        self._mailboxes[(self.rank + 1) % self.size].put(outgoing)
        return _LoopbackExchange(self._mailboxes[self.rank], self._failed)


class _LoopbackExchange:
    def __init__(self, mailbox: "queue.SimpleQueue[tuple[Tensor, ...]]", failed: threading.Event) -> None:
        self._mailbox = mailbox
        self._failed = failed

    def wait(self) -> tuple[Tensor, ...]:
        waited = 0.0
        while True:
            try:
                return self._mailbox.get(timeout=0.2)
            except queue.Empty:
                waited += 0.2
                if self._failed.is_set():
                    raise RuntimeError("another simulated rank failed") from None
                if waited >= TIMEOUT_SECONDS:
                    raise RuntimeError("no message came: the simulated ranks disagree about the hops") from None


def run_ranks(size: int, function: Callable[[LoopbackTransport], Result]) -> list[Result]:
    """Run `function(transport)` on `size` simulated ranks and return their results in rank order.

    The first exception of any rank is raised here, and a hop without a partner fails after a time-out. All messages
    must have been received at the end.
    """
    mailboxes: list[queue.SimpleQueue[tuple[Tensor, ...]]] = [queue.SimpleQueue() for _ in range(size)]
    failed = threading.Event()
    results: list[Result | None] = [None] * size
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            with torch.set_grad_enabled(True):
                results[rank] = function(LoopbackTransport(rank, mailboxes, failed))
        except BaseException as error:  # handed to the caller below
            if not failed.is_set():
                errors.append(error)
            failed.set()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert all(mailbox.empty() for mailbox in mailboxes), "a message was sent and never received"
    return results  # type: ignore[return-value]
