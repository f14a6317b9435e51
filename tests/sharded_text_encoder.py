"""Encodes captions with T5 divided over several devices, and on one; prints how far the results lie apart.

That each of them holds less of the parameters is asserted.

    python -m tests.sharded_text_encoder FOLDER

Six virtual devices of the CPU; a process of its own, since their number is fixed when jax starts.
"""

import sys

import jax
import numpy as np

from tests.conftest import HARBOUR
from zipir_jax import text_encoder
from zipir_jax.config import MeshConfig
from zipir_jax.parallel import make_mesh

CAPTIONS = ["", HARBOUR, "night " * 40, "a boat", "noisy"]


def bytes_held(encoder):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(encoder.params))


def main(folder):
    jax.config.update("jax_num_cpu_devices", 6)
    # For a mesh that is given, so many devices; by itself the encoder takes four of the six, a power of two.
    count = 1
    text_encoder.make_mesh = lambda config, devices=None: make_mesh(config, devices or jax.devices()[:count])
    alone = text_encoder.TextEncoder.load(folder, MeshConfig())
    count = 4
    expected = alone.encode(CAPTIONS)
    for mesh, share in ((None, 0.3), (MeshConfig(fsdp=2, tensor=2), 0.3), (MeshConfig(data=2, fsdp=2), 0.55)):
        encoder = text_encoder.TextEncoder.load(folder, mesh)
        assert encoder.mesh.size == 4
        assert bytes_held(encoder) < share * bytes_held(alone), (
            f"{bytes_held(encoder)} of {bytes_held(alone)}"
        )
        found = encoder.encode(CAPTIONS)
        print(max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True)))


if __name__ == "__main__":
    main(sys.argv[1])
