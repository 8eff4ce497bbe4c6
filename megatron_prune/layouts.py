"""Which layouts of a run fit a GPU: the verdict on one, a table of all, and the one to start with."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_prune.architecture import Architecture
from megatron_prune.config import Config
from megatron_prune.memory import (
    GIB,
    Memory,
    compacts,
    copies_of_model,
    num_micro_batches,
    stage_memory,
    worst_stage,
)

#: Sizes that are tried; eight tensor parallel processes are one node.
SIZES = (1, 2, 4, 8)
#: Part of a GPU left to what the estimate does not count: work space of kernels, NCCL, fragmentation.
RESERVE = 0.1
RULE = (
    "recommended: what fits with the fewest GPUs per copy of the model, then the fewest stages; tensor parallel\n"
    "processes stay in one node of 8. As the run is configured, or with --recompute where nothing fits without."
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to arrange the GPUs, at the shape of the source.

    Attributes:
        config: the run under this layout.
        copies: data parallel size.
        stages: memory of every pipeline stage.
        problem: why the run would refuse it whatever the memory, or empty.
    """

    config: Config
    copies: int
    stages: tuple[Memory, ...]
    problem: str

    @property
    def tensor(self) -> int:
        """Tensor parallel size."""
        return self.config.parallel.tensor_model_parallel_size

    @property
    def pipeline(self) -> int:
        """Pipeline stages."""
        return self.config.parallel.pipeline_model_parallel_size

    @property
    def micro_batches(self) -> int:
        """Micro-batches per copy and step."""
        return num_micro_batches(self.config, self.copies)

    @property
    def bubble(self) -> float:
        """Part of a step in which a stage waits for the others."""
        return bubble(self.pipeline, self.micro_batches)

    def worst(self, recompute: bool) -> Memory:
        """The stage whose peak is highest."""
        return worst_stage(self.stages, recompute, compacts(self.config))

    def peak(self, recompute: bool) -> int:
        """Bytes that the fullest GPU ever holds."""
        return self.worst(recompute).peak(recompute, compacts(self.config))

    def fits(self, gpu_bytes: float, recompute: bool) -> bool:
        """True when it runs and leaves :data:`RESERVE` of the GPU free."""
        return not self.problem and self.peak(recompute) <= gpu_bytes * (1 - RESERVE)


def bubble(stages: int, micro_batches: int) -> float:
    """Idle part of a 1F1B pipeline: ``(PP - 1) / (micro-batches + PP - 1)``."""
    return (stages - 1) / (micro_batches + stages - 1)


def make_layout(config: Config, source: Architecture, num_gpus: int) -> Layout:
    """The layout of ``config`` on so many GPUs.

    Raises:
        UserError: it does not divide the GPUs, or has more stages than layers.
    """
    copies = copies_of_model(config, num_gpus)
    return Layout(config, copies, stage_memory(source, config, num_gpus), _problem(config, copies))


def all_layouts(config: Config, source: Architecture, num_gpus: int) -> tuple[Layout, ...]:
    """Every layout of :data:`SIZES` that divides the GPUs, fewest GPUs per copy first, then fewest stages."""
    pairs = sorted(itertools.product(SIZES, SIZES), key=lambda pair: (math.prod(pair), pair[1]))
    return tuple(
        make_layout(_arranged(config, tensor, stages), source, num_gpus)
        for tensor, stages in pairs
        if num_gpus % (tensor * stages) == 0 and stages <= source.num_layers
    )


def recommended(layouts: Sequence[Layout], gpu_bytes: float) -> Layout | None:
    """The first that fits as configured, else the first that fits with recomputation (see :data:`RULE`)."""
    for recompute in sorted({layout.config.train.recompute for layout in layouts} | {True}):
        for layout in layouts:
            if layout.fits(gpu_bytes, recompute):
                return layout
    return None


