"""DeepSpeed as a client: makes the checkpoints that `tests/test_interchange.py` imports, with what they should hold.

`train_all` leaves for every run of `RUNS` a folder of its name, as DeepSpeed saves it, and a file: the state and the
fp32 weights as DeepSpeed's own functions tell them, the averaged gradients of the next step, and the weights after it.
With round robin these functions of DeepSpeed 0.19.8 tell those of other parameters; it should not change the results.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MODULES = ["deepspeed", "torch._inductor.compile_fx"]
"""What ranks should find imported: it, and what it imports late."""
HYPER: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
WEIGHT_DECAY = 0.1
NUM_STEPS = 3


@dataclass(frozen=True)
class Run:
    """One training run with DeepSpeed."""

    ranks: int
    stage: int
    dtype: torch.dtype
    amsgrad: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # of DeepSpeed's configuration


_SUM_IN_FP32 = {"data_types": {"grad_accum_dtype": "fp32"}}
_ROUND_ROBIN = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
RUNS = {
    "stage 1, fp32, 1 rank": Run(1, 1, torch.float32),
    "stage 1, fp32, 2 ranks": Run(2, 1, torch.float32, amsgrad=True),
    "stage 1, bf16 summed in fp32, 2 ranks": Run(2, 1, torch.bfloat16, options=_SUM_IN_FP32),
    "stage 2, bf16, 2 ranks": Run(2, 2, torch.bfloat16),
    "stage 2, bf16 round robin, 2 ranks": Run(2, 2, torch.bfloat16, options=_ROUND_ROBIN),
}


class Tied(nn.Module):
    """Odd sizes, an embedding tied to the head, and a frozen parameter in the middle."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 7)
        self.norm = nn.LayerNorm(7)
        self.norm.weight.requires_grad_(False)
        self.back = nn.Linear(7, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.hidden(self.embedding(tokens))))
        return self.head(self.back(hidden)) * self.scale


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not; so the groups' order is not that of the model."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
    ]


def train(name: str, rank: int, folder: Path) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state

    run = RUNS[name]
    model = Tied()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1e9,
        "zero_optimization": {"stage": run.stage},
        "bf16": {"enabled": run.dtype is torch.bfloat16},
        **run.options,
    }
    optimizer = torch.optim.AdamW(groups_of(model), amsgrad=run.amsgrad, **HYPER)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]

    def backward(step: int) -> None:
        tokens = torch.randint(11, (4,), generator=torch.Generator().manual_seed(10 * step + rank))
        engine.backward(engine(tokens).float().square().mean())

    for step in range(NUM_STEPS):
        backward(step)
        engine.step()
    engine.optimizer._hp_optimizer_states_linked = False  # it links them ahead of the first step, when there are none
    engine.optimizer._lazy_init_hp_params_optimizer_state()
    kinds = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * run.amsgrad
    truth: dict[str, Any] = {
        "state": {n: {kind: safe_get_full_optimizer_state(p, kind) for kind in kinds} for n, p in named},
        "fp32": {n: safe_get_full_fp32_param(p) for n, p in named},
        "weights": {n: t.clone() for n, t in model.state_dict().items()},
    }
    truth = _copied(truth)
    engine.save_checkpoint(str(folder / name), tag="newest")
    backward(NUM_STEPS)
    if run.options is not _ROUND_ROBIN:
        truth["grads"] = _copied({n: safe_get_full_grad(p) for n, p in named})
    engine.step()
    truth["next"] = _copied({n: safe_get_full_fp32_param(p) for n, p in named})
    if rank == 0:
        torch.save(truth, folder / f"{name}.pt")


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value.detach().clone()


def compile_nothing() -> None:
    """DeepSpeed would compile what it sends by, for a minute."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def train_all(folder: Path) -> None:
    """As one rank, all runs on as many ranks as there are."""
    import deepspeed

    compile_nothing()
    deepspeed.init_distributed("gloo")
    for name, run in RUNS.items():
        if run.ranks == torch.distributed.get_world_size():
            train(name, torch.distributed.get_rank(), folder)
    torch.distributed.destroy_process_group()
