"""The launch scripts, run with stand-ins for the trainer and for the commands of clusters."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
CONFIG = "configs/my experiment.py"
OVERRIDES = ["--data.sources", "photos of $HOME's 'cat'", "--steps", "7", "--output", ""]
TRAINER = ["-m", "zipir_jax.train", "--config", CONFIG, "--resume", "auto", *OVERRIDES]

# Every stand-in writes what it was called with. The trainer then does what the file `plan` says of its n-th start: end
# with a status, or wait to be stopped, save, and end with 0.
PREAMBLE = """#!{python}
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
root, name = Path({root!r}), Path(sys.argv[0]).name
def note(**values):
    with (root / "calls").open("a") as file:
        file.write(json.dumps(values) + "\\n")
"""
PYTHON = """
if sys.argv[1:3] == ["-m", "zipir_jax.train"]:
    asked = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    (root / "pid").write_text(str(os.getpid()))
    plan, *rest = (root / "plan").read_text().split()
    (root / "plan").write_text(" ".join(rest))
    note(name="trainer", arguments=sys.argv[1:], environment=dict(os.environ), session=os.getsid(0))
    if plan == "taken":  # the slice, and the trainer with it
        (root / "state").write_text("PREEMPTED")
        sys.exit(255)
    if plan != "wait":
        sys.exit(int(plan))
    patience = time.monotonic() + 60
    while not asked and time.monotonic() < patience:
        time.sleep(0.01)
    time.sleep(0.3)
    note(name="saved", signals=len(asked))
elif sys.argv[1:3] == ["-m", "venv"]:
    (Path(sys.argv[3]) / "bin").mkdir(parents=True, exist_ok=True)
    (Path(sys.argv[3]) / "bin" / "python").unlink(missing_ok=True)
    (Path(sys.argv[3]) / "bin" / "python").symlink_to(root / "bin" / "python")
    note(name="venv", arguments=sys.argv[1:])
else:
    note(name="pip", arguments=sys.argv[1:])
"""
SRUN = """
note(name=name, arguments=sys.argv[1:])
command = sys.argv[1:]
while command[0].startswith("--"):
    del command[0]
os.execvp(command[0], command)
"""
SCANCEL = """
note(name=name, arguments=sys.argv[1:])
os.kill(int((root / "pid").read_text()), signal.SIGTERM)
"""
SCONTROL = "note(name=name, arguments=sys.argv[1:])"
NVIDIA_SMI = "print((root / 'capability').read_text())"
GCLOUD = """
command, arguments = sys.argv[4], sys.argv[5:]
note(name=command, arguments=arguments)
home, state = root / "home", root / "state"
home.mkdir(exist_ok=True)
if command == "describe":
    if not state.exists():
        sys.exit(1)
    print(state.read_text())
elif command == "delete":
    state.unlink()
    shutil.rmtree(home)
elif command == "create":
    state.write_text("READY")
elif command == "scp":
    shutil.copy(arguments[0], home / arguments[1].partition(":")[2])
elif command == "ssh":
    (script,) = (a.partition("=")[2] for a in arguments if a.startswith("--command="))
    sys.exit(subprocess.run(["bash", "-c", script], cwd=home).returncode)
"""


@pytest.fixture(name="root")
def make_root(tmp_path):
    """A folder with a `bin` of stand-ins."""
    (tmp_path / "bin").mkdir()
    scripts = {
        "python": PYTHON,
        "python3": PYTHON,
        "srun": SRUN,
        "scancel": SCANCEL,
        "scontrol": SCONTROL,
        "nvidia-smi": NVIDIA_SMI,
        "gcloud": GCLOUD,
    }
    for name, body in scripts.items():
        script = tmp_path / "bin" / name
        script.write_text(PREAMBLE.format(python=sys.executable, root=str(tmp_path)) + body)
        script.chmod(0o755)
    (tmp_path / "capability").write_text("8.0\n8.0\n")
    return tmp_path


@pytest.fixture(name="launch")
def make_launch(root):
    """`launch(script, plan, *arguments, **environment)`: the running script; it is gone when the test ends."""
    running = []

    def launch(script, plan, *arguments, **environment):
        (root / "plan").write_text(plan)
        # Tests that run in the background of a script were told to ignore it, and what they start would, too.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(
            ["bash", LAUNCH / script, *arguments],
            cwd=root,
            env={"PATH": f"{root}/bin:/usr/bin:/bin", "RESTART_DELAY": "0", "HOME": str(root)} | environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        signal.signal(signal.SIGINT, before)
        running.append(process)
        return process

    yield launch
    for process in running:
        process.kill()
        process.wait()


def ended(process):
    """Exit status and what was printed on stderr."""
    _, printed = process.communicate(timeout=60)
    return process.returncode, printed


def calls(root, name):
    if not (root / "calls").exists():
        return []
    return [
        call for call in map(json.loads, (root / "calls").read_text().splitlines()) if call["name"] == name
    ]


def started(root, process, count=1):
    """Waits for the trainer's n-th start."""
    for _ in range(3000):
        if len(calls(root, "trainer")) >= count:
            return
        assert process.poll() is None, ended(process)
        time.sleep(0.01)
    raise AssertionError("the trainer was not started")


