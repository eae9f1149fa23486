"""The launch scripts' decisions, on machines made of stubs: what is installed when, which torch stays, what is run.

`python_stub` stands in for Python, so nothing is installed here. test_fresh_machine.py does the real thing.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUB = Path(__file__).with_name("python_stub")
COREUTILS = ("cat", "cksum", "cp", "cut", "dirname", "mkdir", "rm", "sleep", "tail", "touch")
CPU_TORCH = "-qqq --no-deps --retries 1 --timeout 20 -c {root}/launch/constraints-cpu.txt torch --extra-index-url "
PINNED = "constraints torch==2.13.0"


class Machine:
    """A checkout, and a PATH with bash, coreutils and a stub Python only."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root, self.bin = folder, folder / "check out", folder / "bin"
        shutil.copytree(ROOT / "launch", self.root / "launch")
        shutil.copy(ROOT / "pyproject.toml", self.root)
        self.venv = self.root / ".venv"
        self.calls = folder / "calls"
        self.bin.mkdir()
        for tool in ("bash", *COREUTILS):
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        shutil.copy(STUB, self.bin / "python3")
        self.environment = {
            "PATH": str(self.bin),
            "HOME": str(folder),
            "MACHINE": str(folder),
            "CALLS": str(self.calls),
            "REAL_PYTHON": sys.executable,
        }

    def add_gpu(self) -> None:
        (self.folder / "gpu").touch()
        self.add_tool("nvidia-smi", "echo GPU 0")

    def remove_gpu(self) -> None:
        (self.folder / "gpu").unlink()
        (self.bin / "nvidia-smi").unlink()

    def add_tool(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)

    def start(self, script: str, *args: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.bin / "bash"), str(self.root / "launch" / script), *args],
            cwd=self.folder,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str = "test.sh", *args: str, status: int = 0, **environment: str) -> list[str]:
        """Run a script and return what its Pythons were asked since the last run; `self.stderr` is what it said."""
        self.calls.unlink(missing_ok=True)
        process = self.start(script, *args, **environment)
        out, self.stderr = process.communicate(timeout=30)
        assert process.returncode == status, self.stderr
        assert out == ""
        return self.read_calls()

    def read_calls(self) -> list[str]:
        text = self.calls.read_text() if self.calls.exists() else ""
        return text.replace(str(self.root), "{root}").splitlines()


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def kinds(calls: list[str]) -> list[str]:
    return [call.split()[0] for call in calls]


def test_first_run_makes_the_environment_with_the_pinned_cpu_torch(machine):
    calls = machine.run("test.sh", "-k", "a b")
    assert calls[0] == "venv {root}/.venv"
    assert calls[1].startswith(f"pip {CPU_TORCH}https://download.pytorch.org/whl/cpu")
    assert calls[3] == "pip -qq -c {root}/launch/constraints-cpu.txt -e .[test,wandb]"
    assert calls[2] == calls[4] == PINNED
    assert calls[5:] == ["run -m pytest -k a b", "env 1 1 unset unset"]
    assert "once, about a minute" in machine.stderr


def test_second_run_installs_nothing_and_says_nothing(machine):
    machine.run("test.sh")
    calls = machine.run("train.sh", "attention=ring", "run_dir=runs/my run", NPROC="3")
    torchrun = "{root}/launch/_torchrun.py --standalone --local-addr 127.0.0.1 --nproc-per-node 3 -m longctx.train"
    assert calls == [f"run {torchrun} attention=ring run_dir=runs/my run", "env 1 1 unset unset"]
    assert machine.stderr == ""


def test_train_has_two_ranks_by_default_and_keeps_the_users_settings(machine):
    calls = machine.run("train.sh", WANDB_MODE="online", OMP_NUM_THREADS="8")
    assert "--nproc-per-node 2 -m longctx.train" in calls[-2]
    assert calls[-1] == "env 8 1 online unset"


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_starts_no_ranks(machine, flag):
    assert machine.run("train.sh", "attention=ring", flag)[-2] == "run -m longctx train --help"


@pytest.mark.parametrize("changed", ["pyproject.toml", "launch/constraints-cpu.txt"])
def test_a_changed_requirement_installs_again_into_the_same_environment(machine, changed):
    machine.run()
    with (machine.root / changed).open("a") as file:
        file.write("# changed\ntorch==2.13.0\n")
    assert kinds(machine.run()) == ["pip", "constraints", "pip", "constraints", "run", "env"]
    assert kinds(machine.run()) == ["run", "env"]


def test_other_extras_and_a_moved_checkout_install_again(machine):
    machine.run()
    assert machine.run(LONGCTX_EXTRAS="dev")[2].endswith("-e .[dev]")
    machine.root = machine.root.rename(machine.folder / "moved")
    assert "pip" in kinds(machine.run())


def test_gpu_without_torch_takes_the_default_wheel_of_the_pinned_version(machine):
    machine.add_gpu()
    calls = machine.run()
    assert kinds(calls) == ["venv", "pip", "constraints", "run", "env"]
    assert calls[1] == "pip -qq -c {root}/launch/constraints-cpu.txt -e .[test,wandb]"


def test_gpu_uses_the_cuda_torch_of_the_base_interpreter_in_place(machine):
    machine.add_gpu()
    (machine.folder / "base-torch").write_text("2.11.0+cu130 cuda /opt/site packages\n")
    calls = machine.run()
    assert calls[:2] == ["venv {root}/.venv", "pth /opt/site packages"]
    assert calls[2:4] == [
        "pip -qq -c {root}/.venv/.longctx-constraints.txt -e .[test,wandb]",
        "constraints torch==2.11.0+cu130",
    ]


