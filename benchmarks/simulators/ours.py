"""This library: ``ours.py DATA ROUNDS THREADS CLIENTS PRECISION SERVER WORKERS``.

With no DATA there yet, SERVER is its task.
"""

from pathlib import Path

import numpy as np
import task
import torch

import fdcr_fast
from fdcr_fast.sim import FederatedData, SimulationConfig
from fdcr_fast.sim.clients.work import LocalWork
from fdcr_fast.sim.costs import Stopwatch
from fdcr_fast.sim.parts import Given, Parts
from fdcr_fast.sim.run.federation import Federation


def write_data(path: Path, name: str) -> None:
    made = task.TASKS[name]
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(made.classes, (made.clients, made.samples), generator=generator)
    if name == "cnn":
        images, labels = of_fashion_mnist(made)
    elif len(made.shape) == 1:
        images = torch.randint(256, (*labels.shape, *made.shape), generator=generator)
    else:
        images = torch.randn(*labels.shape, *made.shape, generator=generator)
    np.savez(path, images=images.numpy(), labels=labels.numpy(), task=np.array(name))


def of_fashion_mnist(made: task.Task) -> tuple[torch.Tensor, torch.Tensor]:
    config = SimulationConfig(
        dataset="fashion-mnist",
        clients=made.clients,
        split="dirichlet-mix",
        samples_per_client=made.samples,
        malicious=0,
        attack="none",
    )
    data = Federation(config).data
    clients = [data[client] for client in range(made.clients)]
    images = torch.stack([client.images[client.indices] for client in clients]).contiguous()
    return images, torch.stack([client.labels[client.indices] for client in clients])


def main() -> None:
    path, server, workers = Path(task.ARGUMENTS[0]), task.ARGUMENTS[5], int(task.ARGUMENTS[6])
    if not path.exists():
        write_data(path, server)
        return
    task.use_threads()
    images, labels = map(torch.from_numpy, task.load())
    made = task.current(str(path))
    data = FederatedData(train=list(zip(images, labels, strict=True)), test=(images[0], labels[0]))
    config = SimulationConfig(
        clients=len(images),
        min_samples=1,
        malicious=0,
        attack="none",
        server=server,
        model=made.model,
        fishers="needed",
        local_epochs=1,
        batch_size=made.batch,
        lr=made.lr,
        precision=task.ARGUMENTS[4],
        momentum=task.MOMENTUM,
        weight_decay=task.WEIGHT_DECAY,
        workers=workers,
    )
    federation = Federation(config, parts=Parts.of(config, Given(data=data)))
    params, round = federation.initial_params, 0

    def one_round(count: int) -> None:
        nonlocal params, round
        round += 1
        federation.config = config.model_copy(update={"participants": count})
        federation.collect(LocalWork(federation.config, federation.classifier, Stopwatch(), round, params, None))
        params = federation.rule.aggregate(params, federation.store).params

    try:
        task.time_rounds(f"fdcr_fast {fdcr_fast.__version__}, torch {torch.__version__}", one_round)
    finally:
        federation.close()


if __name__ == "__main__":
    main()
