"""LLM Foundry: a tiny MPT, by settings as a YAML file has them; Composer trains it under DDP.

torchrun --nproc-per-node 2 -m launch.stacks.llm_foundry
"""

import os
from typing import Any

from composer.core import DataSpec
from composer.utils import dist
from composer.utils.reproducibility import seed_all
from llmfoundry import registry
from llmfoundry.command_utils import train
from llmfoundry.models import ComposerMPTCausalLM
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader

from launch.stacks import common

SIZES = {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": common.CONTEXT, "vocab_size": 256}
MODEL = SIZES | {"attn_config": {"attn_impl": "torch"}, "loss_fn": "torch_crossentropy"}
OURS = common.OURS | {"param_groups": [{"param_str_match": "norm|bias", "weight_decay": 0.0}]}
SETTINGS: dict[str, Any] = {
    "seed": 17,
    "model": {"name": "mpt_causal_lm"} | MODEL,
    "tokenizer": {},
    "optimizer": {"name": "sharded_decoupled_adamw"} | OURS,
    "scheduler": {"name": "linear_decay_with_warmup", "t_warmup": f"{common.WARMUP}ba", "alpha_f": 0.0},
    "algorithms": {"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": common.MAX_NORM}},
    "train_loader": {"name": "windows"},
    "max_seq_len": common.CONTEXT,
    "max_duration": f"{common.STEPS}ba",
    "device_train_microbatch_size": common.BATCH,
    "device_eval_batch_size": common.BATCH,
    "precision": "fp32",
    "save_interval": f"{common.SAVE_AT}ba",
    "save_overwrite": True,
}


def build() -> nn.Module:
    """The model, as LLM Foundry builds it."""
    seed_all(17)
    return ComposerMPTCausalLM(**MODEL)


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """As Composer has it."""
    return model.loss(model(batch), batch)


def factor(step: int) -> float:
    """Composer's schedules are a step late."""
    return common.factor(max(step - 1, 0))


def windows(device_batch_size: int, **_: Any) -> DataSpec:
    """The items in their order, so that the control can follow."""
    items = common.Items()
    return DataSpec(DataLoader(items, device_batch_size, sampler=dist.get_sampler(items, shuffle=False)))


def main() -> None:
    """Train."""
    options = common.options()
    os.environ.setdefault("NODE_RANK", "0")  # Composer wants it, and torchrun does not set it
    registry.dataloaders.register("windows", func=windows)
    batch = options.micro_batches * common.BATCH * dist.get_world_size()
    more = {"global_train_batch_size": batch, "save_folder": str(options.folder)}
    if options.resume:
        more["load_path"] = str(options.folder / f"ep0-ba{common.SAVE_AT}-rank0.pt")
    trainer = train(OmegaConf.create(SETTINGS | more))
    common.keep(options.folder, trainer.state.model, [])


if __name__ == "__main__":
    main()
