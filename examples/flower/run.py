"""The app in one process that ends, without a SuperLink: python examples/flower/run.py"""

import fdcr_fast.integrations.flower  # noqa: F401  # first: without Flower it says what to install

# isort: split
from digits.client_app import app as client_app
from digits.server_app import app as server_app
from digits.task import CLIENTS
from flwr.simulation import run_simulation

if __name__ == "__main__":
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server_app, client_app, num_supernodes=CLIENTS, backend_config=resources)
