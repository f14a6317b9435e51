"""Makes ddim.npz: timesteps and DDIM trajectories of diffusers' DDIMScheduler, for tests/diffusion.

How to run it: `pip install -e .[parity]`, then `python tests/parity/make_ddim.py`. It takes seconds on a CPU.
The stored file was made with torch 2.13.0+cpu, diffusers 0.42.1 and numpy 2.4.6 (also written in the file).

For each case of CASES (spacing, steps, eta) the file holds, under the prefix "spacing_steps_eta_":
timesteps [steps], eps [steps, 2, 3, 2, 4] (random, in the place of a model's output), noise (the same shape,
random, what eta > 0 adds at each step) and latents [steps + 1, 2, 3, 2, 4], from the start to the result.
For each spacing and each of STEPS it holds "timesteps_spacing_steps".
"""

import pathlib

import diffusers
import numpy as np
import torch

CASES = (
    ("trailing", 25, 0.0),
    ("leading", 25, 0.0),
    ("leading", 30, 0.0),  # does not divide 1000
    ("trailing", 25, 0.5),
    ("leading", 25, 0.5),
    ("trailing", 10, 1.0),
)
STEPS = (1, 2, 4, 7, 10, 25, 30, 50, 100, 500)
SHAPE = (2, 3, 2, 4)


def make_scheduler(spacing: str, steps: int) -> diffusers.DDIMScheduler:
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        prediction_type="epsilon",
        timestep_spacing=spacing,
    )
    scheduler.set_timesteps(steps)
    return scheduler


def main() -> None:
    arrays = {"versions": np.array([f"{m.__name__} {m.__version__}" for m in (torch, diffusers, np)])}
    for spacing in ("trailing", "leading"):
        for steps in STEPS:
            timesteps = make_scheduler(spacing, steps).timesteps.numpy()
            arrays[f"timesteps_{spacing}_{steps}"] = timesteps.astype(np.int32)
    arrays["alpha_bar"] = make_scheduler("trailing", 25).alphas_cumprod.numpy()

    rng = np.random.default_rng(0)
    for spacing, steps, eta in CASES:
        scheduler = make_scheduler(spacing, steps)
        eps, noise = rng.standard_normal((2, steps, *SHAPE)).astype(np.float32)
        latents = [torch.from_numpy(rng.standard_normal(SHAPE).astype(np.float32))]
        for index, timestep in enumerate(scheduler.timesteps):
            step = scheduler.step(
                torch.from_numpy(eps[index]),
                timestep,
                latents[-1],
                eta=eta,
                variance_noise=torch.from_numpy(noise[index]) if eta > 0 else None,
            )
            latents.append(step.prev_sample)
        prefix = f"{spacing}_{steps}_{eta}_"
        arrays[prefix + "timesteps"] = scheduler.timesteps.numpy().astype(np.int32)
        arrays[prefix + "eps"] = eps
        arrays[prefix + "noise"] = noise
        arrays[prefix + "latents"] = torch.stack(latents).numpy()
    np.savez_compressed(pathlib.Path(__file__).with_name("ddim.npz"), **arrays)


if __name__ == "__main__":
    main()