SLURM = {"SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "6"}
TPU = {"TPU_NAME": "slice", "TPU_ZONE": "zone-a"}
SCRIPTS = [("node.sh", {}), ("slurm.sh", SLURM), ("tpu_pod.sh", TPU)]
each_script = pytest.mark.parametrize(("script", "environment"), SCRIPTS, ids=[name for name, _ in SCRIPTS])


@pytest.fixture(name="slice", autouse=True)
def make_slice(root):
    """A TPU slice that is there, and a repository to send to it."""
    (root / "state").write_text("READY")
    (root / "configs").mkdir()
    (root / CONFIG).write_text("changed")
    (root / "untracked").write_text("")
    if shutil.which("git"):
        subprocess.run(["git", "init", "--quiet", root], check=True)
        subprocess.run(["git", "add", CONFIG], cwd=root, check=True)


# --------------------------------------------------------------------------------------------------
# What all scripts do
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [name for name, _ in SCRIPTS])
def test_bash_and_shellcheck_have_nothing_to_say(script):
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", LAUNCH / script], check=True)
    assert os.access(LAUNCH / script, os.X_OK)


@each_script
def test_arguments_reach_the_trainer_as_they_are(root, launch, script, environment):
    assert ended(launch(script, "0", CONFIG, *OVERRIDES, **environment))[0] == 0
    (call,) = calls(root, "trainer")
    assert call["arguments"] == TRAINER


@each_script
def test_a_crash_is_answered_by_restarts_until_none_are_left(root, launch, script, environment):
    status, printed = ended(launch(script, "7 137 9 0", CONFIG, *OVERRIDES, RESTARTS="2", **environment))
    assert status == 9
    assert "status 7; restarts left: 2" in printed
    assert "status 9; no restarts are left" in printed
    assert [call["arguments"] for call in calls(root, "trainer")] == [TRAINER] * 3


@each_script
def test_a_restart_can_succeed(root, launch, script, environment):
    assert ended(launch(script, "1 0", CONFIG, **environment))[0] == 0
    assert len(calls(root, "trainer")) == 2


@each_script
def test_settings_that_cannot_work_are_not_tried_again(root, launch, script, environment):
    assert ended(launch(script, "2 0", CONFIG, **environment))[0] == 2
    assert len(calls(root, "trainer")) == 1


@each_script
def test_sigterm_lets_the_trainer_save_and_ends_well(root, launch, script, environment):
    process = launch(script, "wait 0", CONFIG, **environment)
    started(root, process)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 0
    assert [call["signals"] for call in calls(root, "saved")] == [1]
    assert len(calls(root, "trainer")) == 1
    assert calls(root, "scontrol") == []  # back into no queue


@each_script
def test_a_signal_between_two_starts_is_heard_at_once(root, launch, script, environment):
    process = launch(script, "5 0", CONFIG, RESTART_DELAY="1000", **environment)
    assert "restarts left" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 5
    assert len(calls(root, "trainer")) == 1


@each_script
def test_what_is_missing_is_said(root, launch, script, environment):
    status, printed = ended(launch(script, "", **environment))
    assert status == 2
    assert "usage: " in printed
    for name in environment.keys() - {"SLURM_CPUS_PER_TASK"}:
        status, printed = ended(
            launch(script, "", CONFIG, **{k: v for k, v in environment.items() if k != name})
        )
        assert status == 2
        assert f"{name} is missing" in printed
    assert calls(root, "trainer") == []


# --------------------------------------------------------------------------------------------------
# GPUs
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "environment"), SCRIPTS[:2], ids=["node.sh", "slurm.sh"])
def test_settings_of_the_gpus_can_be_overridden(root, launch, script, environment):
    (root / "capability").write_text("9.0\n9.0\n")
    names = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "JAX_OPTIMIZATION_LEVEL", "CUDA_DEVICE_MAX_CONNECTIONS")
    ended(launch(script, "0", CONFIG, **environment))
    ended(launch(script, "0", CONFIG, XLA_PYTHON_CLIENT_MEM_FRACTION="0.5", **environment))
    (root / "capability").write_text("8.0\n")
    ended(launch(script, "0", CONFIG, **environment))
    seen = [[call["environment"].get(name) for name in names] for call in calls(root, "trainer")]
    assert seen == [["0.9", "O1", "1"], ["0.5", "O1", "1"], ["0.9", "O1", None]]


