#!/usr/bin/env bash
# Train on this machine: ./launch/train.sh [key=value ...]     NPROC=<ranks> (default: one per GPU, or 2)
# Makes the environment on first use. Relative paths in the arguments are relative to the checkout.
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

for argument in "$@"; do
  case "$argument" in -h | --help) exec "$RUN_PYTHON" -m longctx train --help ;; esac
done
if has_gpu; then gpus="$(nvidia-smi -L | wc -l)"; else gpus=2; fi
# --local-addr: without it torchrun hangs on a machine whose own host name does not resolve.
exec "$RUN_PYTHON" "$ROOT/launch/_torchrun.py" --standalone --local-addr 127.0.0.1 \
  --nproc-per-node "${NPROC:-$gpus}" -m longctx.train "$@"
