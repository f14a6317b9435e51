import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from zipir_jax.models import attention as module
from zipir_jax.models.attention import attention, splash_attention, xla_attention

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(name="qkv")
def make_qkv():
    keys = jax.random.split(jax.random.key(0), 3)
    lengths = (5, 7, 7)  # queries, keys, values
    return tuple(jax.random.normal(key, (3, n, 2, 8)) for key, n in zip(keys, lengths, strict=True))


def naive(query, key, value):
    """float64 softmax attention of one batch item, head by head."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    heads = []
    for h in range(query.shape[1]):
        weights = np.exp(query[:, h] @ key[:, h].T / np.sqrt(query.shape[-1]))
        heads.append(weights / weights.sum(-1, keepdims=True) @ value[:, h])
    return np.stack(heads, 1)


def test_xla_equals_softmax_written_out(qkv):
    result = attention(*qkv, implementation="xla")
    for item in range(3):
        np.testing.assert_allclose(result[item], naive(*(x[item] for x in qkv)), atol=1e-5)


def test_keys_beyond_the_length_have_no_influence(qkv):
    query, key, value = qkv
    lengths = jnp.array([7, 1, 4])
    result = attention(query, key, value, implementation="xla", key_lengths=lengths)
    for item, n in enumerate(lengths):
        expected = naive(query[item], key[item, :n], value[item, :n])
        np.testing.assert_allclose(result[item], expected, atol=1e-5)


def test_the_result_keeps_the_dtype(qkv):
    half = [x.astype(jnp.bfloat16) for x in qkv]
    result = attention(*half, implementation="xla")
    assert result.dtype == jnp.bfloat16
    exact = attention(*(x.astype(jnp.float32) for x in half), implementation="xla")
    np.testing.assert_allclose(result.astype(jnp.float32), exact, atol=0.03)


@pytest.mark.parametrize("name", ["flash", "XLA", ""])
def test_an_unknown_implementation_is_refused_with_its_name(qkv, name):
    with pytest.raises(
        ValueError, match=f"attention implementation '{name}' is not one of: xla, cudnn, splash"
    ):
        attention(*qkv, implementation=name)


def values_and_gradients(function, query, key, value):
    """[result, gradients by query, key and value], of a loss that treats no two outputs alike."""
    weights = jnp.cos(jnp.arange(query.size, dtype=jnp.float32)).reshape(query.shape)

    def loss(*arrays):
        result = function(*arrays).astype(jnp.float32)
        return (result * weights).sum(), result

    (_, result), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(query, key, value)
    return [result, *gradients]


def normal(*shapes, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(1), len(shapes))
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("queries_at_a_time", [1, 2, 3, 4])
def test_blocks_of_queries_change_nothing(monkeypatch, queries_at_a_time):
    """Blocks that divide the 5 queries and blocks that do not, with keys that are masked; gradients too."""
    arrays = normal((3, 5, 2, 8), (3, 7, 2, 8), (3, 7, 2, 8))
    lengths = jnp.array([7, 1, 4])
    whole = values_and_gradients(functools.partial(xla_attention, key_lengths=lengths), *arrays)
    monkeypatch.setattr(module, "LARGEST_LOGITS", queries_at_a_time * 3 * 2 * 7 * 4)
    blocks = values_and_gradients(functools.partial(xla_attention, key_lengths=lengths), *arrays)
    for a, b in zip(blocks, whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_bias_is_added_to_the_scaled_logits(monkeypatch):
    """At once, and in blocks of queries of which the last is not full; gradients by the bias too."""
    query, key, value = normal((3, 5, 2, 8), (3, 7, 2, 8), (3, 7, 2, 8))
    bias = jax.random.normal(jax.random.key(2), (2, 5, 7))
    lengths = jnp.array([7, 1, 4])

    def run(bias):
        return attention(query, key, value, implementation="xla", key_lengths=lengths, bias=bias)

    def gradient(bias):
        return jax.grad(lambda bias: (run(bias) * jnp.cos(jnp.arange(240.0).reshape(query.shape))).sum())(
            bias
        )

    whole = run(bias), gradient(bias)
    for item, n in enumerate(lengths):
        logits = jnp.einsum("qnd,knd->nqk", query[item], key[item, :n]) / np.sqrt(8) + bias[:, :, :n]
        expected = jnp.einsum("nqk,knd->qnd", jax.nn.softmax(logits), value[item, :n])
        np.testing.assert_allclose(whole[0][item], expected, atol=1e-5)
    monkeypatch.setattr(module, "LARGEST_LOGITS", 2 * 3 * 2 * 7 * 4)
    for a, b in zip((run(bias), gradient(bias)), whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(("implementation", "platform"), [("cudnn", "gpu"), ("splash", "tpu")])
def test_kernels_take_no_bias(qkv, monkeypatch, implementation, platform):
    monkeypatch.setattr(module, "current_platform", lambda: platform)
    half = [x.astype(jnp.bfloat16) for x in qkv]
    with pytest.raises(ValueError, match=f"{implementation} attention takes no bias; xla does"):
        attention(*half, implementation=implementation, bias=jnp.zeros((2, 5, 7)))


def test_blocks_of_queries_bound_the_memory_of_training():
    """Logits of 4 GiB, never there at once: not in the forward pass, nor kept for the backward pass."""
    qkv = [jax.ShapeDtypeStruct((1, 2**14, 4, 8), jnp.float32)] * 3
    gradient = jax.grad(lambda *arrays: xla_attention(*arrays).sum(), (0, 1, 2))
    used = jax.jit(gradient).lower(*qkv).compile().memory_analysis().temp_size_in_bytes
    assert used < 5 * module.LARGEST_LOGITS  # some arrays as large as a block's logits, of which there are 64


def test_a_mesh_divides_the_logits():
    """As many queries at a time as fit a device, which has only its part of the batch and of the heads."""
    qkv = [jax.ShapeDtypeStruct((8, 2048, 8, 8), jnp.bfloat16)] * 3  # 1 GiB of logits

    def blocks(**axes):
        mesh = AbstractMesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes))
        with jax.sharding.use_abstract_mesh(mesh):
            scans = [e for e in jax.make_jaxpr(xla_attention)(*qkv).eqns if e.primitive.name == "scan"]
        return scans[0].params["length"] if scans else 1

    assert blocks(data=1, fsdp=1, tensor=1) == 16
    assert blocks(data=2, fsdp=1, tensor=1) == 8
    assert blocks(data=1, fsdp=2, tensor=4) == 2
    assert blocks(data=2, fsdp=4, tensor=2) == 1


@pytest.mark.parametrize(
    ("head_dim", "queries", "keys", "lengths"),
    [
        (128, 130, 130, None),  # tokens that are no multiple of the kernel's lanes
        (72, 600, 77, (77, 9)),  # two blocks of queries; text, of two lengths
    ],
)
def test_splash_equals_xla_to_the_rounding_of_bfloat16(head_dim, queries, keys, lengths):
    shapes = (2, queries, 2, head_dim), (2, keys, 2, head_dim), (2, keys, 2, head_dim)
    arrays = normal(*shapes, dtype=jnp.bfloat16)
    lengths = None if lengths is None else jnp.array(lengths)
    splash = functools.partial(splash_attention, key_lengths=lengths, interpret=True)
    results = values_and_gradients(splash, *arrays)
    exact = values_and_gradients(
        functools.partial(xla_attention, key_lengths=lengths), *(x.astype(jnp.float32) for x in arrays)
    )
    for a, b in zip(results, exact, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.01 * np.abs(b).max())


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("queries", "keys", "lengths"), [(131, 131, None), (301, 77, (77, 9))])
def test_cudnn_equals_xla_to_the_rounding_of_bfloat16(head_dim, queries, keys, lengths):
    """Image tokens of an odd number; text of two lengths."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")
    shapes = (2, queries, 2, head_dim), (2, keys, 2, head_dim), (2, keys, 2, head_dim)
    arrays = normal(*shapes, dtype=jnp.bfloat16)
    lengths = None if lengths is None else jnp.array(lengths)
    cudnn = functools.partial(attention, implementation="cudnn", key_lengths=lengths)
    results = jax.jit(functools.partial(values_and_gradients, cudnn))(*arrays)
    with jax.default_matmul_precision("float32"):  # by default a GPU multiplies fewer digits
        exact = values_and_gradients(
            functools.partial(xla_attention, key_lengths=lengths), *(x.astype(jnp.float32) for x in arrays)
        )
    for a, b in zip(results, exact, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.01 * np.abs(b).max())


