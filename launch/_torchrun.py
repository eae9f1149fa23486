"""Run torchrun and end with the status of the rank that failed first.

torchrun itself ends with status 1 and its own stack, 40 lines that push what the rank had to say off the screen.
"""

import logging
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(argv: list[str]) -> int:
    """Run torchrun. Return 0, the failed rank's status, or 128 + the signal that ended that rank or the launcher."""
    # Its errors repeat what is said below; its warnings announce that it ends the other ranks.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        run.run(run.parse_args(argv))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode
        how = f"ended with status {status}" if status >= 0 else f"was killed by {signal.Signals(-status).name}"
        print(f"longctx: rank {rank} {how}", file=sys.stderr)
        return status if status >= 0 else 128 - status
    except SignalException as error:
        print(f"longctx: stopped by {error.sigval.name}", file=sys.stderr)
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
