"""Makes t5.npz: a tiny T5 v1.1 and what transformers' torch T5EncoderModel says to it, for tests/models/test_t5.py.

How to run it: `pip install -e .[parity]`, then `python tests/parity/make_t5.py`. It takes seconds on a CPU.
The stored file was made with torch 2.13.0+cpu, transformers 5.23.0 and numpy 2.4.6 (also written in the file).

It holds "config" (the hub's config.json, as text), "weights/NAME" for each tensor of the model's state dict,
tokens [texts, longest], lengths [texts], embeddings [sum of lengths, width] of the tokens without padding, text after
text, and buckets [2 * FARTHEST + 1]: of the distances -FARTHEST to FARTHEST with 32 buckets up to 128 tokens.
"""

import json
import pathlib

import numpy as np
import torch
import transformers
from transformers.models.t5.modeling_t5 import T5Attention

LENGTHS = (300, 1, 37)  # the longest is beyond max_distance: every bucket is used
FARTHEST = 600  # tokens


def main() -> None:
    config = transformers.T5Config(
        vocab_size=64,
        d_model=16,
        d_kv=16,  # of each head: together they are wider than the model; those of the small size are narrower
        num_heads=2,
        d_ff=24,
        num_layers=3,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
    )
    model = transformers.T5EncoderModel(config).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():  # of such a size that every layer acts
            if "layer_norm" in name:
                values = rng.uniform(0.5, 1.5, tensor.shape)
            elif "embed_tokens" in name or "shared" in name or "relative_attention_bias" in name:
                values = np.random.default_rng(1).standard_normal(
                    tensor.shape
                )  # the first two are one tensor
            else:
                values = rng.standard_normal(tensor.shape) / np.sqrt(tensor.shape[1])
            tensor.copy_(torch.from_numpy(values.astype(np.float32)))
    tokens = rng.integers(3, config.vocab_size, (len(LENGTHS), max(LENGTHS)))
    mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    with torch.no_grad():
        embeddings = model(torch.from_numpy(tokens * mask), torch.from_numpy(mask)).last_hidden_state.numpy()
    distances = torch.arange(-FARTHEST, FARTHEST + 1)
    arrays = {
        "versions": np.array([f"{m.__name__} {m.__version__}" for m in (torch, transformers, np)]),
        "config": np.array(json.dumps(config.to_dict())),
        "tokens": (tokens * mask).astype(np.int32),
        "lengths": np.array(LENGTHS, np.int32),
        "embeddings": embeddings[mask],
        "buckets": T5Attention._relative_position_bucket(distances, True, 32, 128).numpy().astype(np.int8),
    }
    arrays |= {f"weights/{name}": tensor.numpy() for name, tensor in model.state_dict().items()}
    np.savez_compressed(pathlib.Path(__file__).with_name("t5.npz"), **arrays)


if __name__ == "__main__":
    main()
