"""A training step of this project against transformers under DeepSpeed: same model, batch, precision and optimizer.

    python benchmarks/vs_transformers.py --model 30M --micro-batch-size 4
    python benchmarks/vs_transformers.py --model 100M --precision bf16

Three sides take turns in one process: this project's engine, transformers' Llama in DeepSpeed's ZeRO-1 engine, and the
same Llama in a plain loop, both with PyTorch's fused AdamW. First the losses and the gradient norms of the first step
are compared; a step that computes something else would be no peer. The peak is the memory of tensors that a step
allocates beyond what is there before it.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import Cell, Spread, add_common_options, describe_machine, measure, positive_int, print_table, write_json
from torch import Tensor

VOCAB_SIZE = 49152
HEAD_DIM = 64
SHAPES: dict[str, dict[str, int]] = {
    "1M": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1,
           "num_hidden_layers": 1, "vocab_size": 512},
    "30M": {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 6,
            "num_hidden_layers": 6, "vocab_size": VOCAB_SIZE},
    "100M": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
             "num_hidden_layers": 20, "vocab_size": VOCAB_SIZE},
}  # fmt: skip
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.1
CLIP = 1.0
#: Relative. PyTorch sums the squares of a norm over 19 million fp32 numbers in fp32; DeepSpeed does better.
AGREEMENT = {"fp32": 5e-4, "bf16": 2e-2}
COLUMNS = ("side", "ms a step", "time of ours", "loss", "gradient norm", "peak MiB", "peak of ours")

#: Trains one step; returns its loss and the gradient norm before clipping.
Step = Callable[[], tuple[float, float]]


def main(argv: list[str] | None = None) -> int:
    """Measure and print one line for each side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="30M", help="its parameters (default %(default)s)")
    parser.add_argument("--precision", choices=sorted(AGREEMENT), default="fp32", help="default %(default)s")
    parser.add_argument("--micro-batch-size", type=positive_int, default=4, help="samples (default %(default)s)")
    parser.add_argument("--seq-length", type=positive_int, default=256, help="tokens (default %(default)s)")
    parser.add_argument("--threads", type=positive_int, default=1, help="of PyTorch (default %(default)s)")
    add_common_options(parser, rounds=7)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    print(f"{describe_machine()}; {options.model} {options.precision}, median of {options.rounds} rounds (quartiles)")
    with tempfile.TemporaryDirectory() as scratch:
        steps = make_steps(options, Path(scratch))
        first = {name: step() for name, step in steps.items()}
        disagreement = _disagreement(first, AGREEMENT[options.precision])
        if disagreement:
            print(f"no comparison: {disagreement}", file=sys.stderr)
            return 1
        peaks = {name: peak_of(step) for name, step in steps.items()}
        measured = measure(steps, options.rounds)
    rows: list[list[Cell | Spread]] = []
    for name, (loss, norm) in first.items():
        ratios: list[Cell | Spread] = [measured.ratio(name, "ours"), f"{loss:.5f}", f"{norm:.4f}"]
        memory: list[Cell | Spread] = [peaks[name] >> 20, peaks[name] / peaks["ours"]]
        rows.append([name, measured.spread_ms(name), *ratios, *memory])
    print_table(COLUMNS, rows)
    write_json(options.json, f"vs_transformers {options.model} {options.precision}", COLUMNS, rows)
    return 0


