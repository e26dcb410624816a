"""Parameter groups by the names of parameters and the kinds of modules: who decays, and who learns at which rate."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn


def weight_decay_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    no_decay: Sequence[str | type[nn.Module]] = (),
    decay_vectors: bool = False,
    lr: float | None = None,
    multipliers: Mapping[str, Mapping[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer: matrices decay, biases and the weights of norms do not.

    Args:
        model: Its trainable parameters are taken, each once, in the order in which they are registered.
        weight_decay: Of those that decay; per step at the schedule's peak.
        no_decay: What else does not decay: patterns of names as ``fnmatch`` has them (``"*.router.*"``), and kinds of
            modules whose own parameters are meant (``nn.Embedding``).
        decay_vectors: True: parameters of fewer than 2 dimensions decay too.
        lr: The learning rate that multipliers multiply.
        multipliers: ``{"head.*": {"lr": 0.1, "weight_decay": 2.0}}``: by pattern, what the learning rate and the decay
            are multiplied by. The first pattern that fits a name counts.

    Returns:
        Groups with (name, parameter) pairs, ordered by their first parameter.

    Raises:
        ValueError: A pattern or a kind of module fits no trainable parameter, there is none at all, a multiplier is not
            of ``lr`` or ``weight_decay``, or ``lr`` is missing.
    """
    multipliers = {} if multipliers is None else multipliers
    for pattern, factors in multipliers.items():
        if unknown := set(factors) - {"lr", "weight_decay"}:
            raise ValueError(f"multipliers[{pattern!r}]: expected lr or weight_decay, got {', '.join(sorted(unknown))}")
        if "lr" in factors and lr is None:
            raise ValueError(f"multipliers[{pattern!r}] has one of lr: give lr= as well, which it multiplies")
    unused: dict[str | type[nn.Module], None] = dict.fromkeys([*no_decay, *multipliers])
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        module = model.get_submodule(name.rpartition(".")[0])
        fitting = [
            one for one in no_decay if (isinstance(module, one) if isinstance(one, type) else fnmatchcase(name, one))
        ]
        decays = not fitting and (decay_vectors or param.ndim >= 2)
        matching = next((pattern for pattern in multipliers if fnmatchcase(name, pattern)), None)
        for used in (*fitting, matching or ""):
            unused.pop(used, None)
        factors = {} if matching is None else multipliers[matching]
        key = (factors.get("lr", 1.0), factors.get("weight_decay", 1.0) * weight_decay * decays)
        if key not in groups:
            groups[key] = {"params": [], "weight_decay": key[1]} | ({} if lr is None else {"lr": lr * key[0]})
        groups[key]["params"].append((name, param))
    if not groups:
        raise ValueError("expected a model with trainable parameters, got one without")
    for left in unused:
        text = repr(left) if isinstance(left, str) else left.__name__
        raise ValueError(f"{text} fits no trainable parameter of the model, or only what an earlier pattern has taken")
    return list(groups.values())