def test_splash_is_exact_where_its_dtype_is():
    arrays = normal((1, 640, 1, 64), (1, 520, 1, 64), (1, 520, 1, 64))  # padded to two blocks of 384 each
    lengths = jnp.array([515])
    splash = functools.partial(splash_attention, key_lengths=lengths, interpret=True)
    exact = values_and_gradients(functools.partial(xla_attention, key_lengths=lengths), *arrays)
    for a, b in zip(values_and_gradients(splash, *arrays), exact, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def on(platform, implementation, dtype=jnp.bfloat16):
    """Trace attention with a mesh of a platform's devices in effect."""
    device = AbstractDevice(device_kind="some kind", num_cores=None, platform=platform)
    axes = (2, 2, 2), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3
    qkv = [jax.ShapeDtypeStruct((4, 128, 2, 64), dtype)] * 3
    with jax.sharding.use_abstract_mesh(AbstractMesh(*axes, abstract_device=device)):
        return jax.make_jaxpr(functools.partial(attention, implementation=implementation))(*qkv)


@pytest.mark.parametrize(
    ("platform", "implementation", "dtype", "message"),
    [
        ("cpu", "splash", jnp.bfloat16, "splash attention runs on tpu, not on cpu"),
        ("gpu", "splash", jnp.bfloat16, "splash attention runs on tpu, not on gpu"),
        ("tpu", "cudnn", jnp.bfloat16, "cudnn attention runs on gpu, not on tpu"),
        ("gpu", "cudnn", jnp.float32, "cudnn attention computes in bfloat16 or float16, not in float32"),
    ],
)
def test_a_kernel_is_refused_where_it_cannot_run(platform, implementation, dtype, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        on(platform, implementation, dtype)


def test_each_tpu_computes_its_batch_items_and_heads():
    (sharded,) = (e for e in on("tpu", "splash").eqns if e.primitive.name == "shard_map")
    assert [v.aval.shape for v in sharded.params["jaxpr"].outvars] == [(1, 1, 128, 64)]


def divided_over_eight_devices():
    """What a process with eight devices runs for the test below: the largest differences, relative to the values."""
    arrays = normal((4, 140, 2, 8), (4, 9, 2, 8), (4, 9, 2, 8))
    lengths = jnp.array([9, 1, 4, 7])
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    exact = values_and_gradients(functools.partial(xla_attention, key_lengths=lengths), *arrays)
    module.LARGEST_LOGITS = 9 * 4 * 50  # 50 queries at a time of the item and the head that a device has
    for function in (xla_attention, functools.partial(splash_attention, interpret=True)):
        sharding = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None, "tensor"))
        divided = [jax.device_put(x, sharding) for x in arrays]
        with jax.set_mesh(mesh):
            attend = functools.partial(function, key_lengths=lengths)
            results = jax.jit(functools.partial(values_and_gradients, attend))(*divided)
        print(*(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(results, exact, strict=True)))


def test_devices_divide_batch_and_heads():
    program = f"import runpy; runpy.run_path({__file__!r})['divided_over_eight_devices']()"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    differences = [float(difference) for difference in done.stdout.split()]
    assert len(differences) == 2 * 4  # the values and three gradients of each
    assert all(difference < 1e-5 for difference in differences)
