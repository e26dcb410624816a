"""Parameter groups by names and kinds of modules, and configs as YAML spells them out."""

from typing import Any

import pytest
import torch
from torch import nn

from sharded_dadamw import (
    DecoupledAdamW,
    Exchange,
    GradientResidency,
    ShardedDecoupledAdamW,
    ShardingConfig,
    weight_decay_groups,
)


def build() -> nn.ModuleDict:
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(5, 4),
            "hidden": nn.Linear(4, 4),
            "norm": nn.LayerNorm(4),
            "frozen": nn.Linear(4, 4),
            "head": nn.Linear(4, 5, bias=False),
        }
    )
    model["head"].weight = model["embedding"].weight
    model["frozen"].requires_grad_(False)
    return model


def names(groups: list[dict[str, Any]]) -> list[list[str]]:
    return [[name for name, _ in group["params"]] for group in groups]


def test_matrices_decay_and_the_rest_does_not_and_a_tied_weight_is_there_once() -> None:
    groups = weight_decay_groups(build(), 1e-4)
    assert names(groups) == [["embedding.weight", "hidden.weight"], ["hidden.bias", "norm.weight", "norm.bias"]]
    assert [group["weight_decay"] for group in groups] == [1e-4, 0.0]
    assert all("lr" not in group for group in groups)
    for optimizer in (DecoupledAdamW(groups), ShardedDecoupledAdamW(weight_decay_groups(build(), 1e-4))):
        assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0.0]


def test_kinds_of_modules_and_patterns_do_not_decay_and_multiply() -> None:
    groups = weight_decay_groups(
        build(),
        1e-4,
        no_decay=[nn.Embedding, "hidden.w*"],
        decay_vectors=True,
        lr=0.1,
        multipliers={"norm.bias": {"lr": 0.5, "weight_decay": 3.0}, "norm.*": {"weight_decay": 2.0}},
    )
    assert names(groups) == [["embedding.weight", "hidden.weight"], ["hidden.bias"], ["norm.weight"], ["norm.bias"]]
    assert [group["weight_decay"] for group in groups] == pytest.approx([0.0, 1e-4, 2e-4, 3e-4])
    assert [group["lr"] for group in groups] == pytest.approx([0.1, 0.1, 0.1, 0.05])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"no_decay": ["haed.*"]}, r"'haed\.\*' fits no trainable parameter"),
        ({"no_decay": [nn.Conv2d]}, "Conv2d fits no trainable parameter"),
        ({"no_decay": ["frozen.*"]}, "fits no trainable parameter"),
        ({"multipliers": {"norm.*": {"weight_decay": 2.0}, "norm.bias": {"weight_decay": 3.0}}}, "earlier pattern"),
        ({"multipliers": {"norm.*": {"lr": 2.0}}}, "has one of lr: give lr= as well, which it multiplies"),
        ({"multipliers": {"norm.*": {"wd": 2.0}}}, "expected lr or weight_decay, got wd"),
    ],
)
def test_what_fits_nothing_or_means_nothing_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weight_decay_groups(build(), 1e-4, **options)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="trainable parameters"):
        weight_decay_groups(build().requires_grad_(False), 1e-4)


def test_a_config_may_be_a_mapping_of_names() -> None:
    settings = {
        "gradient_residency": "sharded",
        "exchange": Exchange.BACKEND,
        "wire_dtype": "bfloat16",
        "overlap": False,
    }
    expected = ShardingConfig(
        gradient_residency=GradientResidency.SHARDED,
        exchange=Exchange.BACKEND,
        wire_dtype=torch.bfloat16,
        overlap=False,
    )
    assert ShardingConfig.of(settings) == expected
    assert ShardedDecoupledAdamW(build().parameters(), config=settings).config == expected
    assert ShardingConfig.of(None) == ShardingConfig()
