"""Parameters, models and gradients that several test modules train."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Groups = list[dict[str, Any]]  # parameter groups of (name, parameter) pairs, as torch.optim takes them
Make = Callable[..., nn.Parameter]

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16


def _transposed(make: Make) -> Groups:
    def transpose(p: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(p.detach().transpose(0, 1))

    images = make((2, 3, 4, 5), F32).detach().contiguous(memory_format=torch.channels_last)
    strided = make((9, 10), F32).detach()[:, ::2]
    params = [
        ("t", transpose(make((5, 13), F32))),
        ("plain", make((6, 7), F32)),
        ("t16", transpose(make((8, 3), BF16))),
        ("channels_last", nn.Parameter(images)),
        ("strided", nn.Parameter(strided)),
    ]
    return [{"params": params}]


def _frozen(make: Make) -> Groups:
    params = [(f"p{i}", make((11, i + 1), F32)) for i in range(6)]
    for i in (0, 3):
        params[i][1].requires_grad_(False)
    return [{"params": params[:4]}, {"params": params[4:], "lr": 5e-3}]


def _frozen_columns(make: Make) -> Groups:
    """What is frozen is not row-major."""
    columns = nn.Parameter(make((4, 6), F32).detach().t(), requires_grad=False)
    return [{"params": [("trained", make((5, 3), F32)), ("columns", columns)]}]


ODD_SIZES = [(7,), (13, 3), (1,), (), (0,), (65,), (3, 5, 7), (2, 0, 3), (2,), (128, 3), (3,)]

# Of each group what it has of its own, and its parameters: shapes, and dtypes where they are not fp32.
PARAMETERS: dict[str, list[tuple[dict[str, Any], dict[str, Any]]] | Callable[[Make], Groups]] = {
    # 0-d, zero-size, one-element and odd parameters; every small one is smaller than four ranks.
    "odd sizes": [({}, {f"p{i}": shape for i, shape in enumerate(ODD_SIZES)})],
    # All of it together is smaller than one alignment unit, and the bias than the number of ranks.
    "tiny": [({}, {"weight": (3, 5), "bias": (1,)})],
    "empty and scalar": [({}, {"empty": (0, 4), "scalar": ()})],
    "several groups": [
        ({"lr": 1e-2, "weight_decay": 3e-4}, {"a": (31, 9), "b": (31,)}),
        ({"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.0}, {"c": (5,)}),
        ({"amsgrad": True}, {"d": (64, 4), "e": (17, 3), "f": ()}),
    ],
    "mixed dtypes": [
        ({}, {"a32": (19, 7), "b16": ((33, 5), BF16), "c64": ((11, 3), F64)}),
        ({"lr": 4e-3}, {"d16": ((5,), BF16), "e32": (130,), "f16": ((), BF16)}),
    ],
    "bf16": [({}, {"weight": ((37, 5), BF16), "bias": ((3,), BF16), "scale": ((), BF16)})],
    "fp16": [({}, {"weight": ((21, 5), F16), "bias": ((3,), F16), "wide": (70,)})],
    # More than any exchange moves at once, and not a multiple of anything.
    "large": [({}, {"huge": (701, 997), "bias": (997,)})],
    "non-contiguous": _transposed,
    "frozen": _frozen,
    "frozen columns": _frozen_columns,
    # Sizes that divide evenly by any rank count up to four times the alignment unit: no padding anywhere.
    "aligned": [({}, {"a": (64, 12), "b": (3 * 4 * 64, 2), "c": (768,)})],
}


def make_groups(name: str, seed: int) -> Groups:
    """The parameter groups of `PARAMETERS[name]`, drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)

    def make(shape: tuple[int, ...], dtype: torch.dtype = F32) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=generator, dtype=F64).to(dtype))

    def made(spec: Any) -> nn.Parameter:
        return make(*spec) if spec and isinstance(spec[-1], torch.dtype) else make(spec)

    groups = PARAMETERS[name]
    if callable(groups):
        return groups(make)
    return [{"params": [(name, made(spec)) for name, spec in params.items()], **own} for own, params in groups]


def named(groups: Groups) -> dict[str, nn.Parameter]:
    return {name: param for group in groups for name, param in group["params"]}


