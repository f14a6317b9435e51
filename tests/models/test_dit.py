import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from zipir_jax.config import DiTConfig
from zipir_jax.models.dit import Block, DiT, rotary_angles, rotate, timestep_embedding
from zipir_jax.models.layers import abstract_params, bind, count_params, init_params

pytestmark = pytest.mark.usefixtures("quick_compile")
PLAIN = DiTConfig(
    layers=3, width=32, heads=2, mlp_ratio=2, text_width=0, latent_channels=8, compute_dtype="float32"
)
TEXT = dataclasses.replace(PLAIN, text_width=12)
STATIC, STATIC_TEXT = (dataclasses.replace(config, lq_attention="static") for config in (PLAIN, TEXT))
BATCH, HEIGHT, WIDTH, LENGTH = 2, 3, 5, 6


@pytest.fixture(name="inputs", scope="module")
def make_inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "noisy": jax.random.normal(keys[0], (BATCH, HEIGHT, WIDTH, 8)),
        "timesteps": jnp.array([30.0, 800.0]),
        "lq": jax.random.normal(keys[1], (BATCH, HEIGHT, WIDTH, 8)),
        "text": jax.random.normal(keys[2], (BATCH, LENGTH, 12)),
        "text_lengths": jnp.array([LENGTH, 2]),
    }


@functools.partial(jax.jit, static_argnums=0)
def apply(config, params, inputs):
    return bind(DiT, config, params)(**inputs)


def without_text(inputs):
    return {name: value for name, value in inputs.items() if "text" not in name}


# --------------------------------------------------------------------------------------------------
# Parameters
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text_width", "count"), [(4096, 9), (0, 6)])
def test_there_are_three_modulations_a_sublayer(text_width, count):
    config = dataclasses.replace(PLAIN, text_width=text_width)
    assert config.modulations == count
    params = abstract_params(DiT, config)["blocks"]
    assert params["modulation"]["kernel"].shape == (3, 32, 32 * count)  # one slice a layer
    assert ("text_attention" in params) == bool(text_width)


def test_every_layer_adds_the_same_number_of_parameters():
    counts = [count_params(abstract_params(DiT, dataclasses.replace(TEXT, layers=n))) for n in (1, 2, 5)]
    block = count_params(abstract_params(Block, TEXT))
    assert np.diff(counts).tolist() == [block, 3 * block]


def test_heads_that_rotary_positions_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="width 36 over 2 heads is not a multiple of 4 channels a head"):
        dataclasses.replace(PLAIN, width=36)
    with pytest.raises(ValueError, match="width 32 over 3 heads"):
        dataclasses.replace(PLAIN, heads=3)


# --------------------------------------------------------------------------------------------------
# Initial state: adaLN-zero
# --------------------------------------------------------------------------------------------------


def test_it_starts_as_zero_made_of_blocks_that_are_the_identity(inputs):
    params = init_params(DiT, TEXT, jax.random.key(0))
    np.testing.assert_array_equal(apply(TEXT, params, inputs), 0)
    first = jax.tree.map(lambda p: p[0], params["blocks"])
    tokens = jax.random.normal(jax.random.key(1), (BATCH, 2 * HEIGHT * WIDTH, 32))
    conditioning = jax.random.normal(jax.random.key(2), (BATCH, 32))
    angles = jnp.tile(rotary_angles(HEIGHT, WIDTH, 16), (2, 1))

    @jax.jit
    def run(params):
        block = bind(Block, TEXT, params)
        return block(tokens, conditioning, angles, text=block.read_text(inputs["text"]))

    result = run(first)
    np.testing.assert_array_equal(result, tokens)
    kernels = params["blocks"]["mlp"]["up"]["kernel"]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1  # each block has numbers of its own


# --------------------------------------------------------------------------------------------------
# The network, written out
# --------------------------------------------------------------------------------------------------


