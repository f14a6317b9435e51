"""Kill training with SIGKILL, resume it, and compare it bit for bit with a run that was left alone.

python tests/kill_and_resume.py [--stages coarse fine dit pixel_decoder] [--processes 1 2] [--kills 20]

For each stage, in one process and in two processes of two devices each (gloo): 6 steps against 3 steps, SIGKILL,
resume, 3 steps. Then `--kills` runs that are killed at random moments within a save. The runs use the tiny configs, on
crops of 64 and 128 pixels, with networks smaller still.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import jax
import numpy as np
import orbax.checkpoint as ocp
from PIL import Image

ROOT = Path(__file__).parents[1]
CONFIGS = {  # in the order in which each starts from the weights of the one before
    "coarse": "lpvae_coarse_tiny",
    "fine": "lpvae_fine_512_tiny",
    "dit": "dit_3b_tiny",
    "pixel_decoder": "pixel_decoder_tiny",
}
STEPS = 6
OVERRIDES = {
    "resume": "auto",
    "steps": STEPS,
    "statistics-images": 8,
    "sample-every": 0,
    "keep-every": 1,
    "data.aspect-ratios": 1,
    "data.batch-size": 4,
    "data.batch-tokens": 0,
    "loss.lpips-crop": 0,
    "loss.adversarial-start": 0,
    "discriminator.layers": 1,
    "discriminator.base-channels": 4,
    "optimizer.learning-rate": 2e-4,
    "optimizer.warmup-steps": 1,
    # As few tensors as there can be: compiling takes nearly all of the time.
    "model.lp-vae.coarse.multipliers": "1 1",
    "model.lp-vae.coarse.patch": 4,
    "model.lp-vae.coarse.base-channels": 8,
    "model.lp-vae.coarse.pixel-channels": 2,
    "model.lp-vae.fine.multipliers": "1 1",
    "model.lp-vae.fine.patch": 16,
    "model.lp-vae.fine.base-channels": 8,
    "model.lp-vae.fine.pixel-channels": 2,
    "model.dit.width": 32,
    "model.dit.heads": 2,
}
TIMEOUT = 600  # seconds for a run


def write_photos(folder: Path) -> None:
    """Six pictures of smooth noise, 144 x 160 pixels."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(6):
        noise = cv2.GaussianBlur(rng.standard_normal((144, 160, 3)), (0, 0), 2.0 + index)
        pixels = np.clip(127.5 + 60 * noise / noise.std(), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")


def start(
    stage: str, folder: Path, output: Path, processes: int, *more: str, devices: int | None = None
) -> list[subprocess.Popen]:
    """Start a run of `stage` that resumes whatever `output` holds; `folder` has photos and the weights before.

    devices: of each process; by default 1 for one process and 2 for more.
    """
    earlier = list(CONFIGS)[: list(CONFIGS).index(stage)]
    options = OVERRIDES | {
        "output": output,
        "init-from": folder / earlier[-1] / "weights" if earlier else "",
        "data.sources": folder / "photos",
        "data.resolutions": "64 128" if stage == "dit" else 128,
    }
    command = [sys.executable, "-m", "zipir_jax.train", "--config", f"configs/{CONFIGS[stage]}.py"]
    for name, value in options.items():
        command += [f"--{name}", *(str(value).split(" ") if value != "" else [""])]
    devices = devices or (2 if processes > 1 else 1)
    environment = os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        # A collective holds its thread until all devices have come to it, and XLA starts those of a loop and those
        # beside it in any order: with a thread for each device, all can be held in two that wait for one another.
        "PJRT_NPROC": str(2 * devices),
    }
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment |= {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(processes),
        }
    output.parent.mkdir(parents=True, exist_ok=True)
    log = (output.parent / f"{output.name}.log").open("ab")
    return [
        subprocess.Popen(
            [*command, *more],
            cwd=ROOT,
            env=environment | {"JAX_PROCESS_ID": str(number)},
            stdout=log,
            stderr=log,
        )
        for number in range(processes)
    ]


def finish(running: list[subprocess.Popen], output: Path) -> None:
    """Wait for a run to end. Raises RuntimeError, with the end of its log, if it fails."""
    statuses = [process.wait(TIMEOUT) for process in running]
    if any(statuses):
        log = (output.parent / f"{output.name}.log").read_text(errors="replace")
        raise RuntimeError(f"{output}: exit statuses {statuses}: {log[-20000:]}")


def kill(running: list[subprocess.Popen]) -> None:
    for process in running:
        process.send_signal(signal.SIGKILL)
    for process in running:
        process.wait()


