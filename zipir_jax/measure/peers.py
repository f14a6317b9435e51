"""A step of our DiTs beside one of the UNets that other restorers build on: random weights, one device, one run.

SeeSR, StableSR and DiffBIR denoise with the UNet of Stable Diffusion 2.1, SUPIR with that of SDXL. Only what runs in
every step is compared, ours too: no VAE, no text encoder. Of the others, the ControlNets, adapters and taggers are
left out as well, so that their figures are lower bounds. A latent of theirs is 8 times smaller than the image on each
side, of ours 32 times. torch runs them eagerly, as their own command lines do; ours is compiled.
"""

import dataclasses
import importlib.util
import os
from importlib.metadata import version

from zipir_jax.config import MODELS, DataConfig, SamplingConfig
from zipir_jax.measure.report import table
from zipir_jax.measure.timing import (
    cheap_params,
    check_repeats,
    default_platform,
    denoise_seconds,
    in_own_process,
    median_seconds,
)
from zipir_jax.models.attention import fastest
from zipir_jax.models.dit import DiT
from zipir_jax.models.flops import dit_read_flops, dit_step_flops
from zipir_jax.models.layers import count_params
from zipir_jax.models.lp_vae import FACTOR

UNET_FACTOR = 8  # pixels per latent pixel of the Stable Diffusion VAEs
UNET_SIDES = 64  # pixels: sides are multiples of it, as the UNets halve their latent three times
CLIP_TOKENS = 77  # of a prompt
CLIP_POOLED = 1280  # channels of SDXL's second text encoder, pooled
TIME_IDS = 6  # of SDXL: original size, crop and target size

# Arguments of diffusers' UNet2DConditionModel; what is left out has its default. `attention_head_dim` counts the heads
# of each scale, of 64 channels each.
UNETS = {
    # configs/inference/cldm.yaml of XPixelGroup/DiffBIR; configs/stableSRNew/v2-finetune_text_T_512.yaml of
    # IceClear/StableSR has the same
    "sd21": {
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        "transformer_layers_per_block": (1, 1, 1, 1),
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    # configs/inference/sd_xl_base.yaml of Stability-AI/generative-models; options/SUPIR_v0.yaml of Fanghua-Yu/SUPIR
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
        "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": CLIP_POOLED + 256 * TIME_IDS,
    },
}

# Ours.
DITS = {
    "paper": MODELS["paper"].dit,
    "paper_static": dataclasses.replace(MODELS["paper"].dit, lq_attention="static"),
    "dit_0p68b": MODELS["dit_0p68b"].dit,
}

# Each as its authors publish it: network (of DITS or UNETS), steps, and calls of the network a step: 2 with
# classifier-free guidance, with the text and without it. All are timed with both in one batch, though DiffBIR calls its
# network twice in turn. The first is what the others are compared with.
SYSTEMS = {
    "ZipIR 3.12B": {
        "network": "paper",
        "steps": SamplingConfig.steps,
        "calls": 2,
        "source": "paper, section 4 and supplement G: 25 DDIM steps, guidance 3.5",
    },
    "ZipIR 3.12B, unguided": {
        "network": "paper",
        "steps": SamplingConfig.steps,
        "calls": 1,
        "source": "as above with guidance 1: what its 250 ms a step at 2048 px on an A100, 43 TFLOP, can be at most",
    },
    "ZipIR 3.12B, fast": {
        "network": "paper_static",
        "steps": 8,
        "calls": 2,
        "source": "ours: static LQ tokens, 8 steps, guided; no weights have been trained so",
    },
    "ZipIR 0.68B": {
        "network": "dit_0p68b",
        "steps": SamplingConfig.steps,
        "calls": 1,
        "source": "as above, without text and so without guidance",
    },
    "SeeSR": {
        "network": "sd21",
        "steps": 50,
        "calls": 2,
        "source": "cswry/SeeSR, README.md: --num_inference_steps 50 --guidance_scale 5.5",
    },
    "StableSR": {
        "network": "sd21",
        "steps": 200,
        "calls": 1,
        "source": "IceClear/StableSR, README.md: --ddpm_steps 200; its script samples without guidance",
    },
    "DiffBIR v2": {
        "network": "sd21",
        "steps": 50,
        "calls": 2,
        "source": "XPixelGroup/DiffBIR, README.md: --version v2 --steps 50 --cfg_scale 4",
    },
    "DiffBIR v2.1": {
        "network": "sd21",
        "steps": 10,
        "calls": 2,
        "source": "XPixelGroup/DiffBIR, inference.py: 10 steps by default; README.md: --version v2.1 --cfg_scale 8",
    },
    "SUPIR": {
        "network": "sdxl",
        "steps": 50,
        "calls": 2,
        "source": "Fanghua-Yu/SUPIR, test.py: --edm_steps 50 --s_cfg 7.5 by default",
    },
}
PRECISIONS = {"cpu": "float32", "gpu": "bfloat16"}
FLOPS_SIZES = (512, 1024, 2048, 4096)  # pixels, at which the FLOPs of an image are counted
NOTE = (
    "Denoising networks alone, random weights, no VAE. The others' ControlNets, adapters and taggers are left out: "
    "their figures are lower bounds. Ratios are to the first row. A step calls the network once, or twice with "
    "classifier-free guidance, in one batch."
)