def test_ctrl_c_reaches_the_trainer_once(root, launch):
    process = launch("node.sh", "wait", CONFIG)
    started(root, process)
    (call,) = calls(root, "trainer")
    assert call["session"] != os.getsid(process.pid)  # so that the terminal does not send it a SIGINT as well
    process.send_signal(signal.SIGINT)
    assert ended(process)[0] == 0
    assert [call["signals"] for call in calls(root, "saved")] == [1]


def test_python_can_be_named(root, launch):
    (root / "bin" / "python").rename(root / "bin" / "another python")
    assert ended(launch("node.sh", "0", CONFIG, PYTHON=f"{root}/bin/another python"))[0] == 0
    assert len(calls(root, "trainer")) == 1


# --------------------------------------------------------------------------------------------------
# SLURM
# --------------------------------------------------------------------------------------------------


def test_a_job_whose_time_is_up_saves_and_goes_back_into_the_queue(root, launch):
    process = launch("slurm.sh", "wait", CONFIG, **SLURM)
    started(root, process)
    process.send_signal(signal.SIGUSR1)
    assert ended(process)[0] == 0
    assert [call["arguments"] for call in calls(root, "scancel")] == [["--signal=TERM", "42"]]
    assert [call["signals"] for call in calls(root, "saved")] == [1]
    assert [call["arguments"] for call in calls(root, "scontrol")] == [["requeue", "42"]]


def test_a_second_signal_does_not_reach_trainers_that_save(root, launch):
    process = launch("slurm.sh", "wait", CONFIG, **SLURM)
    started(root, process)
    process.send_signal(signal.SIGUSR1)
    while not calls(root, "scancel"):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 0
    assert [call["signals"] for call in calls(root, "saved")] == [1]
    assert len(calls(root, "scontrol")) == 1


def test_a_dead_process_takes_the_others_with_it(root, launch):
    ended(launch("slurm.sh", "0", CONFIG, **SLURM))
    (srun,) = calls(root, "srun")
    assert srun["arguments"] == ["--kill-on-bad-exit=1", "python", *TRAINER[: -len(OVERRIDES)]]
    assert calls(root, "trainer")[0]["environment"]["SRUN_CPUS_PER_TASK"] == "6"


# --------------------------------------------------------------------------------------------------
# TPU
# --------------------------------------------------------------------------------------------------

MAKING = {"TPU_TYPE": "v5p-64", "TPU_VERSION": "v2-alpha-tpuv5", "TPU_CREATE": "--spot --network=mine"}


def test_tracked_files_are_sent_and_installed_once(root, launch):
    assert ended(launch("tpu_pod.sh", "3 0", CONFIG, TPU_SETUP="touch mounted", **TPU))[0] == 0
    assert (root / "home" / "mounted").exists()
    assert (root / "home" / "zipir_jax" / CONFIG).read_text() == "changed"
    assert not (root / "home" / "zipir_jax" / "untracked").exists()
    (pip,) = calls(root, "pip")
    assert pip["arguments"][:3] == ["-m", "pip", "install"]
    assert all("--worker=all" in call["arguments"] for call in calls(root, "ssh") + calls(root, "scp"))
    assert all(
        call["arguments"][-1] != "" and "--zone=zone-a" in call["arguments"] for call in calls(root, "ssh")
    )


def test_a_slice_that_was_taken_away_is_made_anew_as_often_as_it_takes(root, launch):
    (root / "state").unlink()
    plan = "taken taken taken 0"
    assert ended(launch("tpu_pod.sh", plan, CONFIG, RESTARTS="0", **TPU, **MAKING))[0] == 0
    creations = calls(root, "create")
    assert len(creations) == 4
    expected = ["slice", "--zone=zone-a", "--accelerator-type=v5p-64", "--version=v2-alpha-tpuv5"]
    assert creations[0]["arguments"] == [*expected, "--spot", "--network=mine"]
    assert len(calls(root, "delete")) == 3
    assert len(calls(root, "pip")) == 4


def test_a_slice_is_not_made_without_being_told_what(root, launch):
    status, printed = ended(launch("tpu_pod.sh", "taken", CONFIG, **TPU))
    assert status == 2
    assert "slice is PREEMPTED: TPU_TYPE and TPU_VERSION are needed to make it" in printed
    assert calls(root, "delete") == []


def test_a_trainer_that_outlived_its_connection_is_stopped_first(root, launch):
    first = launch("tpu_pod.sh", "wait", CONFIG, **TPU)
    started(root, first)
    first.kill()
    assert ended(launch("tpu_pod.sh", "0", CONFIG, **TPU))[0] == 0
    names = [json.loads(line)["name"] for line in (root / "calls").read_text().splitlines()]
    assert [name for name in names if name in ("trainer", "saved")] == ["trainer", "saved", "trainer"]
