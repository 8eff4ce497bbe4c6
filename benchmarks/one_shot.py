#!/usr/bin/env python
"""One-shot pruning of a Hugging Face Llama, directory to directory: this project, torch-pruning and ModelOpt.

    pip install -c constraints.txt -e '.[bench]'
    python benchmarks/one_shot.py --model 100M

Every side reads the same model, takes the gradients of the same tokens, removes hidden channels, FFN channels and heads
down to the same widths (half, half, two thirds) and writes the result for transformers. Reading and gradients are
transformers' work on every side; here only the two scored matrices of a block need any. Whether plain transformers
loads the result and computes what was pruned is tried afterwards. The peers score whole groups by Taylor's first term
in ways of their own, so the shape is the same and the choice is not. A peer that is not installed, fails or cannot
prune all three axes says so in its line. Times are processor time with one thread, wall time with more.

The models have fewer KV heads than heads: on one with as many, torch-pruning 1.6.1 did not come to an end.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import (
    Cell,
    Spread,
    add_common_options,
    describe_machine,
    positive_int,
    print_table,
    verdict,
    write_json,
)
from torch import Tensor
from vs_transformers import SHAPES, clock

from megatron_prune.architecture import TensorSpec, tensor_specs
from megatron_prune.checkpoint.hf import export_hf, read_architecture, read_config
from megatron_prune.ops.dispatch import build_ops
from megatron_prune.parallel.partition import DEAD, IntArray, Partition
from megatron_prune.pruning.groups import MiniGroup, remove
from megatron_prune.pruning.saliency import Fragment, SaliencyVectors, Sums, accumulate, is_output_matrix

CPU = torch.device("cpu")
MAX_SHARD_BYTES = 5 * 10**9
#: Of logits, absolute, fp32.
TOLERANCE = 1e-3
PROMPT_TOKENS = (2, 32)
#: Least time of torch-pruning over ours.
TARGET = 5.0
MODELS: dict[str, dict[str, int]] = {
    "tiny": {**SHAPES["1M"], "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16},
    "100M": SHAPES["100M"],
}
STAGES = ("gradients", "prune", "write")
COLUMNS = (
    *("side", *(f"{stage} s" for stage in STAGES), "all s", "all / ours", "prune + write / ours", "target"),
    *("parameters", "hidden/ffn/heads/kv", "loads in transformers"),
)


class Stages:
    """Seconds of each stage of one run."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what is inside ``with``."""
        began = clock()
        yield
        self.seconds[name] += clock() - began

    def all(self, *names: str) -> float:
        """Seconds of the named stages together."""
        return sum(self.seconds[name] for name in names)


#: Takes tokens and a directory to write to, and times itself; returns logits of the result, None if not at hand.
Side = Callable[[Tensor, Path, Stages], "Tensor | None"]


