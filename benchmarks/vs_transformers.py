"""A training step of this project against transformers under DeepSpeed: same model, batch, precision and optimizer.

    python benchmarks/vs_transformers.py --model 30M --micro-batch-size 4
    python benchmarks/vs_transformers.py --model 100M --precision bf16 --micro-batch-size 1

Three sides take turns in one process: this project's engine, transformers' Llama in DeepSpeed's ZeRO-1 engine, and the
same Llama in a plain loop, all with PyTorch's fused AdamW. First the losses, the gradient norms and the gradients
themselves of the first step are compared; a step that computes something else would be no peer. The peak is the memory
of tensors that a step allocates beyond what is there before it. In bf16 this project's own fp32 step is a fourth side.
Times are processor time with one thread, wall time with more.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import (
    Cell,
    Measured,
    Spread,
    add_common_options,
    describe_machine,
    measure,
    positive_int,
    print_table,
    verdict,
    write_json,
)
from torch import Tensor

VOCAB_SIZE = 49152
HEAD_DIM = 64
#: Tied Llamas by their number of parameters; ``1M`` is for tests.
SHAPES: dict[str, dict[str, int]] = {
    "1M": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2,
           "num_hidden_layers": 1, "vocab_size": 512, "head_dim": 32},
    "30M": {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 6,
            "num_hidden_layers": 6, "vocab_size": VOCAB_SIZE, "head_dim": HEAD_DIM},
    "100M": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
             "num_hidden_layers": 20, "vocab_size": VOCAB_SIZE, "head_dim": HEAD_DIM},
}  # fmt: skip
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.1
CLIP = 1.0
#: Relative, of the loss and the norm. PyTorch sums the squares of a norm over 19 million fp32 numbers in fp32;
#: DeepSpeed does better.
AGREEMENT = {"fp32": 5e-4, "bf16": 2e-2}
#: Norm of the difference of two gradients over the norm of one. In bf16 every weight's gradient has 8 bits.
GRADIENT_AGREEMENT = {"fp32": 1e-4, "bf16": 5e-2}
#: By model and precision: time of transformers under DeepSpeed over ours, at least; our peak over its, at most.
TARGETS = {("30M", "fp32"): (1.2, 0.5), ("100M", "fp32"): (1.05, 0.7)}
#: Time of our fp32 over our bf16, at least.
LEAST_OVER_BF16 = 1.0
COLUMNS = (
    *("side", "ms a step", "time / ours", "target", "peak MiB", "our peak / its", "peak's target"),
    *("loss", "gradient norm"),
)

#: By Hugging Face name, fp32.
Gradients = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a step is made of.

    Attributes:
        micro_batch_size: samples; one micro-batch is a step.
        seq_length: tokens of a sample.
        precision: ``fp32`` or ``bf16``.
    """

    micro_batch_size: int
    seq_length: int
    precision: str = "fp32"


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
    size = f"{options.micro_batch_size} x {options.seq_length} tokens"
    print(f"{describe_machine()}; {options.model} {options.precision}, {size}, median of {options.rounds} rounds")
    with tempfile.TemporaryDirectory() as scratch:
        sides = make_sides(options, Path(scratch))
        peers = [name for name in sides if name != "ours, fp32"]
        problem = disagreement({name: sides[name] for name in peers}, options.precision)
        if problem:
            print(f"no comparison: {problem}", file=sys.stderr)
            return 1
        for name in sides.keys() - set(peers):
            sides[name].begin()
        peaks = {name: peak_of(side.step) for name, side in sides.items()}
        # Two steps are behind each side: it is warm.
        measured = measure_work({name: side.step for name, side in sides.items()}, options.rounds, warmup=0)
    rows: list[list[Cell | Spread]] = []
    for name, side in sides.items():
        (loss, norm), ratio, memory = side.first, measured.ratio(name, "ours"), peaks["ours"] / peaks[name]
        time_target, memory_target = judged(name, options.model, options.precision, ratio.median, memory)
        row: list[Cell | Spread] = [name, measured.spread_ms(name), ratio, time_target, peaks[name] >> 20, memory]
        rows.append([*row, memory_target, f"{loss:.5f}", f"{norm:.4f}"])
    print_table(COLUMNS, rows)
    write_json(options.json, f"vs_transformers {options.model} {options.precision} {size}", COLUMNS, rows)
    return 0


