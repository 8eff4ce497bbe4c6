"""Sees of a step what the metric and the second-order update need, and applies the latter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from megatron_prune.model.sites import InputSite
from megatron_prune.ops.saliency import Saliency
from megatron_prune.parallel.collectives import (
    all_reduce_sum_,
    sum_over_copies_,
    sum_over_stage_,
    tensors_beside,
)
from megatron_prune.parallel.mesh import Mesh
from megatron_prune.parallel.partition import SPLIT_AXES
from megatron_prune.pruning.groups import GroupType, MiniGroup
from megatron_prune.pruning.metrics import Diagonal, Metric, uses_hessian_diagonal
from megatron_prune.pruning.saliency import Fragment, SaliencyVectors, Sums, accumulate, random_vectors
from megatron_prune.pruning.second_order import AXIS_OF, Compensation, compensations, obc_vectors
from megatron_prune.pruning.statistics import FisherDiagonal, InputProducts, InputSquares
from megatron_prune.training.engine import PruningEngine


@dataclasses.dataclass(frozen=True)
class Measure:
    """What is measured.

    Attributes:
        metric: element score.
        diagonal: source of the Hessian's diagonal, for the metrics that use it.
        updates: types whose removal is followed by the second-order update of the weights that stay.
        seed: of the ``random`` metric.
        kernels: the saliency sums.
    """

    metric: Metric
    diagonal: Diagonal
    updates: tuple[GroupType, ...]
    seed: int
    kernels: Saliency


def process_sums(mesh: Mesh) -> Sums:
    """The sums over the processes of a mesh."""
    return Sums(
        over_stage=lambda tensor: sum_over_stage_(tensor, mesh),
        over_all=lambda tensor: all_reduce_sum_(tensor, mesh),
        over_copies=lambda tensor: sum_over_copies_(tensor, mesh),
        beside=lambda tensor: tensors_beside(tensor, mesh),
        turn=(mesh.dp_rank * mesh.tp_size + mesh.tp_rank, mesh.dp_size * mesh.tp_size),
    )


class Observer:
    """Watches the steps that prune and scores every unit at their end.

    Args:
        engine: the model; it lets this one watch.
        mesh: groups.
        measure: what to measure.
    """

    def __init__(self, engine: PruningEngine, mesh: Mesh, measure: Measure) -> None:
        self._engine = engine
        self._mesh = mesh
        self._measure = measure
        self._sums = process_sums(mesh)
        self._sites = engine.input_sites()
        self._fisher: FisherDiagonal | None = None
        outputs = [site for site in self._sites if site.axis != "stem"]
        self._squares: InputSquares | None = None
        if measure.metric == "wanda":
            self._squares = InputSquares(outputs, mesh.tp_rank, self._sums, measure.kernels)
        axes = {AXIS_OF[kind] for kind in measure.updates} | ({"heads", "ffn"} if measure.metric == "obc" else set())
        multiplied = [site for site in self._sites if site.axis in axes]
        self._products = InputProducts(multiplied, mesh.tp_rank, self._sums) if multiplied else None
        engine.observe = self.watching

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Collect while the passes of a step run."""
        engine, measure = self._engine, self._measure
        with ExitStack() as watches:
            for inputs in (self._squares, self._products):
                if inputs is not None:
                    watches.enter_context(inputs.watching(engine.model))
            if uses_hessian_diagonal(measure.metric) and measure.diagonal == "fisher":
                matrices = engine.output_matrices()
                copies, micro_batches = self._mesh.dp_size, engine.micro_batches
                self._fisher = FisherDiagonal(matrices, micro_batches, copies, self._sums, measure.kernels)
                watches.enter_context(self._fisher.watching())
            yield

    def vectors(self, step: int) -> SaliencyVectors:
        """Score every unit; only inside ``before_step``, and a collective of all processes.

        Args:
            step: optimizer step, from 0.
        """
        engine, measure = self._engine, self._measure
        partition, device = engine.partition, self._mesh.device
        if measure.metric == "random":
            return random_vectors(partition, measure.seed, step)
        if measure.metric == "obc":
            return obc_vectors(
                self._sites, partition, engine.layers, self._sums, self._product, engine.master_in_stage, device
            )
        return accumulate(
            self._fragments(),
            partition,
            measure.metric,
            measure.kernels,
            engine.layers,
            self._sums,
            device,
            self._mesh.tp_rank,
            self._squares.norms() if self._squares is not None else None,
        )

    def compensate(self, group: MiniGroup) -> None:
        """Update the weights that stay, where that is asked for, before a group is removed; a collective of stages."""
        if group.type not in self._measure.updates:
            return
        for update in compensations(group, self._sites, self._engine.partition, self._sums, self._product):
            self._apply(update)
        self._engine.follow_keepers()

    def clear(self) -> None:
        """Free what was collected."""
        self._fisher = None
        for inputs in (self._squares, self._products):
            if inputs is not None:
                inputs.clear()

    def _product(self, site: InputSite) -> Tensor:
        assert self._products is not None, "nothing was multiplied"
        return self._products.matrix(site, self._engine.partition)

    def _fragments(self) -> Iterator[Fragment]:
        adam = uses_hessian_diagonal(self._measure.metric) and self._measure.diagonal == "adam"
        for fragment in self._engine.output_fragments(second_moments=adam):
            if self._fisher is None:
                yield fragment
            else:
                diagonal = self._fisher.fragment(fragment.spec.name, fragment.start, fragment.weight.numel())
                yield dataclasses.replace(fragment, hessian=diagonal)

    @torch.no_grad()
    def _apply(self, update: Compensation) -> None:
        """Masters first, each process its fragment, then the model's own weights from the masters of all copies."""
        engine, mesh, sums = self._engine, self._mesh, self._sums
        where = (engine.partition, mesh.tp_rank)
        for entry, master in engine.masters():
            if entry.spec.name not in update.readers:
                continue
            parameter = entry.parameter
            lost = torch.zeros(len(parameter), len(update.lost), dtype=torch.float32, device=parameter.device)
            if master is not None:
                own = update.lost_of(master.values, master.start, *where)
                first = master.start // parameter.shape[1]
                lost[first : first + len(own)] = own
            (sums.over_stage if update.axis in SPLIT_AXES else sums.over_copies)(lost)
            whole = torch.zeros(parameter.numel(), dtype=parameter.dtype, device=parameter.device)
            if master is not None:
                update.apply_(master.values, master.start, lost, *where)
                whole[master.start : master.start + len(master.values)] = master.values
            sums.over_copies(whole)
            parameter.copy_(whole.view_as(parameter))
