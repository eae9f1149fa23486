"""Print what Triton's compiler makes of every kernel in the tile tables, per architecture; no GPU needed.

    python benchmarks/compile_report.py --arch sm_90 --family softmax sparse plain diagonal

A row: registers per thread, bytes of shared memory per program, bytes spilled per thread (stack + local), the matrix
unit's instruction, and whether the kernel keeps within the architecture's limits.
"""

import argparse
from collections.abc import Iterator

from longctx.kernels.block_sparse.triton import offline as sparse
from longctx.kernels.linear.triton import offline as linear
from longctx.kernels.softmax.triton import offline as softmax
from longctx.kernels.triton_common.launch import Launch
from longctx.kernels.triton_common.offline import SHARED_LIMITS, Binary, compile_launch

ARCHS = softmax.ARCHS
FAMILIES = ("softmax", "sparse", *linear.GATES)
BLOCKS = ("BM", "BN", "BD", "BV")
LINEAR_BLOCKS = ("C", "BK", "BV")
Configuration = softmax.Configuration | sparse.Configuration | linear.Configuration


def lines(families: list[str]) -> Iterator[tuple[Configuration, list[Launch]]]:
    """Yield all lines of the families' tables, with what they launch."""
    if "softmax" in families:
        yield from ((each, softmax.launches(each)) for each in softmax.configurations())
    if "sparse" in families:
        yield from ((each, sparse.launches(each)) for each in sparse.configurations())
    yield from ((each, linear.launches(each)) for each in linear.configurations(tuple(families)))


def row(configuration: Configuration, launch: Launch, binary: Binary) -> str:
    """Return one line of the report."""
    names = LINEAR_BLOCKS if isinstance(configuration, linear.Configuration) else BLOCKS
    blocks = " x ".join(str(launch.arguments[name]) for name in names if name in launch.arguments)
    spilled = binary.stack + binary.local
    verdict = "spills" if spilled else "shared" if binary.shared > SHARED_LIMITS[configuration.arch] else "ok"
    unit = binary.matrix_unit or ("fma" if binary.dots else "-")
    name = launch.kernel.__name__.removesuffix("_kernel")
    return (
        f"{configuration!s:48} {name:22} {blocks:20} {launch.warps:5} {launch.stages:6} {binary.registers:5} "
        f"{binary.shared:7} {spilled:7} {unit:6} {verdict}"
    )


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=list(ARCHS), choices=ARCHS)
    parser.add_argument("--family", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument(
        "--head-dim", nargs="+", type=int, help="only these; softmax and sparse have others than 64, 128, 256 too"
    )
    parser.add_argument("--kernel", nargs="+", help="only kernels with these names")
    options = parser.parse_args()
    print(
        f"{'configuration':48} {'kernel':22} {'blocks':20} {'warps':>5} {'stages':>6} {'regs':>5} {'shared':>7} "
        f"{'spilled':>7} {'unit':6}"
    )
    for configuration, launches in lines(options.family):
        wanted = options.head_dim is None or configuration.head_dim in options.head_dim
        if configuration.arch not in options.arch or not wanted:
            continue
        for launch in launches:
            if options.kernel is None or launch.kernel.__name__.removesuffix("_kernel") in options.kernel:
                print(row(configuration, launch, compile_launch(launch, configuration.arch)), flush=True)


if __name__ == "__main__":
    main()