def unrolled(config, params, inputs, *, lq_tokens=True):
    """The DiT with a Python loop over the slices of its stack; optionally without the LQ tokens."""
    dit = bind(DiT, config, params)
    noisy, lq = inputs["noisy"], inputs["lq"]
    b, h, w, c = noisy.shape
    x, lq = dit.embed_noisy(noisy.reshape(b, h * w, c)), dit.embed_lq(lq.reshape(b, h * w, c))
    angles = once = rotary_angles(h, w, config.width // config.heads)
    static = config.lq_attention == "static"
    if lq_tokens and not static:
        x, angles = jnp.concatenate([x, lq], 1), jnp.concatenate([angles, angles])
    conditioning, clean = (
        dit.timestep_out(nnx.swish(dit.timestep_in(timestep_embedding(timesteps))))
        for timesteps in (inputs["timesteps"], jnp.zeros(1))
    )
    for layer in range(config.layers):
        block = bind(Block, config, jax.tree.map(lambda p, layer=layer: p[layer], params["blocks"]))
        read = {"text": block.read_text(inputs["text"])} if "text" in inputs else {}
        if lq_tokens and static:
            lq, read["lq"] = block.read_lq(lq, clean, once)
        x = block(x, conditioning, angles, **read, text_lengths=inputs.get("text_lengths"))
    shift, scale = jnp.split(dit.final_modulation(nnx.swish(conditioning))[:, None], 2, -1)
    return dit.head(dit.norm(x[:, : h * w]) * (1 + scale) + shift).reshape(b, h, w, c)


@pytest.mark.parametrize("config", [TEXT, STATIC_TEXT], ids=["joint", "static"])
def test_the_scanned_stack_equals_a_loop_over_its_slices(random_params, inputs, config):
    params = random_params(DiT, config)
    expected = jax.jit(functools.partial(unrolled, config))(params, inputs)
    result = apply(config, params, inputs)
    assert result.shape == (BATCH, HEIGHT, WIDTH, 8)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, atol=1e-4)
    assert np.std(result) > 0.1


# --------------------------------------------------------------------------------------------------
# What is computed once an image
# --------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def apply_cached(config, params, inputs):
    """What a step of the sampler computes: `denoise` with what `read` made."""
    dit = bind(DiT, config, params)
    given = {name: inputs[name] for name in ("lq", "text", "text_lengths") if name in inputs}
    return dit.denoise(inputs["noisy"], inputs["timesteps"], dit.read(**given))


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("lq_attention", ["joint", "static"])
@pytest.mark.parametrize("text", [False, True])
def test_what_is_read_once_serves_as_what_is_read_anew(random_params, inputs, text, lq_attention, patch):
    config = dataclasses.replace(TEXT if text else PLAIN, lq_attention=lq_attention, patch=patch)
    params = random_params(DiT, config)
    given = inputs if text else without_text(inputs)
    given = given | {name: jnp.tile(given[name], (1, patch, patch, 1)) for name in ("noisy", "lq")}
    expected = apply(config, params, given)
    np.testing.assert_allclose(apply_cached(config, params, given), expected, atol=1e-5)
    assert np.std(expected) > 0.1


@pytest.mark.parametrize("config", [TEXT, STATIC_TEXT], ids=["joint", "static"])
def test_branches_of_the_guidance_share_the_lq_tokens(random_params, inputs, config):
    # Two texts an image, one latent: the second half of the batch is the first one's images with other texts.
    params = random_params(DiT, config)
    other = inputs | {"text": inputs["text"][::-1] + 0.5, "text_lengths": inputs["text_lengths"][::-1]}
    both = {name: jnp.concatenate([inputs[name], other[name]]) for name in inputs if name != "lq"}
    result = apply_cached(config, params, both | {"lq": inputs["lq"]})
    for half, given in zip(jnp.split(result, 2), (inputs, other), strict=True):
        np.testing.assert_allclose(half, apply(config, params, given), atol=1e-5)


def test_static_lq_tokens_see_neither_timestep_nor_text_nor_noise(random_params, inputs):
    params = random_params(DiT, STATIC_TEXT)

    @jax.jit
    def keys_values(given):
        dit = bind(DiT, STATIC_TEXT, params)
        return dit.read(given["lq"], given["text"], given["text_lengths"])["lq"]

    key, _ = before = keys_values(inputs)
    assert key.shape == (3, BATCH, HEIGHT * WIDTH, 2, 16)
    jax.tree.map(np.testing.assert_array_equal, before, keys_values(inputs | {"text": inputs["text"] + 1}))
    changed = keys_values(inputs | {"lq": inputs["lq"].at[0, 0, 0].add(1.0)})
    difference = np.abs(changed[0] - key).max((0, 3, 4))
    assert difference[0].min() > 0  # every token of the first item sees every other one
    assert difference[1].max() == 0


def test_joint_and_static_share_their_parameters_and_differ_in_their_result(random_params, inputs):
    params = random_params(DiT, TEXT)
    assert abstract_params(DiT, STATIC_TEXT) == abstract_params(DiT, TEXT)
    difference = apply(STATIC_TEXT, params, inputs) - apply(TEXT, params, inputs)
    assert np.abs(difference).max() > 1e-2


def test_a_condition_of_another_size_is_refused(random_params, inputs):
    for config in (PLAIN, STATIC):
        params, given = random_params(DiT, config), without_text(inputs)
        dit = bind(DiT, config, params)
        condition = dit.read(given["lq"])
        with pytest.raises(ValueError, match="20 noisy tokens, but 15 of the LQ latent"):
            dit.denoise(jnp.zeros((BATCH, 4, 5, 8)), given["timesteps"], condition)


