"""Every error message is quoted by a test: one that triggers it, here where one call on one rank does.

A message is what an exception of the package is made from, as it stands in the source. A test quotes it that has 12
letters of it in a row, or all between two values, in a text of its own.
"""

import ast
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sharded_dadamw
from sharded_dadamw import DecoupledAdamW, ShardedDecoupledAdamW, ShardingConfig
from sharded_dadamw.checkpoint import save_checkpoint
from sharded_dadamw.interchange import from_torch
from sharded_dadamw.layout.param_groups import weight_decay_groups
from sharded_dadamw.plan import plan

PACKAGE = Path(sharded_dadamw.__file__).parent
SHORTEST, LONG = 8, 12
"""Letters of a message that can be told from others, and how many in a row make a quotation."""


def optimizer(**arguments: Any) -> Any:
    return ShardedDecoupledAdamW([("a", nn.Parameter(torch.ones(3)))], **arguments)


def adamw(group: dict[str, Any] | None = None, state: Any = None) -> dict[str, Any]:
    """A state dict of torch's AdamW for one parameter."""
    param = nn.Parameter(torch.ones(3))
    theirs = torch.optim.AdamW([param], lr=1e-3)
    param.grad = torch.ones(3)
    theirs.step()
    found: dict[str, Any] = theirs.state_dict()
    found["param_groups"][0].update(group or {})
    if state is not None:
        found["state"][0] = state if not isinstance(state, dict) else found["state"][0] | state
    return found


def without(key: str) -> dict[str, Any]:
    found = adamw()
    del found["param_groups"][0][key]
    return found


def sparse_step(cls: Any) -> None:
    param = nn.Parameter(torch.ones(3, 3))
    ours = cls([("a", param)])
    param.grad = torch.ones(3, 3).to_sparse()
    ours.step()


def plan_of(config: dict[str, Any]) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(config, file)
        file.flush()
        plan(file.name, ranks=2)


MESSAGES: dict[str, Callable[[], Any]] = {
    "bucket_cap_mb: expected a number of MiB, got 'big'": lambda: ShardingConfig(bucket_cap_mb="big"),  # type: ignore[arg-type]
    "bucket_cap_mb: expected a finite number > 0 (MiB), got nan": lambda: ShardingConfig(bucket_cap_mb=float("nan")),
    "overlap: expected True or False, got 1": lambda: ShardingConfig(overlap=1),  # type: ignore[arg-type]
    "moments: expected one of Moments.FP32": lambda: ShardingConfig(moments="bf16"),  # type: ignore[arg-type]
    "config: expected settings among bucket_cap_mb": lambda: ShardingConfig.of({"buckets": 1}),
    "lr: expected a float or a tensor of one element, got one of 2": lambda: optimizer(lr=torch.ones(2)),
    "betas: expected two numbers in [0, 1), got (0.9,)": lambda: optimizer(betas=(0.9,)),
    "weight_decay: expected a finite number >= 0, got -1.0": lambda: optimizer(weight_decay=-1.0),
    "initial_lr: expected a finite number >= 0, got -1.0": lambda: ShardedDecoupledAdamW(
        [{"params": [nn.Parameter(torch.ones(3))], "initial_lr": -1.0}]
    ),
    "maximize: expected False, got True; decoupled AdamW does not have this switch": lambda: ShardedDecoupledAdamW(
        [{"params": [nn.Parameter(torch.ones(3))], "maximize": True}]
    ),
    "metrics_in_step: expected True or False, got 1": lambda: optimizer(metrics_in_step=1),
    "expected memory, got a meta tensor; materialise the model": lambda: ShardedDecoupledAdamW(
        [nn.Parameter(torch.ones(3, device="meta"))]
    ),
    "expected a dense tensor, got layout torch.sparse_coo; build embeddings with sparse=False": lambda: sparse_step(
        ShardedDecoupledAdamW
    ),
    "gradient of a: expected a dense tensor, got layout": lambda: sparse_step(DecoupledAdamW),
    "odd: expected a dtype of (torch.float32, torch.bfloat16": lambda: ShardedDecoupledAdamW(
        [("odd", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))]
    ),
    "process_group: expected a ProcessGroup, a DeviceMesh or None, got 'gloo'": lambda: optimizer(process_group="gloo"),
    "parameters per group: expected [1], got [2]": lambda: optimizer().load_state_dict(
        ShardedDecoupledAdamW([nn.Parameter(torch.ones(3)) for _ in range(2)]).state_dict()
    ),
    "step: expected a whole number from 0 on, got -1": lambda: save_checkpoint(
        "nowhere", step=-1, model=(model := nn.Linear(2, 2)), optimizer=DecoupledAdamW(model.parameters())
    ),
    "expected the fields of llama, got none called": lambda: plan_of({"model_type": "llama"}),
    "multipliers['a'] has one of lr: give lr= as well, which it multiplies": lambda: weight_decay_groups(
        nn.Linear(2, 2), 1e-5, multipliers={"a": {"lr": 2.0}}
    ),
    "param_groups[0]: expected AdamW with bias correction, got one without": lambda: from_torch(
        adamw({"bias_correction": False}), ["a"]
    ),
    "param_groups[0]: expected the hyperparameters of AdamW, got a group without eps": lambda: from_torch(
        without("eps"), ["a"]
    ),
    "param_groups[0]: expected initial_lr beside an lr of 0, got none": lambda: from_torch(adamw({"lr": 0.0}), ["a"]),
    "expected as many parameters as the state has, 1, got 2 names": lambda: from_torch(adamw(), ["a", "b"]),
    "expected names for the 1 parameters, which this state dict only numbers": lambda: from_torch(adamw()),
    "state of a: expected a dict of tensors, got list": lambda: from_torch(adamw(state=[1]), ["a"]),
    "state of a: expected AdamW's exp_avg": lambda: from_torch(adamw(state={"momentum": torch.ones(3)}), ["a"]),
    "state of a, exp_avg_sq: expected a tensor of numbers, got 1": lambda: from_torch(
        adamw(state={"exp_avg_sq": 1}), ["a"]
    ),
    "state of a: expected the parameter's shape [4], got [3]": lambda: from_torch(adamw(), [("a", torch.ones(4))]),
    "model: expected one of": lambda: plan("a model of mine", ranks=2),
    "gpu: expected one of": lambda: plan(nn.Linear(64, 64), ranks=2, gpu="a gpu of mine"),
    "mfu: expected a number above 0 and up to 1, got 2": lambda: plan(nn.Linear(64, 64), ranks=2, mfu=2.0),
    "ranks: expected a multiple of the 8 ranks per host, or fewer, got 12": lambda: plan(nn.Linear(64, 64), ranks=12),
    "mesh: expected replicas x shards = 8 ranks, got 3 x 3": lambda: plan(nn.Linear(64, 64), ranks=8, mesh=(3, 3)),
    "mesh: expected rows that fill hosts of 8 ranks or divide them, got 6 shards": lambda: plan(
        nn.Linear(64, 64), ranks=24, mesh=(4, 6)
    ),
}


