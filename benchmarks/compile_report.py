"""Print what Triton's compiler makes of every kernel in the tile tables, per architecture; no GPU needed.

    python benchmarks/compile_report.py --arch sm_90 --family plain diagonal

A row: registers per thread, bytes of shared memory per program, bytes spilled per thread (stack + local), the matrix
unit's instruction, and whether the kernel keeps within the architecture's limits.
"""

import argparse

from longctx.kernels.linear.triton.offline import ARCHS, GATES, Configuration, configurations, launches
from longctx.kernels.triton_common.launch import Launch
from longctx.kernels.triton_common.offline import SHARED_LIMITS, Binary, compile_launch


def row(configuration: Configuration, launch: Launch, binary: Binary) -> str:
    """Return one line of the report."""
    blocks = " x ".join(str(launch.arguments[name]) for name in ("C", "BK", "BV") if name in launch.arguments)
    spilled = binary.stack + binary.local
    verdict = "spills" if spilled else "shared" if binary.shared > SHARED_LIMITS[configuration.arch] else "ok"
    unit = binary.matrix_unit or ("fma" if binary.dots else "-")
    name = launch.kernel.__name__.removesuffix("_kernel")
    return (
        f"{configuration!s:40} {name:22} {blocks:14} {launch.warps:5} {launch.stages:6} {binary.registers:5} "
        f"{binary.shared:7} {spilled:7} {unit:6} {verdict}"
    )


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=list(ARCHS), choices=ARCHS)
    parser.add_argument("--family", nargs="+", default=list(GATES), choices=list(GATES))
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--kernel", nargs="+", help="only kernels with these names")
    options = parser.parse_args()
    print(
        f"{'configuration':40} {'kernel':22} {'blocks':14} {'warps':>5} {'stages':>6} {'regs':>5} {'shared':>7} "
        f"{'spilled':>7} {'unit':6}"
    )
    for configuration in configurations(tuple(options.family)):
        if configuration.arch not in options.arch or configuration.head_dim not in options.head_dim:
            continue
        for launch in launches(configuration):
            if options.kernel is None or launch.kernel.__name__.removesuffix("_kernel") in options.kernel:
                print(row(configuration, launch, compile_launch(launch, configuration.arch)), flush=True)


if __name__ == "__main__":
    main()