def judged(side: str, model: str, precision: str, ratio: float, memory: float) -> tuple[str, str]:
    """What a side's time and peak are held to, where there is a target."""
    if side == "ours, fp32":
        return verdict(ratio, least=LEAST_OVER_BF16), ""
    if side != "transformers + DeepSpeed" or (model, precision) not in TARGETS:
        return "", ""
    least, most = TARGETS[model, precision]
    return verdict(ratio, least=least), verdict(memory, most=most)


class Side:
    """One way to train a step.

    Args:
        train: trains one; asked for gradients, it puts those before clipping into the dictionary.
    """

    def __init__(self, train: Callable[[Gradients | None], tuple[float, float]]) -> None:
        self._train = train
        self.first = (0.0, 0.0)

    def step(self) -> None:
        """One more step on the same batch."""
        self._train(None)

    def begin(self) -> Gradients:
        """The first step, at weights that are the same on every side; the gradients, where the side gives them."""
        gradients: Gradients = {}
        self.first = self._train(gradients)
        return gradients


def make_sides(options: argparse.Namespace, scratch: Path) -> dict[str, Side]:
    """Each with weights of its own that start equal, on one batch."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = SHAPES[options.model]
    torch.manual_seed(0)
    config = LlamaConfig(**shape, max_position_embeddings=options.seq_length, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(scratch / "source")
    write_tokens(scratch / "text", shape["vocab_size"], 4 * options.micro_batch_size * options.seq_length)
    size = Batch(options.micro_batch_size, options.seq_length, options.precision)
    trainer = make_trainer(scratch / "source", scratch / "text", size)
    batch = next(iter(trainer.batches.training(0)))

    def loaded() -> Any:
        dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
        return LlamaForCausalLM.from_pretrained(scratch / "source", dtype=dtype).train()

    sides = {
        "ours": our_side(trainer, batch),
        "transformers + DeepSpeed": deepspeed_side(loaded(), batch, options),
        "transformers, plain loop": plain_side(loaded(), batch),
    }
    if options.precision != "fp32":
        wide = dataclasses.replace(size, precision="fp32")
        sides["ours, fp32"] = our_side(make_trainer(scratch / "source", scratch / "text", wide), batch)
    return sides


def our_side(trainer: Any, batch: tuple[Tensor, Tensor]) -> Side:
    """This project's engine as training uses it."""

    def train(gradients: Gradients | None) -> tuple[float, float]:
        def copy_gradients() -> None:
            if gradients is not None:
                for entry in trainer.engine.parameters():
                    parameter = entry.parameter
                    grad = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
                    gradients[entry.spec.name] = grad.reshape(parameter.shape).float().clone()

        result = trainer.engine.train_step(iter([batch]), LEARNING_RATE, copy_gradients)
        return result.loss, result.grad_norm

    return Side(train)


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


def deepspeed_side(model: Any, batch: tuple[Tensor, Tensor], options: argparse.Namespace) -> Side:
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

    def train(gradients: Gradients | None) -> tuple[float, float]:
        del gradients  # its norm speaks for them
        loss = loss_of(engine, batch)
        engine.backward(loss)
        engine.step()
        return float(loss.detach()), float(engine.get_global_grad_norm())

    return Side(train)


def plain_side(model: Any, batch: tuple[Tensor, Tensor]) -> Side:
    """Transformers' model in the loop everyone writes first; in bf16 its optimizer works on bf16 weights."""
    optimizer = fused_adam(model)

    def train(gradients: Gradients | None) -> tuple[float, float]:
        loss = loss_of(model, batch)
        loss.backward()
        if gradients is not None:
            gradients |= {name: parameter.grad.float() for name, parameter in model.named_parameters()}
            gradients |= {name: grad.clone() for name, grad in gradients.items()}  # clipping works in place
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach()), float(norm)

    return Side(train)