@dataclasses.dataclass(frozen=True)
class Widths:
    """What is left."""

    hidden: int
    ffn: int
    heads: int

    @classmethod
    def of(cls, shape: dict[str, int]) -> Widths:
        """Half of the channels and two thirds of the heads."""
        return cls(shape["hidden_size"] // 2, shape["intermediate_size"] // 2, 2 * shape["num_attention_heads"] // 3)


def main(argv: list[str] | None = None) -> int:
    """Measure and print one line for each side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="100M", help="its parameters (default %(default)s)")
    parser.add_argument("--samples", type=positive_int, default=2, help="whose gradients count (default %(default)s)")
    parser.add_argument("--seq-length", type=positive_int, default=64, help="tokens of each (default %(default)s)")
    parser.add_argument("--threads", type=positive_int, default=1, help="of PyTorch (default %(default)s)")
    add_common_options(parser, rounds=3)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    shape = MODELS[options.model]
    size = f"{options.samples} x {options.seq_length} tokens"
    print(f"{describe_machine()}; {options.model}, {size}, median of {options.rounds} rounds (quartiles)")
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        make_model(shape, source)
        tokens = torch.randint(shape["vocab_size"], (options.samples, options.seq_length))
        widths = Widths.of(shape)
        sides = {
            "ours": ours_of(source, widths),
            "torch-pruning": torch_pruning(source, widths),
            "ModelOpt": modelopt(source),
        }
        rows = measure_sides(sides, tokens, Path(scratch), options.rounds)
    print_table(COLUMNS, rows)
    write_json(options.json, f"one_shot {options.model}", COLUMNS, rows)
    return 0


def make_model(shape: dict[str, int], source: Path) -> None:
    """Write a Llama with random weights to a directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {**shape, "max_position_embeddings": 2048, "tie_word_embeddings": True}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(source)


def read_model(source: Path) -> Any:
    """The model as every side reads it: with the fused attention or a cache, torch-pruning cannot trace it."""
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    model.config.use_cache = False
    return model


def measure_sides(sides: dict[str, Side], tokens: Tensor, scratch: Path, rounds: int) -> list[list[Cell | Spread]]:
    """Every side in turn; its line of the table."""
    stages: dict[str, list[Stages]] = {name: [] for name in sides}
    outcome: dict[str, list[Cell | Spread]] = {}
    for _ in range(rounds):
        for name, side in sides.items():
            if name in outcome and not stages[name]:
                continue  # it has failed
            target, watch = scratch / name, Stages()
            shutil.rmtree(target, ignore_errors=True)
            try:
                logits = side(tokens, target, watch)
            except Exception as error:  # whatever a peer raises is its result
                if name == "ours":
                    raise
                outcome[name] = ["", "", f"no result: {_one_line(error)}"]
                continue
            stages[name].append(watch)
            outcome[name] = describe(target, logits)
    return [[name, *_times(name, stages), *outcome[name]] for name in sides]


def _times(name: str, stages: dict[str, list[Stages]]) -> list[Cell | Spread]:
    if not stages[name]:
        return [""] * (len(STAGES) + 4)
    pairs = list(zip(stages[name], stages["ours"], strict=True))
    whole, own = (Spread.of([a.all(*names) / b.all(*names) for a, b in pairs]) for names in (STAGES, STAGES[1:]))
    judged = verdict(whole.median, least=TARGET) if name == "torch-pruning" else ""
    medians = [Spread.of([watch.seconds[stage] for watch in stages[name]]).median for stage in STAGES]
    return [*medians, Spread.of([watch.all(*STAGES) for watch in stages[name]]), whole, own, judged]


def take_gradients(model: Any, tokens: Tensor) -> None:
    """Of the mean loss, on the parameters that want them."""
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()


def ours_of(source: Path, widths: Widths) -> Side:
    """This project's parts without an engine."""
    kernels = build_ops({}, CPU).saliency

    def prune(tokens: Tensor, target: Path, watch: Stages) -> Tensor | None:
        with watch.stage("gradients"):
            arch = read_architecture(source)
            specs = tensor_specs(arch)
            scored = {spec.name for spec in specs if is_output_matrix(spec)}
            parameters = dict((model := read_model(source)).named_parameters())
            for name, parameter in parameters.items():
                parameter.requires_grad_(name in scored)
            take_gradients(model, tokens)
        with watch.stage("prune"):
            partition = Partition.of(arch)
            pairs = [(spec, parameters[spec.name]) for spec in specs if spec.name in scored]
            fragments = [Fragment(s, p.detach().flatten(), p.grad.flatten(), 0, tuple(p.shape)) for s, p in pairs]
            vectors = accumulate(fragments, partition, "taylor", kernels, range(arch.num_layers), Sums(), CPU)
            partition = remove_least(partition, vectors, widths)
            tensors = {spec.name: slice_tensor(parameters[spec.name].detach(), spec, partition) for spec in specs}
        with watch.stage("write"):
            export_hf(
                target,
                partition.architecture(),
                tensors,
                dtype=torch.float32,
                tokenizer_dir=None,
                source_config=read_config(source),
                max_shard_bytes=MAX_SHARD_BYTES,
            )
        return None

    return prune


def remove_least(partition: Partition, vectors: SaliencyVectors, widths: Widths) -> Partition:
    """Remove the least groups of every axis down to the widths.

    With a width for each axis and one pass of saliency, what goes of one axis does not depend on the others, so that
    every axis can be sorted once: the same groups as from ``planner.choose`` over and over.
    """
    heads, ffn, stem = (
        scores.argsort(axis=-1, kind="stable")[..., : scores.shape[-1] - kept]
        for scores, kept in ((vectors.heads, widths.heads), (vectors.ffn, widths.ffn), (vectors.stem, widths.hidden))
    )
    for units in heads.T.tolist():  # one by one: a KV head goes with its last query
        partition = remove(partition, MiniGroup("attention", tuple(units)))
    channels = tuple(_without(slots, gone) for slots, gone in zip(partition.ffn, ffn, strict=True))
    return dataclasses.replace(partition, stem=_without(partition.stem, stem), ffn=channels)


def _without(slots: IntArray, gone: IntArray) -> IntArray:
    return np.where(np.isin(slots, gone), DEAD, slots)


def slice_tensor(whole: Tensor, spec: TensorSpec, partition: Partition) -> Tensor:
    """The live rows and columns of a tensor of the unpruned model."""
    for dim, axis in enumerate(spec.axes):
        alive = partition.live_elements(axis, spec.layer)
        if len(alive) < whole.shape[dim]:
            whole = whole.index_select(dim, torch.from_numpy(alive))
    return whole


def torch_pruning(source: Path, widths: Widths) -> Side:
    """torch-pruning: group Taylor over all axes, then the config put right by hand, which it does not do."""

    def prune(tokens: Tensor, target: Path, watch: Stages) -> Tensor | None:
        peer = _imported("torch_pruning", "torch-pruning")
        with watch.stage("gradients"):
            model = read_model(source)
            take_gradients(model, tokens)
        config, first = model.config, model.model.layers[0]
        with watch.stage("prune"):
            torch_pruner(peer, model, widths).step()
            config.hidden_size = model.model.embed_tokens.weight.shape[1]
            config.intermediate_size = first.mlp.gate_proj.out_features
            config.num_attention_heads = first.self_attn.q_proj.out_features // config.head_dim
            config.num_key_value_heads = first.self_attn.k_proj.out_features // config.head_dim
        with watch.stage("write"):
            model.save_pretrained(target)
        for layer in model.model.layers:
            layer.self_attn.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        return logits_of(model)

    return prune


def torch_pruner(peer: Any, model: Any, widths: Widths) -> Any:
    """Its pruner with the settings of its examples of language models, and the three widths."""
    config, kv = model.config, model.config.num_key_value_heads
    heads: dict[Any, int] = {}
    ratios: dict[Any, float] = {}
    for layer in model.model.layers:
        attention = layer.self_attn
        heads |= {attention.q_proj: config.num_attention_heads, attention.k_proj: kv, attention.v_proj: kv}
        ratios |= dict.fromkeys((layer.mlp.gate_proj, layer.mlp.up_proj), 1 - widths.ffn / config.intermediate_size)
    return peer.pruner.BasePruner(
        model,
        example_inputs=torch.zeros(1, 8, dtype=torch.long),
        importance=peer.importance.GroupTaylorImportance(),
        pruning_ratio=1 - widths.hidden / config.hidden_size,
        pruning_ratio_dict=ratios,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        # Not 1 - kept / all, whose last bit would round up to one head more.
        head_pruning_ratio=(config.num_attention_heads - widths.heads) / config.num_attention_heads,
        ignored_layers=[model.lm_head],
        output_transform=lambda output: output.logits,
    )


def modelopt(source: Path) -> Side:
    """NVIDIA ModelOpt: FastNAS, its only mode for models that are not Megatron-Core's and need no GPU."""

    def prune(tokens: Tensor, target: Path, watch: Stages) -> Tensor | None:
        del tokens, target, watch
        _imported("modelopt", "nvidia-modelopt")
        nas, hparams = (importlib.import_module(f"modelopt.torch.{name}") for name in ("nas", "opt.utils"))
        space = nas.convert(read_model(source), "fastnas")
        names = [name for name, _ in hparams.named_hparams(space, configurable=True)]
        axes = sorted({name.partition("layers.")[2].partition(".")[2] for name in names})
        raise NotImplementedError(f"of the three axes its search space of this model has only {', '.join(axes)}")

    return prune


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    """Of a fixed prompt."""
    prompt = torch.randint(model.config.vocab_size, PROMPT_TOKENS, generator=torch.Generator().manual_seed(1))
    logits: Tensor = model.eval()(input_ids=prompt).logits
    return logits


def describe(target: Path, logits: Tensor | None) -> list[Cell | Spread]:
    """Parameters and widths of what was written, and whether plain transformers loads it."""
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(target)
        if not torch.isfinite(logits_of(loaded)).all():
            return ["", "", "yes, logits are not finite"]
    except Exception as error:  # the answer to the question
        return ["", "", f"no: {_one_line(error)}"]
    config = loaded.config
    widths = (config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads)
    same = logits is None or bool((logits_of(loaded) - logits).abs().max() < TOLERANCE)
    by_hand = "" if logits is None else ", config edited by hand"
    answer = f"yes{by_hand}" if same else f"yes{by_hand}, but other logits"
    return [f"{loaded.num_parameters():,}", "/".join(map(str, widths)), answer]


def _imported(module: str, package: str) -> Any:
    """A peer, imported before the clock runs."""
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{package} is not installed")
    return importlib.import_module(module)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:120]


if __name__ == "__main__":
    sys.exit(main())
