"""The only module that talks to a DeepSpeed engine.

One engine path serves every layout: PipelineModule under PipelineEngine with ZeRO-1. DeepSpeed's flat buffers cannot
change size, so a change of shape ends the engine and starts a new one on the same module; starting, compacting and
resuming are the same routine and differ only in where the states come from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from torch import Tensor

from megatron_prune.architecture import TensorSpec
from megatron_prune.model.masks import ModelMasks
from megatron_prune.model.pipeline import (
    NamedParameter,
    follow_partition,
    named_parameters,
    set_masks,
    stage_modules,
)
from megatron_prune.model.sites import InputSite, input_sites
from megatron_prune.parallel.collectives import sum_over_stage_, sum_to_main_
from megatron_prune.parallel.mesh import Mesh
from megatron_prune.parallel.partition import Partition, is_split
from megatron_prune.parallel.placement import deposit_, take
from megatron_prune.parallel.shared import SharedRows, follow_keepers_, shared_rows, sum_gradients_
from megatron_prune.parallel.states import MOMENTS, STATE_KINDS, SlicedStates, StateFragment, StateKind, StateSource
from megatron_prune.pruning.saliency import Fragment, is_output_matrix
from megatron_prune.pruning.surgery import dead_elements, zero_fragment_, zero_tensor_
from megatron_prune.training.batches import Sample
from megatron_prune.training.optimizer_memory import (
    AdamSettings,
    held_states,
    link_moments,
    make_moments,
    make_optimizer,
    master_fragment,
    output_fragments,
)


@dataclasses.dataclass(frozen=True)
class StepResult:
    """Outcome of one optimizer step.

    Attributes:
        loss: mean loss over all tokens of the global batch.
        grad_norm: norm of the whole gradient before clipping.
        applied: False when a non-finite gradient made the step a no-op.
    """

    loss: float
    grad_norm: float
    applied: bool


class PruningEngine:
    """A pipeline engine whose model can lose groups logically at any step and shrink physically.

    Args:
        pipeline: this rank's stage; reused for the life of the run, since a fresh one leaks process groups.
        partition: the placement to start in.
        config: DeepSpeed's JSON, derived from ours.
        adam: optimizer settings.
        mesh: groups.
        precision: dtype of the model's own weights.
        sequence_parallel: as the pipeline was built.

    Attributes:
        observe: what to do around the passes of a step that calls ``before_step``.
    """

    def __init__(
        self,
        pipeline: PipelineModule,
        partition: Partition,
        config: Mapping[str, Any],
        adam: AdamSettings,
        mesh: Mesh,
        precision: torch.dtype,
        sequence_parallel: bool,
    ) -> None:
        self.partition = partition
        self._pipeline = pipeline
        self._config = dict(config)
        self._adam = adam
        self._mesh = mesh
        self._precision = precision
        self._sequence_parallel = sequence_parallel
        self.observe: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
        self._before_step: Callable[[], None] | None = None
        self._steps = True
        self._engine: Any = None
        self._has_moments = False
        self._adam_steps = 0
        self._parameters: list[NamedParameter] = []
        self._shared: list[tuple[SharedRows, NamedParameter]] = []

    # -- start, compact, resume -------------------------------------------------------------------------------------

    def start(self, partition: Partition, states: StateSource | SlicedStates, adam_steps: int) -> None:
        """Give the module parameters of the partition's sizes, start an engine and fill its optimizer.

        Args:
            partition: the new placement.
            states: where master weights (and, after the first step, moments) come from.
            adam_steps: optimizer steps the moments have seen; 0 leaves them fresh.
        """
        self.partition = partition
        self._parameters = named_parameters(self._pipeline, partition)
        for entry in self._parameters:
            self._place(entry, states)
        follow_partition(self._pipeline, partition, self._mesh.tp_rank)
        self._find_shared_rows()
        self._engine = self._initialize()
        self._has_moments = False
        self._adam_steps = adam_steps
        if adam_steps:
            make_moments(self._engine.optimizer, adam_steps)
            self._has_moments = True
        for kind in STATE_KINDS if adam_steps else STATE_KINDS[:1]:
            for entry in self._parameters:
                self._fill(entry, kind, states)

    def set_batch(self, micro_batch_size: int, micro_batches: int) -> None:
        """Size of a forward pass and their number per step and copy, of the engines started from now on."""
        self._config |= {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": micro_batches,
            "train_batch_size": micro_batch_size * micro_batches * self._mesh.dp_size,
        }

    def restart(self, partition: Partition, states: StateSource | SlicedStates, adam_steps: int) -> None:
        """As :meth:`start`, in place of the engine that runs."""
        self._stop()
        self.start(partition, states, adam_steps)

    def _place(self, entry: NamedParameter, states: StateSource | SlicedStates) -> None:
        shape = self.partition.shape(entry.spec, self._mesh.tp_rank)
        physical = self._fragment(states, entry.spec, "master", 0, math.prod(shape)).view(shape)
        entry.replace(physical.to(self._mesh.device, self._precision))

    def _fragment(
        self, states: StateSource | SlicedStates, spec: TensorSpec, kind: StateKind, start: int, numel: int
    ) -> Tensor:
        """This rank's fragment of a state; whole tensors are a collective, so every rank asks, if only for nothing."""
        where = (self.partition, self._mesh.tp_rank, start, numel)
        if isinstance(states, SlicedStates):
            return states.fragment(spec, kind, *where)
        return take(states(spec, kind), spec, *where)  # no name for the whole tensor: one at a time

    def compact(self, partition: Partition, adam_steps: int) -> None:
        """Move to a partition with fewer slots, keeping every live weight, master and moment.

        Units may change their tensor-parallel rank. A rank holds its own old and new fragments and, one at a time, a
        whole logical tensor that the ranks of its stage add up.
        """
        old, tp_rank = self.partition, self._mesh.tp_rank
        fragments = {(f.spec.name, f.kind): f for _, f in self._fragments()}
        self._stop()

        def states(spec: TensorSpec, kind: StateKind) -> Tensor:
            whole = torch.zeros(old.logical_shape(spec), dtype=torch.float32, device=self._mesh.device)
            own = fragments.get((spec.name, kind))
            if own is not None:
                deposit_(whole, own.values, spec, old, tp_rank, own.start)
            sum_over_stage_(whole, self._mesh)
            return whole

        self.start(partition, states, adam_steps)

    def _initialize(self) -> Any:
        optimizer = make_optimizer(self._parameters, self._adam)
        with contextlib.redirect_stdout(io.StringIO()):  # BF16_Optimizer prints its memory at every compaction
            engine, *_ = deepspeed.initialize(model=self._pipeline, optimizer=optimizer, config=self._config)
        take_step = engine._take_model_step

        def step_with_hook(lr_kwargs: Any) -> None:
            # After reduction and before clipping: the one place where ZeRO-1 gradients can be read.
            if self._before_step is not None:
                self._before_step()
            if self._steps:
                take_step(lr_kwargs)

        engine._take_model_step = step_with_hook
        for name in ("allreduce_gradients", "_bf16_reduce_grads"):  # before the sum over copies; one per optimizer
            setattr(engine, name, self._after_shared_sums(getattr(engine, name)))
        return engine

    def _after_shared_sums(self, reduce: Callable[..., None]) -> Callable[..., None]:
        def reduce_all(*args: Any, **kwargs: Any) -> None:
            if self._shared:
                sum_gradients_([(rows, self._gradient(entry)) for rows, entry in self._shared], self._mesh)
            reduce(*args, **kwargs)

        return reduce_all

    def _gradient(self, entry: NamedParameter) -> Tensor:
        """The fp32 gradient of a parameter summed over micro-batches, before the copies are added up."""
        parameter: Any = entry.parameter
        grad: Tensor = parameter._hp_grad if self._engine.using_bf16_optimizer else parameter.grad
        return grad

    def _find_shared_rows(self) -> None:
        found = [
            (shared_rows(entry.spec, self.partition, self._mesh, self._sequence_parallel), entry)
            for entry in self._parameters
        ]
        self._shared = [(rows, entry) for rows, entry in found if rows is not None]

    def _stop(self) -> None:
        self._engine.destroy()
        # The last graph has hooks that hold the engine, in C++, where the garbage collector cannot see the cycle.
        self._engine.loss = self._engine.total_loss = None
        self._engine.pipe_buffers.clear()
        # The wrappers' closures would keep the engine alive.
        del self._engine._take_model_step, self._engine.allreduce_gradients, self._engine._bf16_reduce_grads
        self._engine = None
        for hooks in ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks"):
            getattr(self._pipeline, hooks).clear()
        for entry in self._parameters:
            entry.replace(torch.empty(0))
        gc.collect()
        torch.compiler.reset()  # what was compiled holds for the old sizes; a few such leftovers and dynamo gives up
        if self._mesh.device.type == "cuda":
            torch.cuda.empty_cache()  # blocks of the old sizes would lie idle beside the new ones

    @property
    def model(self) -> torch.nn.Module:
        """This rank's stage."""
        module: torch.nn.Module = self._pipeline
        return module

    @property
    def micro_batches(self) -> int:
        """Forward passes per step and copy."""
        return int(self._engine.gradient_accumulation_steps())

    def input_sites(self) -> tuple[InputSite, ...]:
        """Where this stage's matrices get their inputs, the same objects for the life of the run."""
        return tuple(input_sites(stage_modules(self._pipeline, self.partition)))

    def set_masks(self, masks: ModelMasks) -> None:
        """Multiply by masks from now on; empty ones for a model as it is."""
        set_masks(self._pipeline, self.partition, masks)

    def parameters(self) -> tuple[NamedParameter, ...]:
        """This rank's parameters, in model order."""
        return tuple(self._parameters)

    # -- optimizer memory -------------------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers of this stage."""
        return tuple(sorted({e.spec.layer for e in self._parameters if e.spec.layer is not None}))

    def state_fragments(self) -> Iterator[StateFragment]:
        """This rank's pieces of every state, in model order, a tied head left out. Moments appear after a step."""
        return (fragment for entry, fragment in self._fragments() if not entry.is_stage_copy)

    def _fragments(self) -> Iterator[tuple[NamedParameter, StateFragment]]:
        return held_states(self._parameters, MOMENTS if self._has_moments else ())

    def masters(self) -> Iterator[tuple[NamedParameter, StateFragment | None]]:
        """Every parameter, a tied head's copy included, with this rank's piece of its master or None."""
        return ((entry, master_fragment(entry)) for entry in self._parameters)

    def output_matrices(self) -> dict[str, torch.nn.Parameter]:
        """The parameters ``o_proj`` and ``down_proj`` of this stage, by name; those of now."""
        return {e.spec.name: e.parameter for e in self._parameters if is_output_matrix(e.spec)}

    def output_fragments(self, second_moments: bool = False) -> Iterator[Fragment]:
        """Weights and gradients of ``o_proj`` and ``down_proj`` this rank owns; only inside ``before_step``.

        Args:
            second_moments: take Adam's second moment, corrected for its zero start, for the diagonal of the Hessian:
                that of the gradients so far, clipped, without this step's. NaN before the first step.
        """
        correction = 1 - self._adam.betas[1] ** self._adam_steps if self._has_moments else math.nan
        return output_fragments(self._parameters, correction if second_moments else None)

    def remove(self, after: Partition) -> None:
        """Zero every unit that ``after`` no longer holds, in weights, masters and moments."""
        by_name: dict[str, list[tuple[int, Any]]] = {}
        for spec, dim, index in dead_elements(self.partition, after, self._mesh.tp_rank):
            by_name.setdefault(spec.name, []).append((dim, index))
        for entry in self._parameters:
            for dim, index in by_name.get(entry.spec.name, ()):
                zero_tensor_(entry.parameter, dim, index)
        for _, fragment in self._fragments():
            for dim, index in by_name.get(fragment.spec.name, ()):
                shape = self.partition.shape(fragment.spec, self._mesh.tp_rank)
                zero_fragment_(fragment.values, fragment.start, shape, dim, index)
        self.partition = after
        follow_partition(self._pipeline, after, self._mesh.tp_rank)
        self._find_shared_rows()

    def master_on_main(self, spec: TensorSpec) -> Tensor:
        """The logical fp32 master of one tensor, true on the main process; a collective of all processes."""
        whole = self._own_master(spec, [entry for entry in self._parameters if not entry.is_stage_copy])
        sum_to_main_(whole, self._mesh)
        return whole

    def master_in_stage(self, spec: TensorSpec) -> Tensor:
        """The logical fp32 master of one tensor of this stage; a collective of the stage."""
        whole = self._own_master(spec, self._parameters)
        sum_over_stage_(whole, self._mesh)
        return whole

    def _own_master(self, spec: TensorSpec, parameters: Iterable[NamedParameter]) -> Tensor:
        whole = torch.zeros(self.partition.logical_shape(spec), dtype=torch.float32, device=self._mesh.device)
        for entry, master in held_states(parameters, ()):
            if entry.spec.name == spec.name:
                deposit_(whole, master.values, spec, self.partition, self._mesh.tp_rank, master.start)
        return whole

    def _fill(self, entry: NamedParameter, kind: StateKind, states: StateSource | SlicedStates) -> None:
        mapping = entry.parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            self._fragment(states, entry.spec, kind, 0, 0)
            return
        address = mapping.lp_fragment_address
        fragment = self._fragment(states, entry.spec, kind, address.start, address.numel)
        with torch.no_grad():
            mapping.get_hp_fragment(None if kind == "master" else kind).copy_(fragment)

    # -- steps ------------------------------------------------------------------------------------------------------

    def train_step(self, batches: Iterable[Sample], lr: float, before_step: Callable[[], None] | None) -> StepResult:
        """One optimizer step over this rank's micro-batches.

        Args:
            batches: ``(tokens [B, S], next tokens [B, S])`` int64, one pair per micro-batch, and what a teacher adds.
            lr: learning rate of the step.
            before_step: called once with reduced, unclipped gradients in place.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._before_step = before_step
        with self.observe() if before_step is not None else contextlib.nullcontext():
            loss = self._engine.train_batch(iter(batches))
        self._before_step = None
        applied = bool(self._engine.was_step_applied())
        if applied and not self._has_moments:
            link_moments(self._engine.optimizer)
            self._has_moments = True
        self._adam_steps += applied
        self.follow_keepers()
        return StepResult(float(loss), float(self._engine.get_global_grad_norm()), applied)

    def calibrate(self, batches: Iterable[Sample], read: Callable[[], None]) -> float:
        """Gradients of this rank's micro-batches without a step; a start of another engine must follow.

        Args:
            batches: as for :meth:`train_step`, as many as :meth:`set_batch` said when this engine was started.
            read: called once with the reduced gradients in place.

        Returns:
            The mean loss.
        """
        self._before_step, self._steps = read, False
        self._engine.global_steps = 1  # DeepSpeed would print a line about step 0
        with self.observe():
            loss = self._engine.train_batch(iter(batches))
        self._before_step, self._steps = None, True
        return float(loss)

    @torch.no_grad()
    def follow_keepers(self) -> None:
        """Give copied KV heads the weights of the ranks that train them; masters of the other ranks mean nothing."""
        copied = [(rows, entry.parameter.data) for rows, entry in self._shared if is_split(entry.spec)]
        if copied:
            follow_keepers_(copied, self._mesh)

    def evaluate(self, batches: Iterable[Sample], count: int) -> float:
        """Mean loss over ``count`` micro-batches per copy."""
        return float(self._engine.eval_batch(iter(batches), num_micro_batches=count))


def prepare_deepspeed() -> None:
    """Attach DeepSpeed to the process group, keep it from building what training never calls, and keep it quiet."""
    # The op serves inference_all_reduce only and would compile for minutes on a CPU machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # torch renames collectives faster than the pinned DeepSpeed follows; nothing a user could do.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
