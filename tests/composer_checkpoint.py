"""Composer's Trainer makes the checkpoint that `tests/test_interchange.py` imports, and takes its own next step.

    python -m tests.composer_checkpoint FOLDER

leaves `FOLDER/composer.pt`, as Composer saves it, and `FOLDER/truth.pt`: weights, the gradients of the next step, and
the weights after it.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from tests.composer_client import ComposerClassifier, DataLoader, TensorDataset, composer

HYPER = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=5e-4, amsgrad=True)


def build_layers() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(7, 12), nn.GELU(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3))


def main(folder: Path) -> None:
    model = ComposerClassifier(build_layers(), num_classes=3)
    optimizer = composer.optim.DecoupledAdamW(model.parameters(), **HYPER)
    inputs, labels = torch.randn(24, 7), torch.randint(3, (24,))
    trainer = composer.Trainer(
        model=model,
        optimizers=optimizer,
        schedulers=composer.optim.LinearScheduler(t_max="20ba"),
        train_dataloader=DataLoader(TensorDataset(inputs, labels), batch_size=8),
        max_duration="3ba",
        device="cpu",
        progress_bar=False,
    )
    trainer.fit()
    trainer.save_checkpoint(str(folder / "composer.pt"))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model.module(inputs), labels).backward()
    truth = {
        "weights": {name: t.clone() for name, t in model.module.state_dict().items()},
        "grads": {name: p.grad.clone() for name, p in model.module.named_parameters()},
    }
    optimizer.step()
    torch.save(truth | {"next": {n: t.clone() for n, t in model.module.state_dict().items()}}, folder / "truth.pt")
    trainer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