def make_steps(options: argparse.Namespace, scratch: Path) -> dict[str, Step]:
    """The three sides, each with weights of its own that start equal, on one batch."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES[options.model]
    torch.manual_seed(0)
    settings: dict[str, Any] = {**shape, "max_position_embeddings": options.seq_length, "head_dim": HEAD_DIM}
    config = LlamaConfig(**settings, tie_word_embeddings=True)
    model = LlamaForCausalLM(config)
    model.save_pretrained(scratch / "source")
    write_tokens(scratch / "text", shape["vocab_size"], 4 * options.micro_batch_size * options.seq_length)
    trainer = make_trainer(options, scratch)
    batch = next(iter(trainer.batches.training(0)))

    def ours() -> tuple[float, float]:
        result = trainer.engine.train_step(iter([batch]), LEARNING_RATE, None)
        return result.loss, result.grad_norm

    def loaded() -> Any:
        dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
        return LlamaForCausalLM.from_pretrained(scratch / "source", dtype=dtype).train()

    return {
        "ours": ours,
        "transformers + DeepSpeed": deepspeed_step(loaded(), batch, options),
        "transformers, plain loop": plain_step(loaded(), batch),
    }


def write_tokens(prefix: Path, vocab_size: int, count: int) -> None:
    """A document of random tokens: what they say does not matter to the time of a step."""
    from megatron_prune.data.indexed import IndexedDatasetWriter

    with IndexedDatasetWriter(str(prefix), np.uint16) as writer:
        writer.add_document(np.random.default_rng(0).integers(vocab_size, size=count))
        writer.finalize()


def make_trainer(options: argparse.Namespace, scratch: Path) -> Any:
    """This project's trainer in a group of one, without a run directory."""
    from megatron_prune.config import load_config
    from megatron_prune.parallel.mesh import init_process_group
    from megatron_prune.training.inputs import read_inputs, read_source
    from megatron_prune.training.report import Reporter
    from megatron_prune.training.setup import build_trainer

    flags = {
        "source": scratch / "source",
        "data-path": scratch / "text",
        "split": "1,0,0",
        "seq-length": options.seq_length,
        "micro-batch-size": options.micro_batch_size,
        "global-batch-size": options.micro_batch_size,
        "train-iters": 1,
        "lr-warmup-iters": 0,
        "weight-decay": WEIGHT_DECAY,
        "clip-grad": CLIP,
        "precision": options.precision,
        "eval-interval": 0,
    }
    config = load_config([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, save=None))
    inputs = read_inputs(config, *read_source(config))
    return build_trainer(config, inputs, init_process_group(), Reporter(None, config, False, None))


def fused_adam(model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer of every side: weight decay for matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def loss_of(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy in fp32, as transformers' own trainer computes it."""
    tokens, labels = batch
    logits = model(input_ids=tokens).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def deepspeed_step(model: Any, batch: tuple[Tensor, Tensor], options: argparse.Namespace) -> Step:
    """Transformers' model in DeepSpeed's engine with ZeRO-1 and fp32 gradient sums."""
    import deepspeed

    settings: dict[str, Any] = {
        "train_batch_size": options.micro_batch_size,
        "train_micro_batch_size_per_gpu": options.micro_batch_size,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": 1, "contiguous_gradients": False},  # as here: whole buckets would take 2 GB
        "zero_allow_untested_optimizer": True,
        "steps_per_print": sys.maxsize,
    }
    if options.precision == "bf16":
        settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=fused_adam(model), config=settings)

    def step() -> tuple[float, float]:
        loss = loss_of(engine, batch)
        engine.backward(loss)
        engine.step()
        return float(loss.detach()), float(engine.get_global_grad_norm())

    return step


def plain_step(model: Any, batch: tuple[Tensor, Tensor]) -> Step:
    """Transformers' model in the loop everyone writes first; in bf16 its optimizer works on bf16 weights."""
    optimizer = fused_adam(model)

    def step() -> tuple[float, float]:
        loss = loss_of(model, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach()), float(norm)

    return step


def peak_of(step: Step) -> int:
    """Most bytes of tensors that a step allocates beyond those there before it."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    total = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        total += change
        peak = max(peak, total)
    return peak


def _disagreement(first: dict[str, tuple[float, float]], tolerance: float) -> str | None:
    for name, values in first.items():
        for what, mine, theirs in zip(("loss", "gradient norm"), first["ours"], values, strict=True):
            if abs(mine - theirs) > tolerance * abs(mine):
                return f"the first {what} is {mine} here and {theirs} with {name}"
    return None


if __name__ == "__main__":
    sys.exit(main())