def shared_device() -> tuple[str, str]:
    """What jax and torch both compute on, "cpu" or "gpu", and the versions of torch and diffusers.

    Raises ValueError where torch or diffusers is not installed, or where torch cannot compute on what jax does.
    """
    names = ("torch", "diffusers")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"the networks of the peers need {' and '.join(missing)}, which this Python lacks; "
            'pip install -e ".[parity]" installs them'
        )
    import torch

    device = default_platform()
    if device not in PRECISIONS or (device == "gpu" and not torch.cuda.is_available()):
        raise ValueError(f"jax computes on a {device}, on which torch {torch.__version__} does not here")
    return device, ", ".join(f"{name} {version(name)}" for name in names)


def compare(side: int, repeats: int, device: str) -> list[dict]:
    """A row for each of SYSTEMS: seconds a step and an image of `side` x `side` pixels, and their ratios to the first.

    A step runs the network on a batch of as many as the system's calls; an image takes all of its steps. device:
    "gpu" (bfloat16) or "cpu" (float32). Seconds and ratios of what did not run are None; its "error" says why. Raises
    ValueError for a side that is not a multiple of 64 and for fewer than one repeat.
    """
    check_size(side)
    check_repeats(repeats)
    measured, rows = {}, []
    for name, system in SYSTEMS.items():
        network, batch = system["network"], system["calls"]
        if (network, batch) not in measured:
            time_step = time_unet if network in UNETS else time_dit
            found = in_own_process(time_step, network, side, batch, repeats, device)
            measured[network, batch] = {"seconds": None} | found
        row = {"system": name, "size": side} | system | measured[network, batch]
        row["image_seconds"] = row["seconds"] and row["steps"] * row["seconds"]
        ours = rows[0] if rows else row
        for key in ("seconds", "image_seconds"):
            row[f"{key}_ratio"] = row[key] / ours[key] if row[key] and ours[key] else None
        rows.append(row)
    return rows


def image_flops(sides: tuple[int, ...]) -> list[dict]:
    """A row for each of SYSTEMS: FLOPs of all steps of an image, by its side in pixels, and their ratio to the first.

    Counted, not measured, and the same on any device. Raises ValueError for a side that is not a multiple of 64.
    """
    for side in sides:
        check_size(side)
    rows = []
    for name, system in SYSTEMS.items():
        network, calls = system["network"], system["steps"] * system["calls"]
        if network in UNETS:
            flops = {side: calls * unet_flops(network, side) for side in sides}
        else:
            flops = {side: our_flops(network, side, calls, system["calls"]) for side in sides}
        ours = rows[0]["flops"] if rows else flops
        rows.append(
            {"system": name, "flops": flops, "ratio": {side: flops[side] / ours[side] for side in sides}}
        )
    return rows


def steps_table(rows: list[dict]) -> str:
    """Markdown of what `compare` returns."""
    keys = ("seconds", "seconds_ratio", "image_seconds", "image_seconds_ratio")
    shown = []
    for row in rows:
        numbers = {key: "-" if row[key] is None else f"{row[key]:.3g}" for key in keys}
        parameters = f"{row['parameters'] / 1e6:.0f} M" if "parameters" in row else "-"
        shown.append(row | numbers | {"parameters": parameters})
    columns = {"system": "{system}", "parameters": "{parameters}", "steps x calls": "{steps} x {calls}"}
    columns |= {"s a step": "{seconds}", "ratio": "{seconds_ratio}"}
    columns |= {"s an image": "{image_seconds}", "ratio, image": "{image_seconds_ratio}"}
    lines = [table(shown, columns)]
    lines += [f"\n{row['system']} did not run: {row['error']}" for row in rows if row["seconds"] is None]
    return "\n".join(lines)


