"""The four stages of training, one module each, with the same seven names:

DEGRADED        whether a batch needs "lq" beside "image"
MAKES           the groups of weights that it makes; coarse and fine stage measure statistics as well
needs(config) -> groups of weights that it reads and does not train (see weights/__init__.py)
init(config, key, pretrained) -> generator
                the groups that it trains, new; pure, to be jitted
gradients(config, params, frozen, batch, key, adversarial) -> (gradients, metrics)
                gradients with the structure of `params`, {name: scalar}; pure, to be jitted
preview(config, generator, frozen, batch, key) -> image batches [b, h, w, 3], the columns of a sample grid; pure
statistics(config, weights, images) -> the group "statistics" that belongs to what it made

config          TrainConfig
pretrained      the groups that `needs` names, and those of MAKES that `init_from` holds, to go on from
images          batches [b, h, w, 3] of clean images, for measuring statistics
weights         `generator | frozen`, all that the stage knows
params          {"generator": what is trained, "discriminator": its opponent's parameters, or {} without one}
frozen          the groups that it needs, and "statistics"; in `gradients` also `losses.lpips_group`
batch           {"image", "lq"}: float32 [b, h, w, 3] in [-1, 1], the clean images and the degraded ones; and, for the
                DiT, "text" and "text_lengths", or "latent" and "lq_latent" in place of images (see data/pipeline.py)
key             jax.random key; gradients of one step, and sample grids, use one each
adversarial     bool: whether the discriminator takes part in this step
"""

from zipir_jax.training.stages import coarse, dit, fine, pixel_decoder

STAGES = {"coarse": coarse, "fine": fine, "dit": dit, "pixel_decoder": pixel_decoder}
