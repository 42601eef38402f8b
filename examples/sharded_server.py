"""A server of several processes, each with some of the parameters of all clients:

torchrun --standalone --nproc-per-node 2 examples/sharded_server.py
"""

import torch
import torch.distributed as dist

from fdcr_fast import FDCR, ParamShard, UpdateStore, shard_range

CLIENTS, ATTACKERS, PARAMS = 20, 4, 300_000


def client_upload(client, world):
    """What a client does: it cuts its update and its Fisher and sends each process of the server its part."""
    generator = torch.Generator().manual_seed(client)
    update = 0.01 * torch.randn(PARAMS, generator=generator)
    if client < ATTACKERS:
        update += 0.05 * torch.randn(PARAMS, generator=torch.Generator().manual_seed(99))
    fisher = torch.rand(PARAMS, generator=generator)
    parts = [shard_range(PARAMS, rank, world) for rank in range(world)]
    return [{"update": update[part], "fisher": fisher[part], "num_samples": 50} for part in parts]


def serve(group=None):
    """What each process of the server does; returns who was aggregated, and all new parameters."""
    shard = ParamShard(PARAMS, group)
    store = UpdateStore(len(shard), CLIENTS)
    for client in range(CLIENTS):  # in whatever way the uploads arrive
        store.put(**client_upload(client, shard.world)[shard.rank], client_id=f"client-{client}")
    global_params = torch.zeros(len(shard))  # this process's part of them
    result = FDCR(cluster="kmeans").aggregate(global_params, store, shard=shard)
    if shard.rank == 0:
        dropped = result.dropped_clients
        print(f"{shard.world} processes; dropped: {dropped}; rejected: {result.rejected}")
    return result.kept, shard.gather(result.params)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    serve()
    dist.destroy_process_group()
