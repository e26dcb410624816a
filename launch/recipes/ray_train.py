"""Ray Train: launch/train.py's training on Ray's workers, begun again on as many as there are when some go.

    python -m launch.recipes.ray_train --workers 2:16 --run-dir /shared/runs/mine [options of launch/train.py]

All of Ray's nodes have the checkout at the same path, and share --run-dir. A worker per GPU; --cpu trains without.
"""

import argparse
import sys
from pathlib import Path

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from launch.options import read_settings
from launch.train import train

CHECKOUT = Path(__file__).resolve().parents[2]


def train_on_a_worker(config: dict[str, list[str]]) -> None:
    """Train in Ray's process group, which is there already; torchrun's variables are set."""
    train(read_settings(config["options"]), get_device())


def main(arguments: list[str]) -> None:
    """Read the options, and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="1:8", metavar="MIN:MAX", help="how many")
    parser.add_argument("--cpu", action="store_true", help="train without GPUs")
    own, options = parser.parse_known_args(arguments)
    options.append("--requeue")
    settings = read_settings(options)
    assert settings.run_dir is not None
    least, _, most = own.workers.partition(":")
    TorchTrainer(
        train_on_a_worker,
        train_loop_config={"options": [*options, "--run-dir", str(settings.run_dir.resolve())]},
        torch_config=TorchConfig(timeout_s=int(settings.process_group_timeout or 1800)),
        scaling_config=ScalingConfig(num_workers=(int(least), int(most or least)), use_gpu=not own.cpu),
        run_config=RunConfig(
            storage_path=str(settings.run_dir.resolve()),
            failure_config=FailureConfig(max_failures=100),
            worker_runtime_env={"env_vars": {"PYTHONPATH": str(CHECKOUT)}},
        ),
    ).fit()


if __name__ == "__main__":
    main(sys.argv[1:])
