"""Decoding compiled ahead of time: transformers' own forward by AOTInductor, without Python between the operators.

A model of a few million parameters spends most of a token's time, run eagerly, on calling operators; what is left after
compiling is the work that pruning makes smaller. The cache is transformers' static one, as long as it will ever be, and
its tensors are inputs that the compiled step writes into, so that prefill and decoding share it.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from megatron_prune.errors import UserError
from megatron_prune.evaluation.scoring import first_line


class CompiledModel:
    """A model's forward at the numbers of tokens that it is run with, compiled when first needed.

    Each holds the weights once more. Those for another number of threads are dropped.

    Args:
        model: of transformers, a decoder of the Llama kind, in evaluation mode on the CPU.
        length: tokens that a sequence can have.
        about_to_compile: called with the number of tokens and of threads before each compilation, which takes from
            seconds to minutes.
    """

    def __init__(self, model: Any, length: int, about_to_compile: Callable[[int, int], None]) -> None:
        self._model = model
        self._length = length
        self._about_to_compile = about_to_compile
        self._steps: dict[int, Callable[..., Tensor]] = {}
        self._threads = 0

    def start(self) -> Callable[[Sequence[int]], Tensor]:
        """A new sequence: what it returns takes tokens after those it took before, and gives the logits ``[vocab]`` of
        the last one.

        Raises:
            UserError: the model cannot be compiled on this machine.
        """
        keys, values, position = *self._cache(), 0

        @torch.no_grad()
        def feed(tokens: Sequence[int]) -> Tensor:
            nonlocal position
            ids = torch.tensor([list(tokens)]).remainder(self._model.config.vocab_size)
            logits = self._step(len(tokens))(ids, torch.tensor(position), keys, values)
            position += len(tokens)
            return logits

        return feed

    def _cache(self) -> tuple[Tensor, Tensor]:
        from transformers.integrations.executorch import get_head_shapes

        config = self._model.config
        heads, head_dim = cast("tuple[int, int]", get_head_shapes(config))  # those of all layers are alike
        shape = config.num_hidden_layers, 1, heads, self._length, head_dim
        return torch.zeros(shape, dtype=self._model.dtype), torch.zeros(shape, dtype=self._model.dtype)

    def _step(self, tokens: int) -> Callable[..., Tensor]:
        threads = torch.get_num_threads()  # compiled loops are for so many
        if threads != self._threads:
            self._steps, self._threads = {}, threads
        if tokens not in self._steps:
            self._about_to_compile(tokens, threads)
            example = torch.zeros(1, tokens, dtype=torch.long), torch.tensor(0), *self._cache()
            try:
                self._steps[tokens] = _compiled(_Step(self._model), example)
            except (RuntimeError, OSError) as error:
                name = self._model.config._name_or_path or "the model"
                raise UserError(
                    f"{name} cannot be compiled ({first_line(error)}); install a C++ compiler, name one in CXX, or "
                    "leave out --compile"
                ) from error
        return self._steps[tokens]


class _Step(nn.Module):
    """The forward of some tokens with the cache as plain tensors, ``[layers, 1, kv_heads, length, head_dim]`` each."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        from transformers.cache_utils import Cache, StaticLayer

        layers: list[Any] = []
        for own_keys, own_values in zip(keys.unbind(), values.unbind(), strict=True):
            layer: Any = StaticLayer(own_keys.shape[2])
            layer.lazy_initialization(own_keys, own_values)
            layer.keys, layer.values, layer.cumulative_length = own_keys, own_values, position.clone()
            layers.append(layer)
        logits: Tensor = self.model(
            input_ids=ids, past_key_values=Cache(layers=layers), use_cache=True, logits_to_keep=1
        ).logits
        return logits[0, -1]


@contextmanager
def no_trace_on_disk() -> Iterator[None]:
    """Within, what the compiler keeps for another time, weights first, goes to a directory that does not stay."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(prefix="compiled-") as directory:
        os.environ[name] = directory
        try:
            yield
        finally:
            os.environ.pop(name)
            os.environ.update({} if before is None else {name: before})


def _compiled(step: nn.Module, example: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    import torch._inductor

    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as name, torch.no_grad():
        warnings.simplefilter("ignore")  # torch's remarks on torch
        package = str(Path(name) / "step.pt2")
        torch._inductor.aoti_compile_and_package(torch.export.export(step, example), package_path=package)
        loader = torch._inductor.aoti_load_package(package).loader

    def run(*inputs: Tensor) -> Tensor:
        # Calling the package itself parses a description of its inputs each time, longer than a small model runs.
        (logits,) = loader.boxed_run(list(inputs))
        return logits

    return run
