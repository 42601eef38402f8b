"""Flower's simulation: its Ray backend with one core per client, and its FedAvg."""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import flwr
import ray
import task
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.app import Message as Reply
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

client_app, server_app = ClientApp(), ServerApp()
path, precision = task.ARGUMENTS[0], task.ARGUMENTS[4]  # Ray's processes have arguments of their own
data = {}
laps, weights = task.Laps(), []


@client_app.train()
def train(message, context):
    torch.set_num_threads(1)
    if not data:
        data["images"], data["labels"] = map(torch.from_numpy, task.load(path))
    client = int(context.node_config["partition-id"])
    model = task.model(path)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = task.sgd(model, path)
    x, y = data["images"][client], data["labels"][client]
    for batch in torch.randperm(len(y)).split(task.current(path).batch):
        optimizer.zero_grad()
        with task.autocast(precision):
            loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(y)})}
    return Reply(content=RecordDict(content), reply_to=message)


def after_round(round, arrays):
    laps()
    weights.append(torch.cat([x.float().flatten() for x in arrays.to_torch_state_dict().values()]))
    assert round == 0 or not torch.equal(*weights[-2:]), "the clients have failed"


class FewAtFirst(FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        clients = len(task.load()[1])
        self.fraction_train = task.in_round(server_round - 1) / clients
        return super().configure_train(server_round, arrays, config, grid)


@server_app.main()
def main(grid, context):
    strategy = FewAtFirst(fraction_evaluate=0.0)
    arrays = ArrayRecord(task.model().state_dict())
    strategy.start(grid, arrays, num_rounds=task.rounds() + 1, evaluate_fn=after_round)


if __name__ == "__main__":
    clients = len(task.load()[1])
    run_simulation(
        server_app,
        client_app,
        num_supernodes=clients,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"log_to_driver": False}},
    )
    assert len(laps.seconds) == task.rounds() + 1, "the server has failed"
    task.report(f"Flower {flwr.__version__}, Ray {ray.__version__}, torch {torch.__version__}", laps.seconds[1:])
