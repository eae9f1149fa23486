# Sourced by the scripts beside it: finds or makes the environment and sets RUN_PYTHON to its interpreter.
#
#   LONGCTX_PYTHON   use this interpreter as it is and install nothing (containers, cluster images)
#   LONGCTX_VENV     where the environment lives          (default: .venv in the checkout)
#   LONGCTX_EXTRAS   which extras of pyproject to install (default: test,wandb)
#   PYTHON           the interpreter to make the environment from (default: a Python 3.11 or newer on PATH)
#
# Needs bash, coreutils and Python only. The environment is current when its stamp exists; the stamp's name is a checksum of
# all that decides its content, and it is written last, so that an install cut short is done again.
#
# Which torch:
#   - without an NVIDIA GPU: the version of constraints-cpu.txt, as a CPU wheel where pip can reach one;
#   - with one: a CUDA torch that is there already stays, if pyproject.toml allows its version: in the environment, or else in
#     the interpreter that the environment is made from, where it is used in place (a .pth file points to it). If there is
#     none, the default (CUDA) wheel of the version in constraints-cpu.txt;
#   - in an environment that the user made, its torch stays in any case.

set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"

say() { echo "longctx: $*" >&2; }
die() { say "$*"; exit 1; }
has_gpu() { nvidia-smi -L >/dev/null 2>&1; }

find_python() {
  local name candidates=(python3 python3.13 python3.12 python3.11 python3.14 python)
  [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
  for name in "${candidates[@]}"; do
    # Run it rather than look it up: a version manager's shim may exist for a Python that is not installed.
    "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$name"; return; }
  done
  die "needs Python 3.11 or newer; tried: ${candidates[*]}. Set PYTHON=/path/to/python3.11"
}

# Print "<version> <cuda or cpu> <folder>" of an interpreter's torch, nothing if pyproject.toml does not allow it.
torch_of() {
  "$1" - <<'PY' 2>/dev/null || true
import pathlib, re, tomllib, torch
listed = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]["dependencies"]
lowest = next(m for m in (re.match(r"torch>=(\d+)\.(\d+)", line) for line in listed) if m)
version = re.match(r"(\d+)\.(\d+)", torch.__version__)
if tuple(map(int, version.groups())) >= tuple(map(int, lowest.groups())):
    print(torch.__version__, "cuda" if torch.version.cuda else "cpu", pathlib.Path(torch.__file__).parent.parent)
PY
}

make_venv() {
  local python="$1" venv="$2" version build folder
  read -r version build folder < <(torch_of "$venv/bin/python") || true
  # One that this script made goes if it was cut short, or made where there was no GPU (a cluster's login node).
  if [ -e "$venv/.longctx-unfinished" ] || { [ -e "$venv/.longctx-made" ] && [ "$build" = cpu ] && has_gpu; }; then
    rm -rf "$venv"
  fi
  if [ ! -d "$venv" ]; then
    mkdir -p "$venv"
    touch "$venv/.longctx-made"
  fi
  [ ! -e "$venv/.longctx-made" ] || touch "$venv/.longctx-unfinished"
  "$venv/bin/python" -c pass 2>/dev/null || "$python" -m venv "$venv" >/dev/null 2>&1 ||
    "$python" -m venv --without-pip "$venv" ||  # no ensurepip, as in Debian's python3 without python3-venv
    die "cannot make an environment with '$python -m venv $venv'"
}

install() {
  local python="$1" venv="$2" extras="$3" pip version build folder
  local constraints="$ROOT/launch/constraints-cpu.txt"
  if "$venv/bin/python" -m pip --version >/dev/null 2>&1; then pip=("$venv/bin/python" -m pip)
  elif "$python" -m pip --version >/dev/null 2>&1; then pip=("$python" -m pip --python "$venv/bin/python")
  else die "neither $venv nor '$python' has pip; install python3-venv or python3-pip, or set PYTHON"
  fi

  read -r version build folder < <(torch_of "$venv/bin/python") || true
  if [ -z "$version" ] && has_gpu; then
    read -r version build folder < <(torch_of "$python") || true
    if [ "$build" = cuda ]; then
      say "using torch $version in $folder"
      "$venv/bin/python" -c 'import sys, sysconfig, pathlib
pathlib.Path(sysconfig.get_path("purelib"), "longctx-torch.pth").write_text(sys.argv[1] + "\n")' "$folder"
    else
      version=""
    fi
  fi

  if [ -n "$version" ] && { [ ! -e "$venv/.longctx-made" ] || has_gpu; }; then
    constraints="$venv/.longctx-constraints.txt"
    echo "torch==$version" >"$constraints"
  elif ! has_gpu; then
    # By itself and without retries: where the wheel index cannot be reached this costs a second, not minutes.
    # Silent about that index as long as a wheel is found somewhere.
    local torch=(--no-deps --retries 1 --timeout 20 -c "$constraints" torch)
    "${pip[@]}" install -qqq "${torch[@]}" --extra-index-url https://download.pytorch.org/whl/cpu ||
      "${pip[@]}" install -qq "${torch[@]}" || return
  fi
  "${pip[@]}" install -qq -c "$constraints" -e ".[$extras]" && "$venv/bin/python" -c 'import longctx, torch'
}

if [ -n "${LONGCTX_PYTHON:-}" ]; then
  RUN_PYTHON="$LONGCTX_PYTHON"
  "$RUN_PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' ||
    die "LONGCTX_PYTHON=$RUN_PYTHON has no torch; unset it to have an environment made"
  # Not installed there: run from the checkout.
  PYTHONSAFEPATH=1 "$RUN_PYTHON" -c 'import longctx' 2>/dev/null || export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
else
  VENV="${LONGCTX_VENV:-$ROOT/.venv}"
  EXTRAS="${LONGCTX_EXTRAS:-test,wandb}"
  # The checkout's path counts: an environment is tied to it and must be redone after a move.
  STAMP="$VENV/.longctx-stamp-$( (cat pyproject.toml launch/constraints-cpu.txt; echo "$EXTRAS $ROOT") | cksum | cut -d' ' -f1)"
  # What was made for a GPU does without one, not the other way round.
  is_current() { [ -e "$STAMP-gpu" ] || { [ -e "$STAMP-cpu" ] && ! has_gpu; }; }
  if ! is_current; then
    BASE_PYTHON="$(find_python)"
    mkdir -p "$(dirname "$VENV")"
    # Scripts started at the same time wait here. The lock is taken by Python because flock(1) may be missing; it belongs to
    # the open file, so it outlives that process and ends with this shell's descriptor, however the shell ends.
    exec 9>"$VENV.lock"
    "$BASE_PYTHON" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
    if ! is_current; then
      say "making the environment $VENV (once, about a minute) ..."
      rm -f "$VENV"/.longctx-stamp-*
      make_venv "$BASE_PYTHON" "$VENV"
      installed=yes
      install "$BASE_PYTHON" "$VENV" "$EXTRAS" || installed=no
      # Both ends are clean ones: after a failure of pip, as opposed to a kill, what is there can be built upon.
      rm -f "$VENV/.longctx-unfinished"
      [ "$installed" = yes ] || die "the environment is not complete: see pip's message above, then run this again"
      if has_gpu; then touch "$STAMP-gpu"; else touch "$STAMP-cpu"; fi
    fi
    exec 9>&-
  fi
  RUN_PYTHON="$VENV/bin/python"
fi

# One thread per rank: ranks share the cores. PYTHONSAFEPATH keeps the checkout off sys.path, so that another package's
# `import kernels` cannot find our folder of that name.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONSAFEPATH=1
