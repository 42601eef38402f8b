"""This library: ``ours.py DATA ROUNDS THREADS SERVER WORKERS``. With DATA that is not there, it is made."""

from pathlib import Path

import numpy as np
import task
import torch

import fdcr_fast
from fdcr_fast.sim import SimulationConfig
from fdcr_fast.sim.clients.work import LocalWork
from fdcr_fast.sim.costs import Stopwatch
from fdcr_fast.sim.run.federation import Federation

CLIENTS, SAMPLES = 200, 50


def config(server: str, workers: int) -> SimulationConfig:
    return SimulationConfig(
        dataset="fashion-mnist",
        clients=CLIENTS,
        split="dirichlet-mix",
        samples_per_client=SAMPLES,
        malicious=0,
        attack="none",
        server=server,
        fishers="needed",
        local_epochs=1,
        batch_size=task.BATCH,
        lr=task.LR,
        momentum=task.MOMENTUM,
        weight_decay=task.WEIGHT_DECAY,
        max_test_samples=100,
        workers=workers,
    )


def write_data(path: Path) -> None:
    data = Federation(config("fedavg", 1)).data
    clients = [data[client] for client in range(CLIENTS)]
    images = torch.stack([client.images[client.indices] for client in clients]).contiguous()
    labels = torch.stack([client.labels[client.indices] for client in clients])
    np.savez(path, images=images.numpy(), labels=labels.numpy())


def main() -> None:
    path, server, workers = Path(task.ARGUMENTS[0]), task.ARGUMENTS[3], int(task.ARGUMENTS[4])
    if not path.exists():
        write_data(path)
        return
    task.use_threads()
    federation = Federation(config(server, workers))
    params, round = federation.initial_params, 0

    def one_round() -> None:
        nonlocal params, round
        round += 1
        federation.collect(LocalWork(federation.config, federation.classifier, Stopwatch(), round, params, None))
        params = federation.rule.aggregate(params, federation.store).params

    try:
        task.time_rounds(f"fdcr_fast {fdcr_fast.__version__}, torch {torch.__version__}", one_round)
    finally:
        federation.close()


if __name__ == "__main__":
    main()
