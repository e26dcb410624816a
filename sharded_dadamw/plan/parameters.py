"""What there is of parameters: names, shapes and dtypes, from a name, a file or a module; all on the meta device."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sharded_dadamw.layout.parameters import SHARDABLE_DTYPES

Shapes = dict[str, tuple[int, ...]]

_LLAMA3 = {"model_type": "llama", "vocab_size": 128_256, "num_key_value_heads": 8}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SHARDABLE_DTYPES}
_HEADS = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}
"""Kinds that are like Llama, with what Hugging Face takes where a file says nothing."""

PRESETS: dict[str, dict[str, Any]] = {
    "llama3-8b": _LLAMA3
    | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama3-70b": _LLAMA3
    | {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "llama3-405b": _LLAMA3
    | {"hidden_size": 16_384, "intermediate_size": 53_248, "num_hidden_layers": 126, "num_attention_heads": 128},
    "gpt3-175b": {"model_type": "gpt2", "vocab_size": 50_257, "n_positions": 2048, "n_embd": 12_288, "n_layer": 96},
    "tiny": {"model_type": "launch", "vocab_size": 256, "width": 64, "num_layers": 2},
    "3m": {"model_type": "launch", "vocab_size": 256, "width": 256, "num_layers": 4},
    "30m": {"model_type": "launch", "vocab_size": 256, "width": 512, "num_layers": 10},
    "125m": {"model_type": "launch", "vocab_size": 256, "width": 896, "num_layers": 13},
}
"""Models by name, as their ``config.json`` has them; the last four are those of ``launch/``."""


def parameters_of(model: str | nn.Module | Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the parameters of a model, by name, in the order of registration, without memory.

    Args:
        model: A preset; the path of a Hugging Face ``config.json``; ``file.py:function``, which builds a module; a
            module; or parameters by name.
        dtype: What parameters are held in. None: what the module or the file says, and bf16 where neither does.

    Raises:
        ValueError: There is no such model, it cannot be built on the meta device, or a parameter cannot be sharded.
    """
    if isinstance(model, str):
        model = _named(model, dtype)
    if isinstance(model, nn.Module):
        model = dict(model.named_parameters())
    owners: dict[int, str] = {}
    for name, tensor in model.items():
        if (owner := owners.setdefault(id(tensor), name)) != name:
            raise ValueError(f"{name} is the same parameter as {owner}; pass it once")
    if lazy := [name for name, tensor in model.items() if is_lazy(tensor)]:
        raise ValueError(f"model: expected parameters with shapes, got {lazy[0]} of a lazy module; name its sizes")
    held = {name: _without_memory(tensor, dtype) for name, tensor in model.items()}
    if not any(tensor.requires_grad and tensor.numel() for tensor in held.values()):
        raise ValueError("model: expected parameters that are trained, found none")
    for name, tensor in held.items():
        if tensor.requires_grad and tensor.dtype not in SHARDABLE_DTYPES:
            raise ValueError(f"{name}: expected a dtype of {', '.join(_DTYPES)}, got {tensor.dtype}")
    return held