def write_tokens(prefix: Path, vocab_size: int, count: int) -> None:
    """A document of random tokens: what they say does not matter to the time of a step."""
    from megatron_prune.data.indexed import IndexedDatasetWriter

    with IndexedDatasetWriter(str(prefix), np.uint16) as writer:
        writer.add_document(np.random.default_rng(0).integers(vocab_size, size=count))
        writer.finalize()


def make_trainer(source: Path, text: Path, batch: Batch, flags: Mapping[str, Any] | None = None) -> Any:
    """This project's trainer in a group of one, without a run directory.

    Args:
        source: a Hugging Face model, or its config alone for random weights.
        text: of :func:`write_tokens`.
        batch: size and precision of a step.
        flags: more settings by the names of the flags, e.g. those of pruning.
    """
    from megatron_prune.config import load_config
    from megatron_prune.parallel.mesh import init_process_group
    from megatron_prune.training.inputs import read_inputs, read_source
    from megatron_prune.training.report import Reporter
    from megatron_prune.training.setup import build_trainer

    settings: dict[str, Any] = {
        "source": source,
        "data-path": text,
        "split": "1,0,0",
        "seq-length": batch.seq_length,
        "micro-batch-size": batch.micro_batch_size,
        "global-batch-size": batch.micro_batch_size,
        "train-iters": 1000,
        "lr": LEARNING_RATE,
        "lr-warmup-iters": 0,
        "weight-decay": WEIGHT_DECAY,
        "clip-grad": CLIP,
        "precision": batch.precision,
        "eval-interval": 0,
        **(flags or {}),
    }
    config = load_config([word for name, value in settings.items() for word in (f"--{name}", str(value))])
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, save=None))
    inputs = read_inputs(config, *read_source(config))
    return build_trainer(config, inputs, init_process_group(), Reporter(None, config, False, None))


def clock() -> float:
    """Seconds of processor time in a process of one thread, where other processes hardly count, else of the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def measure_work(callables: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> Measured:
    """:func:`timing.measure` by :func:`clock`: the callables take turns, and are to be compared within a round."""
    seconds: dict[str, list[float]] = {name: [] for name in callables}

    def timed(name: str) -> Callable[[], None]:
        def run() -> None:
            began = clock()
            callables[name]()
            seconds[name].append(clock() - began)

        return run

    measure({name: timed(name) for name in callables}, rounds, warmup)
    return Measured({name: values[warmup:] for name, values in seconds.items()})


def peak_of(step: Callable[[], object]) -> int:
    """Most bytes of tensors that a step allocates beyond those there before it."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    total = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        total += change
        peak = max(peak, total)
    return peak


def disagreement(sides: dict[str, Side], precision: str) -> str | None:
    """Make the first step of every side; what differs from ours by more than rounding explains, or None."""
    gradients = {name: side.begin() for name, side in sides.items()}
    mine = sides["ours"].first
    for name, side in sides.items():
        for what, value, other in zip(("loss", "gradient norm"), mine, side.first, strict=True):
            if abs(value - other) > AGREEMENT[precision] * abs(value):
                return f"the first {what} is {value} here and {other} with {name}"
    theirs = gradients["transformers, plain loop"]
    squares = sum(float((grad - theirs[name]).square().sum()) for name, grad in gradients["ours"].items())
    norm = sum(float(grad.square().sum()) for grad in theirs.values()) ** 0.5
    print(f"first gradients: difference {squares**0.5 / norm:.1e} of their norm")
    if squares**0.5 > GRADIENT_AGREEMENT[precision] * norm:
        return f"the first gradients differ by {squares**0.5 / norm:.1e} of their norm"
    return None


if __name__ == "__main__":
    sys.exit(main())
