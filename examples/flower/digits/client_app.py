"""Clients that train, compute their Fisher, and send both."""

from flwr.clientapp import ClientApp

from digits.task import Network, client_data, train
from fdcr_fast import diagonal_fisher
from fdcr_fast.integrations.flower import train_reply

app = ClientApp()


@app.train()
def train_model(message, context):
    """One round; the first clients are malicious, which nobody but they knows."""
    client = context.node_config["partition-id"]
    x, y = client_data(client, malicious=client < context.run_config.get("num-malicious", 3))
    model = Network()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loss = train(model, x, y)
    return train_reply(message, model, diagonal_fisher(model, (x, y)), len(x), {"loss": loss}, difference=True)