def _without_memory(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype  # as module.to(dtype) does
    return nn.Parameter(torch.empty(tensor.shape, dtype=dtype, device="meta"), requires_grad=tensor.requires_grad)


def _named(model: str, dtype: torch.dtype | None) -> nn.Module | dict[str, Tensor]:
    path, _, function = model.rpartition(":")
    if model in PRESETS:
        return _tensors(PRESETS[model], dtype)
    if path.endswith(".py"):
        return _built_by(Path(path), function)
    if not Path(model).is_file():
        raise ValueError(
            f"model: expected one of {', '.join(PRESETS)}, a config.json of Hugging Face, or file.py:function, got "
            f"{model}, which is no file"
        )
    try:
        config = json.loads(Path(model).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError(f"a {type(config).__name__}")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{model}: expected a config.json of Hugging Face, got {error}") from error
    return _tensors(config, dtype, called=model)


def _built_by(path: Path, function: str) -> nn.Module:
    """Build a module on the meta device. The file finds what lies beside it, as a script does."""
    spec = importlib.util.spec_from_file_location(f"{path.stem} of a plan", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"model: expected a file of Python with {function}, got {path}, which is no file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    beside = str(path.resolve().parent)
    sys.path.insert(0, beside)
    try:
        with redirect_stdout(sys.stderr):  # what it says is no part of the plan
            spec.loader.exec_module(module)
            with torch.device("meta"):
                built = getattr(module, function)()
    except (Exception, SystemExit) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path}:{function}: expected a function that builds a module on the meta device, got "
            f"{type(error).__name__}: {reason}"
        ) from error
    finally:
        sys.path.remove(beside)
    if not isinstance(built, nn.Module):
        raise ValueError(f"{path}:{function}: expected a torch.nn.Module, got a {type(built).__name__}")
    elsewhere = [name for name, tensor in built.named_parameters() if not tensor.is_meta]
    if elsewhere:
        raise ValueError(
            f"{path}:{function}: expected parameters on the meta device, got {elsewhere[0]} on "
            f"{built.get_parameter(elsewhere[0]).device}; name no device in the model's own code"
        )
    return built


def _tensors(config: Mapping[str, Any], dtype: torch.dtype | None, called: str = "model") -> dict[str, Tensor]:
    """What a ``config.json`` describes, in the order in which modules register it; in its dtype, if none is given.

    A ValueError says what of it this does not know, since its parameters would be others.
    """
    kind = config.get("model_type")
    as_function = "as file.py:function, such as one that returns AutoModelForCausalLM.from_config(...)"
    if not isinstance(kind, str) or kind not in (*_HEADS, "gpt2", "launch"):
        raise ValueError(
            f"{called}: expected a model_type of {', '.join(_HEADS)} or gpt2, got {kind}; give the others {as_function}"
        )
    heads = [str(name) for name in config.get("architectures") or ()]
    others = [name for name in heads if not name.endswith(("ForCausalLM", "LMHeadModel"))]
    others += [name for name in ("quantization_config", "add_cross_attention") if config.get(name)]
    if others:
        raise ValueError(f"{called}: expected a plain language model, got {others[0]}; give such a model {as_function}")
    try:
        shapes = {"gpt2": _gpt2, "launch": _launch}.get(kind, _llama)(config)
    except ValueError as error:
        raise ValueError(f"{called}: {error}") from error
    if dtype is None:
        named = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        if named not in _DTYPES:
            raise ValueError(f"{called}: expected a dtype of {', '.join(_DTYPES)}, got {named}; say --precision")
        dtype = _DTYPES[named]
    return {name: nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for name, shape in shapes.items()}


def _sizes(config: Mapping[str, Any], names: Iterable[str], optional: Iterable[str] = ()) -> list[int]:
    """The sizes of those names; 0 for one that may be left open, and is. Other values are a ValueError."""
    for name in (*names, *(name for name in optional if config.get(name) is not None)):
        value = config.get(name)
        if type(value) is not int or not 0 < value < 2**31:
            raise ValueError(f"expected {name} to be a whole number above 0, got {value!r}")
    return [config.get(name) or 0 for name in (*names, *optional)]


def _llama(config: Mapping[str, Any]) -> Shapes:
    kind = config["model_type"]
    needed = ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads")
    width, hidden, vocab, num_layers, heads, of_keys, head = _sizes(
        {**_HEADS[kind], **config}, needed, ("num_key_value_heads", "head_dim")
    )
    for name, whole, part in (
        ("hidden_size", width, 1 if head else heads),
        ("num_attention_heads", heads, of_keys or heads),
    ):
        if whole % part:
            raise ValueError(f"expected {name} to be a multiple of {part}, the heads that share it, got {whole}")
    head = head or width // heads
    biased = "qkv" if kind == "qwen2" else "qkvo" if config.get("attention_bias") and kind != "mistral" else ""
    is_mlp_biased = config.get("mlp_bias") and kind == "llama"
    outs = {"q": heads * head, "k": (of_keys or heads) * head}
    outs["v"] = outs["k"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, width)}
    for index in range(num_layers):
        layer = f"model.layers.{index}"
        for name, shape in {**{name: (out, width) for name, out in outs.items()}, "o": (width, outs["q"])}.items():
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = shape
            if name in biased:
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = shape[:1]
        if kind == "qwen3":
            shapes |= {f"{layer}.self_attn.{name}_norm.weight": (head,) for name in "qk"}
        for name, shape in {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}.items():
            shapes[f"{layer}.mlp.{name}_proj.weight"] = shape
            if is_mlp_biased:
                shapes[f"{layer}.mlp.{name}_proj.bias"] = shape[:1]
        shapes |= {f"{layer}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (width,)
    return shapes if config.get("tie_word_embeddings") else {**shapes, "lm_head.weight": (vocab, width)}


def _gpt2(config: Mapping[str, Any]) -> Shapes:
    vocab, positions, width, num_layers, inner = _sizes(
        config, ("vocab_size", "n_positions", "n_embd", "n_layer"), ("n_inner",)
    )
    hidden = inner or 4 * width
    shapes: Shapes = {"wte.weight": (vocab, width), "wpe.weight": (positions, width)}
    block: Shapes = {"ln_1": (width,), "attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
    block |= {"ln_2": (width,), "mlp.c_fc": (width, hidden), "mlp.c_proj": (hidden, width)}
    for index in range(num_layers):
        for name, shape in block.items():
            shapes |= {f"h.{index}.{name}.weight": shape, f"h.{index}.{name}.bias": shape[-1:]}
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    return shapes if config.get("tie_word_embeddings", True) else {**shapes, "lm_head.weight": (vocab, width)}


def _launch(config: Mapping[str, Any]) -> Shapes:
    vocab, width, num_layers = _sizes(config, ("vocab_size", "width", "num_layers"))
    shapes: Shapes = {"embedding.weight": (vocab, width)}
    for index in range(num_layers):
        block = f"blocks.{index}"
        shapes |= {f"{block}.attention_norm.weight": (width,), f"{block}.attention_in.weight": (3 * width, width)}
        shapes |= {f"{block}.attention_out.weight": (width, width), f"{block}.mlp_norm.weight": (width,)}
        shapes |= {f"{block}.mlp_in.weight": (4 * width, width), f"{block}.mlp_out.weight": (width, 4 * width)}
    return {**shapes, "norm.weight": (width,)}