@pytest.mark.parametrize("said", MESSAGES)
def test_each_says_what_was_expected_and_what_came(said: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=re.escape(said)):
        MESSAGES[said]()


def text_of(node: ast.expr) -> str:
    """The literal text of an expression, with line ends where values go."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "\n"


def messages() -> Iterator[tuple[str, str]]:
    """Where an exception is made, and from what text, if it has enough of its own."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args and ast.unparse(node.func).endswith("Error"):
                text = text_of(node.args[-1])
                if max(map(len, text.split("\n"))) >= SHORTEST:
                    yield f"{path.relative_to(PACKAGE)}:{node.lineno}", text


def without_common_words(text: str) -> str:
    return re.sub(r"expected |, got | cannot be ", "\n", text)


def quoted() -> str:
    """All texts in tests, as they read: without what only a regular expression has."""
    texts: set[str] = set()
    for path in Path(__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value.replace("\\", ""))
    return without_common_words("\n".join(texts))


def is_quoted(message: str, texts: str) -> bool:
    pieces = [piece for piece in without_common_words(message).split("\n") if len(piece) >= SHORTEST]
    starts = [(piece, start) for piece in pieces for start in range(max(1, len(piece) - LONG + 1))]
    return not pieces or any(piece[start : start + LONG] in texts for piece, start in starts)


def test_every_message_is_quoted_by_a_test() -> None:
    texts = quoted()
    missing = {where: text for where, text in messages() if not is_quoted(text, texts)}
    unknown = {where: text for where, text in missing.items() if not any(each in text for each in OF_DAMAGE)}
    assert not unknown, unknown
    assert all(any(each in text for text in missing.values()) for each in OF_DAMAGE), "some are quoted by now"


OF_DAMAGE = (
    *("a copy here", "process run", "an entry c", "which file", "strided ten", "what a tens"),
    *("of entries", "latin1 tex", "holds data"),
)
"""Messages of damaged files, all of which test_checkpoint_faults damages, and of ranks that cannot share memory."""