def fit_sentence(config: Config, source: Architecture, num_gpus: int, gpu_bytes: float) -> str:
    """One sentence: whether the configured layout fits, with what, and what else would.

    Raises:
        UserError: the layout does not divide the GPUs, or has more stages than layers.
    """
    layout = make_layout(config, source, num_gpus)
    if layout.problem:
        return f"cannot run: {layout.problem}; change one of them"
    gpu, needs = f"{gpu_bytes / GIB:g} GiB", _needs(layout, gpu_bytes)
    if layout.fits(gpu_bytes, config.train.recompute):
        return f"fits {gpu}: {needs}"
    ways = list(_ways(layout, source, num_gpus, gpu_bytes))
    micro = config.train.micro_batch_size
    no_way = f"no layout of {num_gpus} GPU(s) fits at --micro-batch-size {micro}: use more or larger GPUs"
    advice = "try " + ", or ".join(ways) if ways else no_way
    return f"does not fit {gpu}: {needs}; {advice}"


def format_layouts(layouts: Sequence[Layout], gpu_bytes: float) -> str:
    """Aligned text for a terminal, without a newline at the end."""
    best = recommended(layouts, gpu_bytes)
    rows = [("TP", "PP", "DP", "micro-batches", "bubble", "GiB/GPU", "recomputed", "compacting")]
    for layout in layouts:
        compaction = max(memory.compaction for memory in layout.stages) / GIB
        rows.append(
            (
                str(layout.tensor),
                str(layout.pipeline),
                str(layout.copies),
                f"{layout.micro_batches:,}",
                f"{layout.bubble:.1%}",
                f"{_most(layout, recompute=False) / GIB:,.1f}",
                f"{_most(layout, recompute=True) / GIB:,.1f}",
                f"{compaction:,.1f}" if compacts(layout.config) else "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    verdicts = ["", *(f"  {_verdict(layout, gpu_bytes)}" for layout in layouts)]
    marks = ["", *("  <- recommended" if layout is best else "" for layout in layouts)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + verdict + mark
        for row, verdict, mark in zip(rows, verdicts, marks, strict=True)
    ]
    usable = f"{gpu_bytes * (1 - RESERVE) / GIB:.1f}"
    fitting = (
        f"fits: at most {usable} of {gpu_bytes / GIB:g} GiB; a tenth is for kernels and NCCL, which are not counted."
    )
    return "\n".join([*lines, "", fitting, RULE if best else _nothing(layouts, gpu_bytes)])


def _nothing(layouts: Sequence[Layout], gpu_bytes: float) -> str:
    """One sentence in place of the rule where no layout can be recommended: why, and what to change."""
    possible = [layout for layout in layouts if not layout.problem]
    if not possible:
        train = layouts[0].config.train
        return (
            f"no layout can run: change --global-batch-size {train.global_batch_size}, --micro-batch-size "
            f"{train.micro_batch_size} or --gpus so that the batch is a multiple of micro-batch x DP."
        )
    least = min(possible, key=lambda layout: layout.peak(recompute=True))
    needs = least.peak(recompute=True) / (1 - RESERVE) / GIB
    micro = least.config.train.micro_batch_size
    smaller = f"a --micro-batch-size below {micro}, " if micro > 1 else ""
    return (
        f"no layout fits: the least, TP {least.tensor} x PP {least.pipeline} with --recompute, needs GPUs of "
        f"{needs:.1f} GiB; use {smaller}more GPUs or larger ones."
    )


def layouts_dict(layouts: Sequence[Layout], gpu_bytes: float) -> list[dict[str, Any]]:
    """JSON-ready form of the table; memory is in bytes, of the fullest GPU."""
    best = recommended(layouts, gpu_bytes)
    return [
        {
            **layout_dict(layout),
            "memory": _most(layout, recompute=False),
            "memory_recomputed": _most(layout, recompute=True),
            "compaction": max(memory.compaction for memory in layout.stages) if compacts(layout.config) else 0,
            "fits": layout.fits(gpu_bytes, layout.config.train.recompute),
            "fits_recomputed": layout.fits(gpu_bytes, recompute=True),
            "verdict": _verdict(layout, gpu_bytes),
            "recommended": layout is best,
        }
        for layout in layouts
    ]


def layout_dict(layout: Layout) -> dict[str, Any]:
    """JSON-ready form of the arrangement alone."""
    return {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "sequence_parallel": layout.config.parallel.sequence_parallel,
        "data_parallel_size": layout.copies,
        "micro_batches": layout.micro_batches,
        "bubble": layout.bubble,
    }


def _arranged(config: Config, tensor: int, pipeline: int) -> Config:
    parallel = dataclasses.replace(
        config.parallel, tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline
    )
    return dataclasses.replace(config, parallel=parallel)


def _problem(config: Config, copies: int) -> str:
    train, tensor, seq = config.train, config.parallel.tensor_model_parallel_size, config.data.seq_length
    if train.global_batch_size % (train.micro_batch_size * copies):
        return f"batch {train.global_batch_size} is no multiple of micro-batch {train.micro_batch_size} x DP {copies}"
    if config.parallel.sequence_parallel and seq % tensor:
        return f"sequence {seq} is no multiple of TP {tensor}"
    return ""


def _most(layout: Layout, recompute: bool) -> int:
    """What training holds on the fullest stage, compaction left aside."""
    return worst_stage(layout.stages, recompute).total(recompute)


def _parts(layout: Layout, recompute: bool) -> dict[str, float]:
    """GiB of what lies on the fullest stage at its peak, by name."""
    memory = layout.worst(recompute)
    sizes = {"weights": memory.weights, "gradients": memory.gradients}
    if memory.teacher:
        sizes["teacher"] = memory.teacher
    states = {"fp32 masters": memory.masters, "moments": memory.moments}
    if layout.peak(recompute) > memory.total(recompute):
        sizes |= {f"{name} old and new": 2 * size for name, size in states.items()}
        sizes["one whole parameter"] = memory.compaction + memory.teacher - sum(sizes.values())
    else:
        sizes |= states
        if memory.statistics:
            sizes["statistics of a step that prunes"] = memory.statistics
        working = memory.working(recompute)
        names = {memory.reduction: "reduction of gradients", memory.solving: "second-order solving"}
        sizes[names.get(working, "activations")] = working
    return {name: size / GIB for name, size in sizes.items()}


def _needs(layout: Layout, gpu_bytes: float) -> str:
    """What the fullest stage needs, when, and with what."""
    recompute = layout.config.train.recompute
    memory, peak = layout.worst(recompute), layout.peak(recompute)
    when = " while tensors are cut" if peak > memory.total(recompute) else ""
    parts = ", ".join(f"{name} {size:.1f}" for name, size in _parts(layout, recompute).items())
    usable = f"{gpu_bytes * (1 - RESERVE) / GIB:.1f} usable GiB"
    return f"stage {memory.stage} needs {peak / GIB:.1f} of {usable}{when} ({parts})"


def _verdict(layout: Layout, gpu_bytes: float) -> str:
    """The last column of the table."""
    recompute = layout.config.train.recompute
    if layout.problem:
        return f"cannot run: {layout.problem}"
    if layout.fits(gpu_bytes, recompute):
        return "fits"
    if layout.fits(gpu_bytes, recompute=True):
        return "fits with --recompute"
    parts = sorted(_parts(layout, recompute=True).items(), key=lambda part: -part[1])[:2]
    return "does not fit: " + ", ".join(f"{name} {size:.1f}" for name, size in parts)


def _ways(layout: Layout, source: Architecture, num_gpus: int, gpu_bytes: float) -> Iterator[str]:
    """Single changes that make a run fit, as flags with what they need: recomputation, micro-batch, layout."""
    config, recompute = layout.config, layout.config.train.recompute
    if not recompute and layout.fits(gpu_bytes, recompute=True):
        yield f"--recompute ({layout.peak(recompute=True) / GIB:.1f} GiB)"
    micro = config.train.micro_batch_size // 2
    while micro:
        smaller = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch_size=micro))
        found = make_layout(smaller, source, num_gpus)
        if found.fits(gpu_bytes, recompute):
            yield f"--micro-batch-size {micro} ({found.peak(recompute) / GIB:.1f} GiB)"
            break
        micro //= 2
    best = recommended(all_layouts(config, source, num_gpus), gpu_bytes)
    if best is None:
        return
    with_recompute = not best.fits(gpu_bytes, recompute)
    if with_recompute and best.config.parallel == config.parallel:
        return  # --recompute alone was said above
    sizes = [f"--tensor-model-parallel-size {best.tensor}"] if best.tensor != layout.tensor else []
    sizes += [f"--pipeline-model-parallel-size {best.pipeline}"] if best.pipeline != layout.pipeline else []
    extra = ["--recompute"] if with_recompute else []
    yield f"{' '.join([*sizes, *extra])} ({best.peak(recompute or with_recompute) / GIB:.1f} GiB)"