def draw_gradient(param: Tensor, *key: int) -> Tensor:
    """A gradient that depends on `key` alone, at a scale between 1e-4 and 1 that depends on it too."""
    seed = 0
    for part in key:
        seed = seed * 1009 + part + 1
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** (-4 * torch.rand((), generator=generator, dtype=F64))
    return (scale * torch.randn(param.shape, generator=generator, dtype=F64)).to(param.dtype)


def mean_in_rank_order(gradients: Sequence[Tensor]) -> Tensor:
    """(g0 + g1 + ...) / N, accumulated in fp32 or wider in rank order, rounded once."""
    total = gradients[0].to(torch.promote_types(gradients[0].dtype, F32), copy=True)
    for gradient in gradients[1:]:
        total += gradient
    return (total / len(gradients)).to(gradients[0].dtype)


def reduce_for_control(group: Any, gradients: Sequence[Tensor]) -> list[Tensor]:
    """The means over the ranks of a group, by one of torch's own all-gathers for each dtype and the rule above."""
    means: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        places = [place for place, gradient in enumerate(gradients) if gradient.dtype is dtype]
        flat = torch.cat([gradients[place].flatten() for place in places])
        gathered = [flat]
        if group is not None and group.size() > 1:
            gathered = [torch.empty_like(flat, device="cpu") for _ in range(group.size())]
            dist.all_gather(gathered, flat.cpu(), group=group)
        parts = mean_in_rank_order(gathered).to(flat.device).split([gradients[place].numel() for place in places])
        means |= {place: part.view(gradients[place].shape) for place, part in zip(places, parts, strict=True)}
    return [means[place] for place in range(len(gradients))]


def mains_of(groups: Groups) -> Groups:
    """Copies for the control: wherever sharding keeps an fp32 main parameter, the copy is in fp32."""
    copies: Groups = copy.deepcopy(groups)
    for group in copies:
        for i, (name, param) in enumerate(group["params"]):
            if param.dtype.itemsize < 4:
                group["params"][i] = (name, nn.Parameter(param.detach().float(), param.requires_grad))
    return copies


class TiedLanguageModel(nn.Module):
    """Embedding and head share a weight; one layer is frozen and one is never used."""

    def __init__(self, vocabulary: int = 17, width: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.hidden = nn.Linear(width, 3 * width + 1)
        self.back = nn.Linear(3 * width + 1, width)
        self.unused = nn.Linear(width, 5)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.back(torch.nn.functional.gelu(self.hidden(self.frozen(x))))
        logits: Tensor = self.head(self.norm(x))
        return logits

    def loss(self, seed: int) -> Tensor:
        tokens = torch.randint(0, self.embedding.num_embeddings, (4, 9), generator=torch.Generator().manual_seed(seed))
        logits = self(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


class Attention(nn.Module):
    """A transformer layer over random sequences, with a convolution and a 0-d temperature in front."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(3, 16, kernel_size=3, padding=1)
        self.temperature = nn.Parameter(torch.ones(()))
        self.layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=40, dropout=0.0, batch_first=True)
        self.readout = nn.Linear(16, 1)

    def loss(self, seed: int) -> Tensor:
        dtype = self.temperature.dtype
        generator = torch.Generator().manual_seed(seed)
        sequences = torch.randn(4, 3, 6, generator=generator).to(dtype)
        features = self.convolution(sequences).transpose(1, 2) * self.temperature
        return (self.readout(self.layer(features)).float() - 1).square().mean()


class InOrder(nn.Module):
    """Layers that are read in another order than they were registered in; those that are left out are never used."""

    def __init__(self, num_layers: int, order: Sequence[int], width: int, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias) for _ in range(num_layers))
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = self.layers[index](x)
        return x


MODELS: dict[str, Callable[[], nn.Module]] = {"tied language model": TiedLanguageModel, "attention": Attention}


def whole_state_dict(optimizer: Any, num_ranks: int) -> dict[str, Any]:
    """The state dict of whole tensors, on every rank."""
    for rank in range(num_ranks):
        optimizer.consolidate_state_dict(to=rank)
    state_dict: dict[str, Any] = optimizer.state_dict()
    return state_dict
