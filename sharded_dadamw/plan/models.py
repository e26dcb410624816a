"""What there is of parameters: names, shapes and dtypes, from a name, a file or a module; all on the meta device."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Shapes = dict[str, tuple[int, ...]]

_LLAMA3 = {"model_type": "llama", "vocab_size": 128_256, "num_key_value_heads": 8}
_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

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
        ValueError: There is no such model, or it cannot be built on the meta device.
    """
    if isinstance(model, str):
        model = _named(model)
    if isinstance(model, nn.Module):
        model = dict(model.named_parameters())
    if not any(tensor.requires_grad for tensor in model.values()):
        raise ValueError("model: expected parameters that are trained, found none")
    return {name: _without_memory(tensor, dtype) for name, tensor in model.items()}


def _without_memory(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    bare = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="meta")
    return nn.Parameter(bare, requires_grad=tensor.requires_grad)


def _named(model: str) -> nn.Module | dict[str, Tensor]:
    path, _, function = model.rpartition(":")
    if model in PRESETS:
        return _tensors(PRESETS[model])
    if path.endswith(".py"):
        return _built_by(Path(path), function)
    if not Path(model).is_file():
        raise ValueError(
            f"model: expected one of {', '.join(PRESETS)}, a config.json of Hugging Face, or file.py:function, got "
            f"{model}, which is no file"
        )
    try:
        config = json.loads(Path(model).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{model}: expected JSON, got {error}") from error
    return _tensors(config, called=model)


def _built_by(path: Path, function: str) -> nn.Module:
    """Build a module on the meta device."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"model: expected a file of Python with {function}, got {path}, which is no file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        with torch.device("meta"):
            built = getattr(module, function)()
    except Exception as error:
        raise ValueError(
            f"{path}:{function}: expected a function that builds a module on the meta device, got "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(built, nn.Module):
        raise ValueError(f"{path}:{function}: expected a torch.nn.Module, got a {type(built).__name__}")
    elsewhere = [name for name, tensor in built.named_parameters() if not tensor.is_meta]
    if elsewhere:
        raise ValueError(
            f"{path}:{function}: expected parameters on the meta device, got {elsewhere[0]} on "
            f"{built.get_parameter(elsewhere[0]).device}; name no device in the model's own code"
        )
    return built


def _tensors(config: Mapping[str, Any], called: str = "model") -> dict[str, Tensor]:
    """What a ``config.json`` describes, in the order in which modules register it."""
    kind = config.get("model_type")
    if kind not in (*_LLAMA_LIKE, "gpt2", "launch"):
        raise ValueError(
            f"{called}: expected a model_type of {', '.join(_LLAMA_LIKE)} or gpt2, got {kind}; give the others as "
            "file.py:function, such as one that returns AutoModelForCausalLM.from_config(...)"
        )
    try:
        shapes = {"gpt2": _gpt2, "launch": _launch}.get(str(kind), _llama)(config)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{called}: expected the fields of {kind}, got none called {error}") from error
    dtype = _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), torch.bfloat16)
    return {name: nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for name, shape in shapes.items()}


def _llama(config: Mapping[str, Any]) -> Shapes:
    width, hidden, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kind = config["num_attention_heads"], config["model_type"]
    head = config.get("head_dim") or width // heads
    outs = {"q": heads * head, "k": (config.get("num_key_value_heads") or heads) * head}
    outs["v"] = outs["k"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, width)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        for name, out in outs.items():
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (out, width)
            if kind == "qwen2" or config.get("attention_bias"):
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (out,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (width, outs["q"])
        if config.get("attention_bias") and kind != "qwen2":
            shapes[f"{layer}.self_attn.o_proj.bias"] = (width,)
        if kind == "qwen3":
            shapes |= {f"{layer}.self_attn.{name}_norm.weight": (head,) for name in "qk"}
        for name, shape in {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}.items():
            shapes[f"{layer}.mlp.{name}_proj.weight"] = shape
            if config.get("mlp_bias"):
                shapes[f"{layer}.mlp.{name}_proj.bias"] = shape[:1]
        shapes |= {f"{layer}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (width,)
    return shapes if config.get("tie_word_embeddings") else {**shapes, "lm_head.weight": (vocab, width)}


def _gpt2(config: Mapping[str, Any]) -> Shapes:
    width, hidden = config["n_embd"], config.get("n_inner") or 4 * config["n_embd"]
    shapes: Shapes = {"wte.weight": (config["vocab_size"], width), "wpe.weight": (config["n_positions"], width)}
    block: Shapes = {"ln_1": (width,), "attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
    block |= {"ln_2": (width,), "mlp.c_fc": (width, hidden), "mlp.c_proj": (hidden, width)}
    for index in range(config["n_layer"]):
        for name, shape in block.items():
            shapes |= {f"h.{index}.{name}.weight": shape, f"h.{index}.{name}.bias": shape[-1:]}
    return {**shapes, "ln_f.weight": (width,), "ln_f.bias": (width,)}


def _launch(config: Mapping[str, Any]) -> Shapes:
    width = config["width"]
    shapes: Shapes = {"embedding.weight": (config["vocab_size"], width)}
    for index in range(config["num_layers"]):
        block = f"blocks.{index}"
        shapes |= {f"{block}.attention_norm.weight": (width,), f"{block}.attention_in.weight": (3 * width, width)}
        shapes |= {f"{block}.attention_out.weight": (width, width), f"{block}.mlp_norm.weight": (width,)}
        shapes |= {f"{block}.mlp_in.weight": (4 * width, width), f"{block}.mlp_out.weight": (width, 4 * width)}
    return {**shapes, "norm.weight": (width,)}