def wait_for(condition, running: list[subprocess.Popen]) -> bool:
    """Wait until `condition()` holds or the run has ended; whether it held."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        if condition():
            return True
        if all(process.poll() is not None for process in running):
            return False
        time.sleep(0.002)
    raise TimeoutError(f"nothing happened in {TIMEOUT} s")


def saved_steps(output: Path) -> set[int]:
    """The steps of the checkpoints that are complete."""
    folder = output / "checkpoints"
    return {int(path.name) for path in folder.iterdir() if path.name.isdigit()} if folder.is_dir() else set()


def is_saving(output: Path) -> bool:
    """Whether a checkpoint is being written, or was when the writer was killed."""
    folder = output / "checkpoints"
    return folder.is_dir() and any("orbax-checkpoint-tmp" in path.name for path in folder.iterdir())


def result(output: Path) -> dict[str, bytes]:
    """All that a finished run has to show: the last checkpoint's arrays, the weights, the losses of all steps."""
    path = output / "checkpoints" / str(STEPS) / "state"
    checkpointer = ocp.StandardCheckpointer()
    here = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    target = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=here),
        checkpointer.metadata(path).item_metadata.tree,
    )
    state = checkpointer.restore(path, target)
    arrays = {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return arrays | {
        "weights": (output / "weights" / "model.safetensors").read_bytes(),
        "losses": json.dumps([(line["step"], line["loss"]) for line in lines]).encode(),
    }


def differences(first: dict[str, bytes], second: dict[str, bytes]) -> list[str]:
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def straight(stage: str, folder: Path, processes: int, *options: str) -> dict[str, bytes]:
    """The result of a run that was left alone; with one process its weights are what the next stage starts from."""
    output = folder / (stage if processes == 1 else f"{stage}_straight{processes}")
    finish(start(stage, folder, output, processes, *options), output)
    return result(output)


def killed_after_three(stage: str, folder: Path, processes: int, *options: str) -> dict[str, bytes]:
    """The result of a run that was killed once its checkpoint of step 3 was there, and resumed."""
    output = folder / f"{stage}_killed{processes}"
    running = start(stage, folder, output, processes, *options)
    wait_for(lambda: 3 in saved_steps(output), running)
    kill(running)
    if STEPS in saved_steps(output):
        raise RuntimeError(f"{output}: the run had ended before it was killed")
    finish(start(stage, folder, output, processes, *options), output)
    return result(output)


def killed_in_a_save(
    stage: str, folder: Path, processes: int, name: str, rng: random.Random
) -> tuple[dict[str, bytes], str]:
    """The result of a run that was killed at a random moment after a random save began, and resumed.

    Also what the kill left behind, in words.
    """
    output = folder / name
    running = start(stage, folder, output, processes)
    complete = rng.randrange(STEPS - 1)
    wait_for(lambda: len(saved_steps(output)) >= complete and is_saving(output), running)
    time.sleep(rng.uniform(0, 0.05))  # a save takes about as long
    if any(process.poll() is not None for process in running):
        raise RuntimeError(f"{output}: the run had ended before it was killed")
    kill(running)
    left = f"{'half a' if is_saving(output) else 'no half'} checkpoint, complete ones {sorted(saved_steps(output))}"
    finish(start(stage, folder, output, processes), output)
    return result(output), left


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--kills", type=int, default=20, help="within saves; stages and processes take turns")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    options = parser.parse_args()
    failures = halves = 0

    def report(what, differing):
        nonlocal failures
        failures += bool(differing)
        print(
            f"{what}: {'DIFFERS in ' + ', '.join(differing[:5]) if differing else 'equal, bit for bit'}",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_photos(folder / "photos")
        expected = {}
        for stage in CONFIGS:
            for processes in sorted({1, *options.processes}):
                if processes == 1 or stage in options.stages:
                    expected[stage, processes] = straight(stage, folder, processes)
        cases = [(stage, processes) for stage in options.stages for processes in options.processes]
        for stage, processes in cases:
            got = killed_after_three(stage, folder, processes)
            report(
                f"{stage}, processes {processes}, killed after step 3",
                differences(got, expected[stage, processes]),
            )
        for number in range(options.kills):
            stage, processes = cases[number % len(cases)]
            rng = random.Random(f"{options.seed} {number}")
            got, left = killed_in_a_save(stage, folder, processes, f"kill{number}", rng)
            halves += left.startswith("half")
            report(
                f"kill {number + 1} in a save, {stage}, processes {processes}, left {left}",
                differences(got, expected[stage, processes]),
            )
    print(f"{halves} of {options.kills} kills left half a checkpoint")
    print(f"{failures} of {len(cases) + options.kills} runs differ")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
