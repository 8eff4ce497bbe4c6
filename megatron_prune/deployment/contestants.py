"""Models that are timed beside each other: directories and shapes, at the precisions that are asked for."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch

from megatron_prune.architecture import Architecture
from megatron_prune.checkpoint.hf import hf_config_from_architecture, read_config
from megatron_prune.checkpoint.hf_quiet import quiet_transformers
from megatron_prune.config.values import parse_source_shape
from megatron_prune.deployment.gguf import GgufModel
from megatron_prune.deployment.quantize import int8_config
from megatron_prune.evaluation.scoring import load_model

PRECISIONS: Final = ("fp32", "bf16", "int8")
#: Shapes of the two, for ``--shape``; the second is the model's own config.json on the hub.
PAPER_SHAPES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "EfficientLLM-457M": "hidden=1195,ffn=3006,heads=19,head_dim=64,layers=24,vocab=49152,tied=1",
        "Qwen2.5-0.5B": "hidden=896,ffn=4864,heads=14,kv_heads=2,layers=24,vocab=151936,tied=1,qkv_bias=1",
    }
)


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A model at a precision, loaded.

    Attributes:
        name: of the model.
        precision: fp32, bf16, int8, or that of a GGUF file.
        parameters: of the model, a tied matrix once.
        model: of transformers, or a :class:`~megatron_prune.deployment.gguf.GgufModel`.
    """

    name: str
    precision: str
    parameters: int
    model: Any


def contestants(
    models: Sequence[str], shapes: Sequence[str], precisions: Sequence[str], context: int
) -> Iterator[Contestant]:
    """Load models and make shapes, each at every precision.

    A directory that is 8-bit already takes part as int8, and a GGUF file in llama.cpp as what it is, whatever
    precisions are asked for.

    Args:
        models: Hugging Face directories, or ``*.gguf`` files.
        shapes: see :func:`megatron_prune.config.values.parse_source_shape`, or a name of :data:`PAPER_SHAPES`.
        precisions: of :data:`PRECISIONS`.
        context: tokens that a GGUF file will be fed, at most.

    Raises:
        UserError: no such model or shape.
    """
    for text, name in zip(models, short_names(models), strict=True):
        path = Path(text)
        if path.suffix == ".gguf":
            file = GgufModel(path, context)
            yield Contestant(name, file.precision, file.parameters, file)
            continue
        config = read_config(path)
        if config.get("quantization_config"):
            yield _contestant(name, "int8", load_model(path))
            continue
        for precision in precisions:
            yield _contestant(name, precision, _at(precision, path))
    for text in shapes:
        arch = parse_source_shape(PAPER_SHAPES.get(text, text))
        for precision in precisions:
            yield _contestant(text, precision, random_model(arch, precision))


def random_model(arch: Architecture, precision: str) -> Any:
    """A transformers model of a shape with random weights at a precision, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet_transformers()
    config = AutoConfig.for_model(**hf_config_from_architecture(arch, torch_dtype="float32", extra={}))
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if precision == "int8":
        with tempfile.TemporaryDirectory() as name:  # transformers quantises while it loads
            model.save_pretrained(name)
            del model
            return _at(precision, Path(name))
    return model.to(torch.bfloat16 if precision == "bf16" else torch.float32)


def _contestant(name: str, precision: str, model: Any) -> Contestant:
    # The embedding and a tied head are one parameter.
    return Contestant(name, precision, sum(parameter.numel() for parameter in model.parameters()), model)


def _at(precision: str, path: Path) -> Any:
    if precision == "int8":
        return load_model(path, quantization_config=int8_config())
    return load_model(path, torch.bfloat16 if precision == "bf16" else torch.float32)


def short_names(models: Sequence[str]) -> list[str]:
    """Enough of each path to tell models apart: ``runs/demo/export`` is demo/export unless another ends like that."""
    parts = [Path(text).resolve().parts for text in models]
    names = []
    for own in parts:
        others = [other for other in parts if other != own]
        apart = (n for n in range(2, len(own)) if all(other[-n:] != own[-n:] for other in others))
        count = next(apart, len(own))
        names.append("/".join(own[-count:]))
    return names
