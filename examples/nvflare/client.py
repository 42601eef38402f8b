"""A client's script: trains, computes its Fisher, and sends both."""

import argparse

import nvflare.client as flare
import torch
from task import Network, client_data, train

from fdcr_fast import diagonal_fisher
from fdcr_fast.integrations.nvflare import train_result


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-malicious", type=int, default=2)
    parser.add_argument("--num-clients", type=int, default=6)
    arguments = parser.parse_args()
    flare.init()
    client = int(flare.get_site_name().removeprefix("site-")) - 1
    malicious = client < arguments.num_malicious  # nobody but the client itself knows
    x, y = client_data(client, malicious, arguments.num_clients)
    while flare.is_running():
        model = Network()
        model.load_state_dict({name: torch.as_tensor(v) for name, v in flare.receive().params.items()})
        loss = train(model, x, y)
        flare.send(train_result(model, diagonal_fisher(model, (x, y)), len(x), {"loss": loss}))


if __name__ == "__main__":
    main()