def test_an_lq_token_stands_where_its_noisy_token_stands(random_params, inputs):
    # Attention over every key twice equals attention over every key once. If both kinds of token are the same, the
    # LQ tokens therefore change nothing; unless their positions differed.
    params = random_params(DiT, PLAIN)
    params["embed_lq"] = params["embed_noisy"]
    twins = without_text(inputs) | {"lq": inputs["noisy"]}
    alone = jax.jit(functools.partial(unrolled, PLAIN, lq_tokens=False))(params, twins)
    np.testing.assert_allclose(apply(PLAIN, params, twins), alone, atol=1e-4)


def test_a_learned_type_tells_lq_tokens_from_noisy_ones(random_params, inputs):
    params = random_params(DiT, PLAIN)
    bias = params["embed_lq"]["bias"] + jnp.tile(jnp.array([1.0, -1.0]), 16)
    other = params | {"embed_lq": params["embed_lq"] | {"bias": bias}}
    difference = apply(PLAIN, other, without_text(inputs)) - apply(PLAIN, params, without_text(inputs))
    assert np.abs(difference).max() > 1e-2


@pytest.mark.parametrize("layers", [2, 7])
def test_the_program_holds_one_scan_whatever_the_depth(layers):
    config = dataclasses.replace(PLAIN, layers=layers)
    latent = jax.ShapeDtypeStruct((1, 2, 2, 8), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda p, *args: bind(DiT, config, p)(*args))(
        abstract_params(DiT, config), latent, jax.ShapeDtypeStruct((1,), jnp.float32), latent
    )
    scans = [equation for equation in equations(jaxpr.jaxpr) if equation.primitive.name == "scan"]
    assert [scan.params["length"] for scan in scans] == [layers]
    shallow = dataclasses.replace(PLAIN, layers=1)
    reference = jax.make_jaxpr(lambda p, *args: bind(DiT, shallow, p)(*args))(
        abstract_params(DiT, shallow), latent, jax.ShapeDtypeStruct((1,), jnp.float32), latent
    )
    assert len(list(equations(jaxpr.jaxpr))) == len(list(equations(reference.jaxpr)))