def test_gpu_ignores_a_cpu_torch_of_the_base_interpreter(machine):
    machine.add_gpu()
    (machine.folder / "base-torch").write_text("2.13.0+cpu cpu /opt/site\n")
    assert kinds(machine.run()) == ["venv", "pip", "constraints", "run", "env"]


def test_gpu_keeps_the_cuda_torch_of_the_environment(machine):
    machine.add_gpu()
    machine.run()
    (machine.venv / "torch").write_text("2.14.1+cu131 cuda x\n")
    with (machine.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert "constraints torch==2.14.1+cu131" in machine.run()


def test_an_environment_made_without_a_gpu_is_made_anew_for_one_and_not_the_other_way_round(machine):
    machine.run()
    machine.add_gpu()
    assert kinds(machine.run()) == ["venv", "pip", "constraints", "run", "env"]
    machine.remove_gpu()
    assert kinds(machine.run()) == ["run", "env"]


def test_without_a_gpu_our_environment_follows_the_constraints(machine):
    machine.run()
    (machine.venv / "torch").write_text("2.12.0+cpu cpu x\n")
    with (machine.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert [call for call in machine.run() if call.startswith("constraints")] == [PINNED, PINNED]


def test_a_users_own_environment_keeps_its_torch_and_is_never_removed(machine):
    (machine.venv / "bin").mkdir(parents=True)
    shutil.copy(STUB, machine.venv / "bin/python")
    (machine.venv / "torch").write_text("2.14.0 cuda x\n")
    (machine.folder / "pip-fails").touch()
    machine.run(status=1)
    (machine.folder / "pip-fails").unlink()
    calls = machine.run()
    assert kinds(calls) == ["pip", "constraints", "run", "env"]
    assert calls[1] == "constraints torch==2.14.0"


def test_a_failed_install_is_said_and_continued(machine):
    (machine.folder / "pip-fails").touch()
    # Once with the index of CPU wheels, once without it and with pip's own words.
    assert kinds(machine.run(status=1)) == ["venv", "pip", "constraints", "pip", "constraints"]
    assert "no route to host" in machine.stderr
    assert "run this again" in machine.stderr
    (machine.folder / "pip-fails").unlink()
    assert kinds(machine.run()) == ["pip", "constraints", "pip", "constraints", "run", "env"]


def test_an_environment_that_does_not_import_is_not_taken_for_finished(machine):
    (machine.folder / "incomplete").touch()
    assert "run" not in kinds(machine.run(status=1))
    (machine.folder / "incomplete").unlink()
    assert "pip" in kinds(machine.run())


def test_an_install_killed_half_way_is_done_again_from_nothing(machine):
    (machine.folder / "pip-hangs").touch()
    process = machine.start("test.sh")
    hanging = machine.folder / "pip-is-hanging"
    deadline = time.monotonic() + 30
    while not hanging.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (machine.folder / "pip-hangs").unlink()
    (machine.venv / "half-written").touch()
    assert kinds(machine.run()) == ["venv", "pip", "constraints", "pip", "constraints", "run", "env"]
    assert not (machine.venv / "half-written").exists()


def test_two_at_once_install_once(machine):
    processes = [machine.start(script, PIP_SECONDS="0.5") for script in ("test.sh", "train.sh")]
    for process in processes:
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == 0, stderr
    calls = kinds(machine.read_calls())
    assert (calls.count("venv"), calls.count("pip"), calls.count("run")) == (1, 2, 2)


def test_the_lock_does_not_outlive_the_install(machine):
    """A run of hours holds no lock: the stub is replaced by one that shows its open files."""
    machine.run()
    lock = machine.root / ".venv.lock"
    assert lock.exists()
    (machine.venv / "bin/python").write_text(f"#!{sys.executable}\nimport os\nos.fstat(9)\n")
    process = machine.start("test.sh")
    _, stderr = process.communicate(timeout=30)
    assert "Bad file descriptor" in stderr


@pytest.mark.parametrize("environment", [{}, {"PYTHON": "/nowhere/python3.11"}], ids=["none", "named"])
def test_no_python_is_said(machine, environment):
    (machine.bin / "python3").unlink()
    machine.run(status=1, **environment)
    assert "needs Python 3.11 or newer; tried: " in machine.stderr
    assert environment.get("PYTHON", "python3.12") in machine.stderr


def test_a_given_interpreter_is_used_as_it_is(machine):
    other = machine.folder / "other/bin/python"
    other.parent.mkdir(parents=True)
    shutil.copy(STUB, other)
    assert machine.run(LONGCTX_PYTHON=str(other)) == ["run -m pytest", "env 1 1 unset unset"]
    (machine.folder / "incomplete").touch()
    machine.run(status=1, LONGCTX_PYTHON=str(other))
    assert "has no torch" in machine.stderr
    assert not machine.venv.exists()


def test_slurm_starts_one_torchrun_per_node_with_a_common_meeting_point(machine):
    machine.add_tool("scontrol", "echo node7; echo node8")
    machine.add_tool("srun", 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"')
    job = {"SLURM_SUBMIT_DIR": str(machine.root), "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2"}
    calls = machine.run("slurm.sh", "attention=ring", **job, SLURM_JOB_ID="42", SLURM_GPUS_ON_NODE="8")
    assert calls[-2] == (
        "run {root}/launch/_torchrun.py --nnodes 2 --nproc-per-node 8 --max-restarts 0 --rdzv-backend c10d "
        "--rdzv-id 42 --rdzv-endpoint node7:29400 -m longctx.train attention=ring"
    )


def test_slurm_outside_of_a_job_is_refused(machine):
    machine.run("slurm.sh", status=1)
    assert "run me with sbatch" in machine.stderr
