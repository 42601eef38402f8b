"""The same federation twice: averaged, and defended."""

from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp

from digits.task import CLIENTS, Network, evaluate
from fdcr_fast import CoalitionFDCR, FedAvg
from fdcr_fast.integrations.flower import FDCRStrategy

app = ServerApp()


@app.main()
def main(grid, context):
    """Run both servers and print what happened."""
    lines = []
    for rule in (FedAvg(), CoalitionFDCR()):
        strategy = FDCRStrategy(rule, fraction_evaluate=0.0, min_available_nodes=CLIENTS)
        initial = ArrayRecord(Network().state_dict())
        result = strategy.start(grid, initial, num_rounds=context.run_config.get("num-rounds", 6))
        model = Network()
        model.load_state_dict(result.arrays.to_torch_state_dict())
        accuracy, success = evaluate(model)
        dropped = [int(metrics["num-dropped"]) for metrics in result.train_metrics_clientapp.values()]
        lines.append(
            f"{type(rule).__name__}: accuracy {accuracy:.1%}, attack success rate {success:.1%}, dropped {dropped}"
        )
    print(*lines, sep="\n", flush=True)
