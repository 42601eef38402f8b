"""pfl-research: its FederatedAveraging with the simulated backend in one process."""

import itertools

import pfl
import pfl.version
import task
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import HyperParam, NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel

task.use_threads()
images, labels = map(torch.from_numpy, task.load())


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = task.model()

    def forward(self, inputs):
        return self.model(inputs)

    def loss(self, inputs, targets, eval=False):
        return torch.nn.functional.cross_entropy(self(inputs), targets)

    def metrics(self, inputs, targets, eval=False):
        return {}


class Lap(TrainingProcessCallback):
    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        laps()
        return False, Metrics()


class Cohort(HyperParam):
    def value(self):
        return task.in_round(laps.calls)


laps = task.Laps()
network, current = Network(), task.current(task.ARGUMENTS[0])
users = itertools.cycle(range(len(images)))
dataset = FederatedDataset(lambda user: Dataset([images[user], labels[user]]), lambda: next(users))
model = PyTorchModel(
    network,
    lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=task.MOMENTUM, weight_decay=task.WEIGHT_DECAY),
    torch.optim.SGD(network.parameters(), lr=1.0),
)
FederatedAveraging().run(
    NNAlgorithmParams(
        central_num_iterations=task.rounds() + 1,
        evaluation_frequency=10**9,
        train_cohort_size=Cohort(),
        val_cohort_size=0,
    ),
    SimulatedBackend(dataset, dataset),
    model,
    NNTrainHyperParams(local_batch_size=current.batch, local_num_epochs=1, local_learning_rate=current.lr),
    NNEvalHyperParams(local_batch_size=1024),
    callbacks=[Lap()],
)
task.report(f"pfl {pfl.version.__version__}, torch {torch.__version__}", laps.seconds)
