"""The four stages of training, one module each, with the same seven names:

DEGRADED        whether a batch needs "lq" beside "image"
MAKES           the groups of weights that it makes; the fine stage adds to the statistics as well
needs(config) -> groups of weights that it reads
start(config, key, pretrained, images) -> (generator, frozen)
                what it trains and what it only reads, dicts of groups (see weights/__init__.py)
gradients(config, params, frozen, batch, key, adversarial) -> (gradients, metrics)
                gradients with the structure of `params`, {name: scalar}; pure, to be jitted
preview(config, generator, frozen, batch, key) -> image batches [b, h, w, 3], the columns of a sample grid
export(config, generator, frozen, images) -> the groups of weights that it made

config          TrainConfig
pretrained      the groups that `needs` names, and those of MAKES that `init_from` holds, to go on from
images          batches [b, crop, crop, 3] of clean images, for measuring statistics
params          {"generator": what is trained, "discriminator": its opponent's parameters, or {} without one}
frozen          as `start` returned it; in `gradients` also "lpips", the parameters of LPIPS, where images are made
batch           {"image", "lq"}: float32 [b, crop, crop, 3] in [-1, 1], the clean images and the degraded ones
key             jax.random key; gradients of one step, and sample grids, use one each
adversarial     bool: whether the discriminator takes part in this step
"""

from zipir_jax.training.stages import coarse, dit, fine, pixel_decoder

STAGES = {"coarse": coarse, "fine": fine, "dit": dit, "pixel_decoder": pixel_decoder}
