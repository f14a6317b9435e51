"""The four stages of training, one module each, with the same five names:

DEGRADED        whether a batch needs "lq" beside "image"
needs(config) -> groups of weights that it starts from
start(config, key, pretrained, images) -> (generator, frozen)
                what it trains and what it only reads; `images` are batches for measuring statistics
gradients(config, params, frozen, batch, key, adversarial) -> (gradients, metrics)
                `params` is {"generator", "discriminator"}; pure, to be jitted
preview(config, generator, frozen, batch, key) -> image batches, the columns of a sample grid
export(config, generator, frozen, images) -> the groups of weights that it made
"""

from zipir_jax.training.stages import coarse, dit, fine, pixel_decoder

STAGES = {"coarse": coarse, "fine": fine, "dit": dit, "pixel_decoder": pixel_decoder}
