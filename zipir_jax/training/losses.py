"""Losses on images: L1, LPIPS, KL, and the patch discriminator with its adaptive weight (paper section 3.1).

After "Taming Transformers" (Esser et al. 2021), which the paper follows through its reference [13].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from zipir_jax.config import TrainConfig
from zipir_jax.metrics.fidelity import load_lpips
from zipir_jax.models.discriminator import PatchDiscriminator
from zipir_jax.models.layers import bind

LPIPS_SMALLEST = 31  # pixels; below, the last pooling of AlexNet leaves nothing


def lpips_net(name: str) -> str:
    """The network of `LossConfig.lpips_net`: "auto" is AlexNet on CPU and VGG16 elsewhere."""
    if name != "auto":
        return name
    return "alexnet" if jax.default_backend() == "cpu" else "vgg16"


def lpips_group(config: TrainConfig) -> dict:
    """{"lpips": the network's parameters}, which the step reads, or {} where no loss of the stage counts LPIPS."""
    if config.stage == "dit" or not config.loss.lpips:
        return {}
    return {"lpips": load_lpips(lpips_net(config.loss.lpips_net))[0]}


def kl_divergence(mean: Float[Array, "b h w c"], log_variance: Float[Array, "b h w c"]) -> Float[Array, ""]:
    """KL(N(mean, variance) || N(0, 1)), summed over each latent, averaged over the batch."""
    kl = 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance)
    return kl.sum((1, 2, 3)).mean()


def random_windows(key, side: int, a: Float[Array, "b h w c"], b: Float[Array, "b h w c"]):
    """The same `side` x `side` pixels of both, at a random place in each image; all of them for side 0."""
    if not side:
        return a, b
    count, height, width, channels = a.shape
    corners = jax.random.randint(key, (count, 2), 0, jnp.array([height - side + 1, width - side + 1]))

    def cut(image, corner):
        return jax.lax.dynamic_slice(image, (*corner, 0), (side, side, channels))

    return jax.vmap(cut)(a, corners), jax.vmap(cut)(b, corners)


def image_gradients(
    config: TrainConfig,
    params: dict,
    *,
    decoder: Callable,
    inputs: Callable,
    target: Float[Array, "b h w 3"],
    lpips_params: dict | None,
    key,
    adversarial: bool,
) -> tuple[dict, dict]:
    """Gradients of an image-making network and of its discriminator, in one pass through each.

    `inputs(generator) -> (inputs, kl [])` are what the decoder reads, a tuple of arrays, and the KL term.
    `decoder(generator)` is a module: its `features(*inputs)` [b, h, w, c] are all but its last layer, which `head`
    applies: `head(features)` is the image, to be like `target`.

    The discriminator's loss counts `loss.adversarial * w`, where w = |dL_rec / dlast layer| / |dL_adv / dlast layer|
    (Esser et al. 2021, eq. 7). Both gradients are taken at the image and carried on through the last layer alone, so
    that the weight costs no second backward pass. Before the discriminator's start, `adversarial` is False: it is then
    left out.

    `lpips_params` may be None where `loss.lpips` is 0.

    Returns (gradients with the structure of `params`, metrics).
    """
    loss = config.loss

    def features(generator):
        arrays, kl = inputs(generator)
        return decoder(generator).features(*arrays), kl

    def head(generator, hidden):
        return decoder(generator).head(hidden)

    (hidden, kl), features_vjp = jax.vjp(features, params["generator"])
    image, head_vjp = jax.vjp(head, params["generator"], hidden)

    def reconstruction(image):
        l1 = jnp.abs(image - target).mean()
        if not loss.lpips:
            return loss.l1 * l1, {"l1": l1}
        _, distance = load_lpips(lpips_net(loss.lpips_net))
        lpips = distance(lpips_params, *random_windows(key, loss.lpips_crop, image, target)).mean()
        return loss.l1 * l1 + loss.lpips * lpips, {"l1": l1, "lpips": lpips}

    (total, metrics), image_gradient = jax.value_and_grad(reconstruction, has_aux=True)(image)
    discriminator_gradient = jax.tree.map(jnp.zeros_like, params["discriminator"])
    if adversarial:

        def logits(discriminator, image):
            return bind(PatchDiscriminator, config.discriminator, discriminator)(image)

        adversarial_loss, gradient = jax.value_and_grad(
            lambda image: -logits(params["discriminator"], image).mean()
        )(image)
        # Only the last layer's parameters have a gradient through `head`; the others' are zero.
        weight = optax.tree.norm(head_vjp(image_gradient)[0]) / (
            optax.tree.norm(head_vjp(gradient)[0]) + 1e-4
        )
        weight = loss.adversarial * jnp.clip(weight, 0.0, 1e4)
        image_gradient = image_gradient + weight * gradient
        total = total + weight * adversarial_loss

        def hinge(discriminator):
            real, fake = jnp.split(logits(discriminator, jnp.concatenate([target, image])), 2)
            return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())

        discriminator_loss, discriminator_gradient = jax.value_and_grad(hinge)(params["discriminator"])
        metrics |= {"adversarial": adversarial_loss, "weight": weight, "discriminator": discriminator_loss}

    values_per_image = target[0].size
    head_gradient, hidden_gradient = head_vjp(image_gradient)
    (body_gradient,) = features_vjp((hidden_gradient, jnp.asarray(loss.kl / values_per_image, kl.dtype)))
    gradients = {
        "generator": jax.tree.map(jnp.add, head_gradient, body_gradient),
        "discriminator": discriminator_gradient,
    }
    kl = kl / values_per_image
    return gradients, metrics | {"kl": kl, "loss": total + loss.kl * kl}
