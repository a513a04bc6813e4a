"""Train a layer whose mask is chosen on the command line, by Hydra.

    python examples/with_hydra/train.py mask.size=16
    python examples/with_hydra/train.py --multirun mask=causal,window,sinks

Each token repeats the one 12 places before it: masks that show it learn that.
"""

import hydra
import torch
from omegaconf import DictConfig
from torch import nn

import attnkit as ak


@hydra.main(config_path="conf", config_name="config", version_base=None)
def main(settings: DictConfig) -> float:
    """Train, and return the loss, which is what Hydra's sweepers look for."""
    torch.manual_seed(settings.seed)
    config = ak.MultiHeadAttentionConfig.model_validate(settings.attention)
    layers = nn.Embedding(16, config.dim), config.build(), nn.Linear(config.dim, 16)
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
    for _ in range(settings.steps):
        tokens = torch.randint(16, (8, 12)).repeat(1, 4)
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).mT, tokens[:, 1:])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    print(f"{config.mask}: loss {loss:.1f}")
    return loss.item()


if __name__ == "__main__":
    main()
