"""The same federation twice in NVFlare's simulator, averaged and defended: python examples/nvflare/job.py"""

from fdcr_fast.integrations.nvflare import FDCRAggregator  # first: without NVFlare it says what to install

# isort: split
import json
import sys
import tempfile
from pathlib import Path

import torch
from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import SimEnv

FOLDER = Path(__file__).resolve().parent
TASK = FOLDER.parent / "flower" / "digits" / "task.py"  # data, model and training are those of the other example
sys.path.append(str(TASK.parent))
from task import Network, evaluate  # noqa: E402

CLIENTS = 6


def run(rule, workspace):
    """Train with one rule; the global model at the end."""
    recipe = FedAvgRecipe(
        name=rule,
        model=Network(),
        min_clients=CLIENTS,
        num_rounds=4,
        train_script=str(FOLDER / "client.py"),
        aggregator=FDCRAggregator(rule, max_clients=CLIENTS),
    )
    recipe.add_client_file(str(TASK))
    # NVFlare builds only components that a site's administrator has allowed.
    policy = workspace / rule / "local" / "resources.json"
    policy.parent.mkdir(parents=True)
    policy.write_text(json.dumps({"format_version": 2, "class_allow_list": [*DEFAULT_CLASS_ALLOW_LIST, "fdcr_fast"]}))
    recipe.execute(SimEnv(num_clients=CLIENTS, num_threads=CLIENTS, workspace_root=str(workspace)))
    (saved,) = (workspace / rule).rglob("FL_global_model.pt")
    model = Network()
    model.load_state_dict(torch.load(saved, weights_only=False)["model"])
    return model


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as workspace:
        models = {rule: run(rule, Path(workspace)) for rule in ("FedAvg", "CoalitionFDCR")}
    for rule, model in models.items():
        accuracy, success = evaluate(model)
        print(f"{rule}: accuracy {accuracy:.1%}, attack success rate {success:.1%}", flush=True)
