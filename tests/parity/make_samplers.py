"""Makes samplers.npz: timesteps and trajectories of diffusers' schedulers, for tests/diffusion.

How to run it: `pip install -e .[parity]`, then `python tests/parity/make_samplers.py`. It takes seconds on a CPU.
The stored file was made with torch 2.13.0+cpu, diffusers 0.42.1 and numpy 2.4.6 (also written in the file).

For each case of CASES (sampler, spacing, steps, eta) the file holds, under the prefix "sampler_spacing_steps_eta_":
timesteps [steps], eps [steps, 2, 3, 2, 4] (random, in the place of a model's output), noise (the same shape,
random, what eta > 0 adds at each step; with eta alone) and latents [steps + 1, 2, 3, 2, 4], from the start to the
result: what the model would see at each timestep.
For each spacing and each of STEPS it holds "timesteps_spacing_steps".

DPM-Solver++ and UniPC have timesteps of their own in diffusers, with linspace and leading spacing: here they get those
of DDIM, as ours do. Their trailing ones are the same.
"""

import pathlib

import diffusers
import numpy as np
import torch

CASES = (
    ("ddim", "trailing", 25, 0.0),
    ("ddim", "leading", 25, 0.0),
    ("ddim", "leading", 30, 0.0),  # does not divide 1000
    ("ddim", "trailing", 25, 0.5),
    ("ddim", "leading", 25, 0.5),
    ("ddim", "trailing", 10, 1.0),
    ("dpm-solver++", "trailing", 1, 0.0),
    ("dpm-solver++", "trailing", 2, 0.0),
    ("dpm-solver++", "trailing", 8, 0.0),
    ("dpm-solver++", "leading", 12, 0.0),
    ("dpm-solver++", "linspace", 25, 0.0),
    ("unipc", "trailing", 1, 0.0),
    ("unipc", "trailing", 2, 0.0),
    ("unipc", "trailing", 8, 0.0),
    ("unipc", "leading", 12, 0.0),
    ("unipc", "linspace", 25, 0.0),
)
STEPS = (1, 2, 4, 7, 10, 25, 30, 50, 100, 500)
SHAPE = (2, 3, 2, 4)
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
}
MULTISTEP = {"solver_order": 2, "final_sigmas_type": "zero", "lower_order_final": True}


def make_ddim(spacing: str, steps: int) -> diffusers.DDIMScheduler:
    scheduler = diffusers.DDIMScheduler(
        **SCHEDULE, clip_sample=False, set_alpha_to_one=True, steps_offset=1, timestep_spacing=spacing
    )
    scheduler.set_timesteps(steps)
    return scheduler


def make_scheduler(sampler: str, spacing: str, steps: int):
    ddim = make_ddim(spacing, steps)
    if sampler == "ddim":
        return ddim
    if sampler == "dpm-solver++":
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **SCHEDULE, **MULTISTEP, algorithm_type="dpmsolver++", solver_type="midpoint"
        )
    else:
        scheduler = diffusers.UniPCMultistepScheduler(
            **SCHEDULE, **MULTISTEP, predict_x0=True, solver_type="bh2"
        )
    if spacing == "trailing":
        scheduler.register_to_config(timestep_spacing=spacing)
        scheduler.set_timesteps(steps)
        return scheduler
    scheduler.set_timesteps(steps)
    scheduler.timesteps = ddim.timesteps
    alpha_bar = ddim.alphas_cumprod[ddim.timesteps].double()
    scheduler.sigmas = torch.cat([((1 - alpha_bar) / alpha_bar).sqrt(), torch.zeros(1)])
    return scheduler


def main() -> None:
    arrays = {"versions": np.array([f"{m.__name__} {m.__version__}" for m in (torch, diffusers, np)])}
    for spacing in ("trailing", "leading", "linspace"):
        for steps in STEPS:
            timesteps = make_ddim(spacing, steps).timesteps.numpy()
            arrays[f"timesteps_{spacing}_{steps}"] = timesteps.astype(np.int32)
    arrays["alpha_bar"] = make_ddim("trailing", 25).alphas_cumprod.numpy()
    arrays["alpha_bar_zero_terminal_snr"] = diffusers.DDIMScheduler(
        **SCHEDULE, rescale_betas_zero_snr=True
    ).alphas_cumprod.numpy()

    rng = np.random.default_rng(0)
    for sampler, spacing, steps, eta in CASES:
        scheduler = make_scheduler(sampler, spacing, steps)
        eps, noise = rng.standard_normal((2, steps, *SHAPE)).astype(np.float32)
        latents = [torch.from_numpy(rng.standard_normal(SHAPE).astype(np.float32))]
        for index, timestep in enumerate(scheduler.timesteps):
            options = {}
            if sampler == "ddim":
                options = {"eta": eta, "variance_noise": torch.from_numpy(noise[index]) if eta else None}
            step = scheduler.step(torch.from_numpy(eps[index]), timestep, latents[-1], **options)
            latents.append(step.prev_sample)
        prefix = f"{sampler}_{spacing}_{steps}_{eta}_"
        arrays[prefix + "timesteps"] = scheduler.timesteps.numpy().astype(np.int32)
        arrays[prefix + "eps"] = eps
        if eta:
            arrays[prefix + "noise"] = noise
        arrays[prefix + "latents"] = torch.stack(latents).float().numpy()
    np.savez_compressed(pathlib.Path(__file__).with_name("samplers.npz"), **arrays)


if __name__ == "__main__":
    main()