def equations(jaxpr):
    """All equations of a jaxpr and of the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


# --------------------------------------------------------------------------------------------------
# What the output depends on
# --------------------------------------------------------------------------------------------------


def test_every_input_acts_on_its_own_item_alone(random_params, inputs):
    params = random_params(DiT, TEXT)
    before = apply(TEXT, params, inputs)
    for name in ("noisy", "timesteps", "lq", "text"):
        changed = inputs | {name: inputs[name].at[0].add(1.0)}
        difference = np.abs(apply(TEXT, params, changed) - before).max((1, 2, 3))
        assert difference[0] > 1e-2, name
        assert difference[1] == 0, name


def test_a_permuted_batch_gives_the_permuted_result(random_params, inputs):
    params = random_params(DiT, TEXT)
    swapped = {name: value[::-1] for name, value in inputs.items()}
    np.testing.assert_allclose(apply(TEXT, params, swapped), apply(TEXT, params, inputs)[::-1], atol=1e-5)


def test_directions_are_known(random_params, inputs):
    # Turned by 180 degrees, every token has the same others around it, in opposite directions.
    params = random_params(DiT, PLAIN)
    plain = without_text(inputs)
    turned = apply(PLAIN, params, plain | {k: plain[k][:, ::-1, ::-1] for k in ("noisy", "lq")})
    assert np.abs(turned[:, ::-1, ::-1] - apply(PLAIN, params, plain)).max() > 1e-2


def test_text_beyond_its_length_has_no_influence(random_params, inputs):
    params = random_params(DiT, TEXT)
    noise = 1e3 * jax.random.normal(jax.random.key(9), inputs["text"].shape)
    padding = jnp.arange(LENGTH)[None, :, None] >= inputs["text_lengths"][:, None, None]
    other = inputs | {"text": jnp.where(padding, noise, inputs["text"])}
    np.testing.assert_array_equal(apply(TEXT, params, other), apply(TEXT, params, inputs))
    # The same without padding, for the item whose text has two tokens.
    cut = {name: value[1:] for name, value in inputs.items() if name != "text_lengths"}
    cut["text"] = cut["text"][:, :2]
    np.testing.assert_allclose(apply(TEXT, params, cut)[0], apply(TEXT, params, inputs)[1], atol=1e-4)


def test_missing_and_unwanted_text_are_refused(inputs):
    for config, given, message in (
        (TEXT, without_text(inputs), "this DiT needs text embeddings"),
        (PLAIN, inputs, "this DiT has no cross-attention for text embeddings"),
    ):
        params = abstract_params(DiT, config)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(functools.partial(apply, config), params, given)


def test_latents_that_patches_do_not_fit_are_refused(inputs):
    config = dataclasses.replace(PLAIN, patch=2)
    given = without_text(inputs) | {
        name: inputs[name][:, : 2 * (HEIGHT // 2) - 1] for name in ("noisy", "lq")
    }
    with pytest.raises(ValueError, match="sides that are not multiples of the patch 2"):
        jax.eval_shape(functools.partial(apply, config), abstract_params(DiT, config), given)
    given = without_text(inputs) | {"lq": inputs["lq"][:, 1:]}
    with pytest.raises(ValueError, match="they must agree"):
        jax.eval_shape(functools.partial(apply, PLAIN), abstract_params(DiT, PLAIN), given)


def test_queries_and_keys_are_normalised(random_params, inputs):
    params = random_params(DiT, TEXT)
    blocks = dict(params["blocks"])
    for name in ("attention", "text_attention"):
        scaled = {part: jax.tree.map(lambda p: 30 * p, blocks[name][part]) for part in ("query", "key")}
        blocks[name] = blocks[name] | scaled
    result = apply(TEXT, params | {"blocks": blocks}, inputs)
    np.testing.assert_allclose(result, apply(TEXT, params, inputs), atol=1e-3)


def test_half_precision_stays_inside(random_params, inputs):
    half = dataclasses.replace(PLAIN, compute_dtype="bfloat16")
    params = random_params(DiT, PLAIN)
    result = apply(half, params, without_text(inputs))
    expected = apply(PLAIN, params, without_text(inputs))
    assert result.dtype == jnp.float32
    assert 1e-5 < np.abs(result - expected).mean() / np.abs(expected).mean() < 0.1


# --------------------------------------------------------------------------------------------------
# Tokens and positions
# --------------------------------------------------------------------------------------------------


def test_patches_of_two_return_to_their_place():
    # With blocks and modulations at zero and unit embedders, what is left is the norm of each 2 x 2 patch.
    config = dataclasses.replace(PLAIN, patch=2, latent_channels=8)
    params = jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), abstract_params(DiT, config))
    params["embed_noisy"]["kernel"] = params["head"]["kernel"] = np.eye(32, dtype=np.float32)
    latent = jax.random.normal(jax.random.key(0), (2, 4, 6, 8))
    result = apply(config, params, {"noisy": latent, "timesteps": jnp.zeros(2), "lq": latent})
    patches = np.asarray(latent, np.float64).reshape(2, 2, 2, 3, 2, 8)
    mean = patches.mean((2, 4, 5), keepdims=True)
    std = np.sqrt(patches.var((2, 4, 5), keepdims=True) + 1e-6)
    np.testing.assert_allclose(result, ((patches - mean) / std).reshape(2, 4, 6, 8), atol=1e-5)


def test_rotary_logits_depend_on_the_relative_position_alone():
    height, width, head = 5, 7, 16
    keys = jax.random.split(jax.random.key(0))
    query, key = (jnp.broadcast_to(jax.random.normal(k, (1, 1, 1, head)), (1, 35, 1, head)) for k in keys)
    angles = rotary_angles(height, width, head)
    query, key = (np.asarray(rotate(x, angles))[0, :, 0].reshape(height, width, head) for x in (query, key))
    logits = np.einsum("ijd,kld->ijkl", query, key)
    by_shift = {}
    for row, column in np.ndindex(height, width):
        for other_row, other_column in np.ndindex(height, width):
            shift = (other_row - row, other_column - column)
            by_shift.setdefault(shift, []).append(logits[row, column, other_row, other_column])
    assert len(by_shift) == (2 * height - 1) * (2 * width - 1)
    assert max(np.ptp(values) for values in by_shift.values()) < 1e-4
    means = {shift: np.mean(values) for shift, values in by_shift.items()}
    for shift in ((0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (1, -1)):
        assert abs(means[shift] - means[0, 0]) > 1e-2
    assert abs(means[0, 1] - means[1, 0]) > 1e-2  # rows turn other channels than columns


def test_rotation_keeps_lengths_and_leaves_the_first_token_alone():
    x = jax.random.normal(jax.random.key(0), (2, 12, 3, 16))
    turned = rotate(x, rotary_angles(3, 4, 16))
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    assert rotate(x.astype(jnp.bfloat16), rotary_angles(3, 4, 16)).dtype == jnp.bfloat16


def test_timesteps_are_told_apart():
    embedding = timestep_embedding(jnp.array([0, 1, 2, 500, 998, 999]))
    assert embedding.shape == (6, 256)
    distances = np.linalg.norm(embedding[:, None] - embedding[None], axis=-1)
    assert distances[~np.eye(6, dtype=bool)].min() > 0.5
    np.testing.assert_allclose(embedding[0], [1.0] * 128 + [0.0] * 128, atol=1e-6)
