"""FedJAX: its federated averaging, compiled by XLA, on one device."""

import json
import sys
import time
from importlib.metadata import version

import fedjax
import jax
import numpy as np
from fedjax.algorithms import fed_avg
from jax.example_libraries import stax

BATCH, LR, MOMENTUM, WEIGHT_DECAY = 64, 0.01, 0.9, 1e-5  # as in task.py, which needs torch

with np.load(sys.argv[1]) as arrays:
    images, labels = arrays["images"].transpose(0, 1, 3, 4, 2), arrays["labels"].astype(np.int32)
rounds = int(sys.argv[2])

layers = [stax.Conv(6, (5, 5)), stax.MaxPool((2, 2), strides=(2, 2)), stax.Relu]
layers += [stax.Conv(16, (5, 5)), stax.MaxPool((2, 2), strides=(2, 2)), stax.Relu, stax.Flatten]
for width in (120, 84, 84):
    layers += [stax.Dense(width), stax.Relu]
initialise, apply = stax.serial(*layers, stax.Dense(256), stax.Dense(10))
_, params = initialise(jax.random.PRNGKey(0), (-1, 28, 28, 1))
assert sum(x.size for x in jax.tree_util.tree_leaves(params)) == 75046  # as many as the others' model


def loss(params, batch, rng):
    return -jax.nn.log_softmax(apply(params, batch["x"]))[np.arange(len(batch["y"])), batch["y"]].mean()


def gradient(params, batch, rng):
    grads = jax.grad(loss)(params, batch, rng)
    return jax.tree_util.tree_map(lambda g, p: g + WEIGHT_DECAY * p, grads, params)


algorithm = fed_avg.federated_averaging(
    gradient,
    fedjax.optimizers.sgd(LR, momentum=MOMENTUM),
    fedjax.optimizers.sgd(1.0),
    fedjax.ShuffleRepeatBatchHParams(batch_size=BATCH, num_epochs=1, seed=0),
)
datasets = [fedjax.ClientDataset({"x": x, "y": y}) for x, y in zip(images, labels, strict=True)]
state, seconds = algorithm.init(params), []
for _ in range(rounds + 1):  # the first compiles
    start = time.perf_counter()
    state, _ = algorithm.apply(state, [(i, data, jax.random.PRNGKey(i)) for i, data in enumerate(datasets)])
    jax.block_until_ready(state.params)
    seconds.append(time.perf_counter() - start)
print("\n" + json.dumps({"version": f"FedJAX {version('fedjax')}, JAX {jax.__version__}", "seconds": seconds[1:]}))
