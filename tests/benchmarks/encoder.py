"""The encoder alone against the machine's matrix rate: FLOP/s of real tokens as a share of the best matrix product's.

Same dtype, same threads, same run. The FLOPs are those of the texts' own tokens (padding counts for nothing): the
linear layers and the two products of attention, multiplications and additions.
"""

from typing import Any

import numpy as np

from tests.benchmarks import prepare
from tests.benchmarks.measure import Found, Given, Line, in_turn, matmul_rate, seconds

LEAST, AIM = 0.45, 0.60


def flops(config: Any, lengths: np.ndarray) -> float:
    """Of one forward pass over texts of these lengths."""
    width, tokens, pairs = config.hidden_size, float(lengths.sum()), float((lengths.astype(float) ** 2).sum())
    linear = 2 * tokens * (4 * width**2 + 2 * width * config.intermediate_size)
    return config.num_hidden_layers * (linear + 4 * pairs * width)


def run(given: Given) -> Found:
    import torch

    from pplug.encoder import EncoderConfig, TextEncoder, default_batch_tokens

    torch.set_num_threads(given.threads)
    population = prepare.ingested(given.folder, prepare.people(given))
    texts = population.texts()[: given.size(600, 60)]
    encoder = TextEncoder(EncoderConfig())
    lengths = np.array([len(ids) for ids in encoder.tokenize(texts)])
    work = flops(encoder.model.config, lengths)
    encoder.encode(texts[:200])
    sides = {
        "encoder": lambda: work / seconds(lambda: encoder.encode(texts)) / 1e9,
        "matrix products": lambda: matmul_rate(encoder.dtype) / 1e9,
    }
    found = in_turn(sides, given.rounds)
    dtype = str(encoder.dtype).removeprefix("torch.")
    line = Line("the encoder alone", f"matrix products in {dtype}", "GFLOP/s", *found.values(), least=LEAST, aim=AIM)
    config = {"data": population.data, "texts": len(texts), "tokens a text": round(float(lengths.mean()), 1),
              "encoder": encoder.config.model, "dtype": dtype,
              "batch_tokens": default_batch_tokens(encoder.device, encoder.dtype, encoder.config.max_tokens),
              "threads": given.threads}  # fmt: skip
    return Found([line], config)