def flops_table(rows: list[dict]) -> str:
    """Markdown of what `image_flops` returns."""
    shown = [
        row | {"flops": {side: f"{flops / 1e12:,.0f}" for side, flops in row["flops"].items()}}
        for row in rows
    ]
    columns = {f"{side} px": f"{{flops[{side}]}} ({{ratio[{side}]:.2f}})" for side in rows[0]["flops"]}
    return table(shown, {"system": "{system}"} | columns)


def check_size(side: int) -> None:
    """Raises ValueError for a side of the image that is not a multiple of 64 pixels."""
    if side < UNET_SIDES or side % UNET_SIDES:
        raise ValueError(f"size {side} is not a multiple of {UNET_SIDES}")


# --------------------------------------------------------------------------------------------------
# Ours
# --------------------------------------------------------------------------------------------------


def time_dit(network: str, side: int, batch: int, repeats: int, device: str) -> dict:
    """{"parameters", "compile_seconds", "seconds"} of `DiT.denoise` with random weights; arguments as of `compare`."""
    dtype = PRECISIONS[device]
    config = dataclasses.replace(DITS[network], compute_dtype=dtype, attention=fastest(device, dtype))
    params = cheap_params(DiT, config, dtype)
    seconds = denoise_seconds(config, params, side // FACTOR, side // FACTOR, batch, repeats)
    return {"parameters": count_params(params)} | seconds


def our_flops(network: str, side: int, calls: int, branches: int) -> int:
    """Of an image in `calls` calls of one of DITS, for as many branches of the guidance; side of the image, pixels."""
    size = DITS[network], side // FACTOR, side // FACTOR
    read_once = dit_read_flops(*size, branches * DataConfig.text_tokens)
    return read_once + calls * dit_step_flops(*size, DataConfig.text_tokens)


# --------------------------------------------------------------------------------------------------
# Theirs
# --------------------------------------------------------------------------------------------------


def time_unet(network: str, side: int, batch: int, repeats: int, device: str) -> dict:
    """{"parameters", "seconds"} of one of UNETS with random weights; arguments as of `compare`.

    Sets torch's threads and dtype for good: for a process of its own.
    """
    import torch

    gpu = device == "gpu"
    torch.set_num_threads(os.cpu_count())  # as many as XLA's
    torch.set_default_dtype(torch.bfloat16 if gpu else torch.float32)
    unet = build_unet(network).to_empty(device="cuda" if gpu else "cpu")
    inputs = unet_inputs(network, side, batch, device="cuda" if gpu else "cpu")

    def step():
        unet(**inputs)
        if gpu:
            torch.cuda.synchronize()

    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(name.endswith("weight"))  # a norm's scale, else a bias
        seconds = median_seconds(step, repeats)
    return {"parameters": sum(parameter.numel() for parameter in unet.parameters()), "seconds": seconds}


def build_unet(network: str):
    """diffusers' module of one of UNETS, without memory for its weights."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**UNETS[network]).eval()


def unet_inputs(network: str, side: int, batch: int, **options) -> dict:
    """Arguments of a UNet's call for images of `side` x `side` pixels; `options`, such as device, go to torch."""
    import torch

    config = UNETS[network]
    inputs = {
        "sample": torch.randn(batch, 4, side // UNET_FACTOR, side // UNET_FACTOR, **options),
        "timestep": torch.full((batch,), 500.0, **options),
        "encoder_hidden_states": torch.randn(batch, CLIP_TOKENS, config["cross_attention_dim"], **options),
    }
    if "addition_embed_type" in config:
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, CLIP_POOLED, **options),
            "time_ids": torch.full((batch, TIME_IDS), float(side), **options),
        }
    return inputs


def unet_flops(network: str, side: int) -> int:
    """Of one call of one of UNETS, as torch counts them: matrix products and convolutions, 2 a multiply-add."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        build_unet(network)(**unet_inputs(network, side, 1, device="meta"))
    return counter.get_total_flops()
