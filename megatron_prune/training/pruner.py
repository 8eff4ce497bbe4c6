"""Decide and remove, once per optimizer step: joins the pure rules of ``pruning`` to the engine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator

import torch

from megatron_prune.architecture import Architecture
from megatron_prune.errors import MegatronPruneError, UserError
from megatron_prune.ops.saliency import Saliency
from megatron_prune.parallel.collectives import agreed, sum_over_stages_
from megatron_prune.parallel.mesh import Mesh
from megatron_prune.pruning.groups import GROUP_TYPES, GroupType, units
from megatron_prune.pruning.metrics import Diagonal, Metric
from megatron_prune.pruning.planner import Budget, Decision, SaliencyNorm, choose, strike_out
from megatron_prune.pruning.replay import Replay
from megatron_prune.pruning.saliency import FloatArray, SaliencyVectors
from megatron_prune.pruning.schedule import Schedule
from megatron_prune.pruning.smoothing import Average
from megatron_prune.training.engine import PruningEngine
from megatron_prune.training.observing import Measure, Observer


@dataclasses.dataclass(frozen=True)
class PruneRules:
    """Everything that decides what is pruned and when.

    Attributes:
        budget: targets and floors.
        schedule: pruning : gradient ratio.
        metric: element score.
        norm: how types are compared.
        seed: of the ``random`` metric.
        kernels: the saliency sums.
        diagonal: where the metrics that use it take the diagonal of the Hessian from.
        second_order: update the weights that stay at every removal.
        replay: the removals to repeat in place of choosing, or None.
        smoothing: weight of earlier measurements in the mean that decides, or None to decide by the latest alone.
    """

    budget: Budget
    schedule: Schedule
    metric: Metric
    norm: SaliencyNorm
    seed: int
    kernels: Saliency
    diagonal: Diagonal = "fisher"
    second_order: bool = False
    replay: Replay | None = None
    smoothing: float | None = None

    @property
    def updates(self) -> tuple[GroupType, ...]:
        """The types whose removal updates the weights that stay; a ledger removes what it holds, whatever the axes."""
        if not self.second_order:
            return ()
        return tuple(self.budget.axes) if self.replay is None else GROUP_TYPES


class Pruner:
    """Makes the decisions of a step inside it and carries them out after it.

    Args:
        engine: the model.
        mesh: groups.
        rules: what to do.
    """

    def __init__(self, engine: PruningEngine, mesh: Mesh, rules: PruneRules) -> None:
        self._engine = engine
        self._mesh = mesh
        self._rules = rules
        self._pending: list[Decision] = []
        measure = Measure(rules.metric, rules.diagonal, rules.updates, rules.seed, rules.kernels)
        self._observer = Observer(engine, mesh, measure)
        self._average = None if rules.smoothing is None else Average.empty(rules.smoothing, engine.partition.source)
        self._next_average = self._average

    @property
    def met(self) -> bool:
        """True when the model is at or under the target."""
        return self.met_by(self._engine.partition.architecture())

    def met_by(self, arch: Architecture) -> bool:
        """True for a model at or under the target."""
        return self._rules.budget.met(arch)

    def pace_from(self, step: int, spent: int) -> None:
        """Count the units that are due from a step on, when ``spent`` had been spent."""
        schedule = dataclasses.replace(self._rules.schedule, start=step, spent_before=spent)
        self._rules = dataclasses.replace(self._rules, schedule=schedule)

    @property
    def memory(self) -> str:
        """What a checkpoint needs to hold for decisions to go on as they would have: the mean saliency, or nothing."""
        return "" if self._average is None else self._average.to_text()

    def remember(self, memory: str) -> None:
        """Take up the memory of a checkpoint; an empty one is that of a start.

        Raises:
            UserError: it is not that of this source.
        """
        beta, source = self._rules.smoothing, self._engine.partition.source
        if beta is None:
            return
        try:
            self._average = Average.from_text(beta, source, memory) if memory else Average.empty(beta, source)
        except ValueError as error:
            raise UserError(f"the checkpoint cannot be gone on with: {error}; use another") from error

    @property
    def chosen(self) -> int:
        """Groups chosen and not carried out."""
        return len(self._pending)

    def due(self, step: int, spent: int) -> bool:
        """True when optimizer step ``step`` (0-based) has to prune."""
        return self._rules.schedule.wants(step, spent)

    def decide(self, step: int, spent: int, doubted: Callable[[Decision], bool]) -> GroupType | None:
        """Choose this step's groups from its gradients. Runs on every rank, before clipping and the update.

        Args:
            step: optimizer step, from 0.
            spent: units spent so far.
            doubted: whether the step's first choice looks wrong; it is made on every rank and must agree.

        Returns:
            The type whose removal was doubted, in which case nothing is chosen; else None.
        """
        self._pending = []
        vectors = self._measure(step)
        if not vectors.finite:
            return None
        vectors = self._smoothed(vectors)
        partition, budget, replay = self._engine.partition, self._rules.budget, self._rules.replay
        while self._rules.schedule.wants(step, spent) and not budget.met(partition.architecture()):
            if replay is None:
                decision = choose(vectors, partition, budget, self._rules.norm, self._gather)
            else:
                decision = replay.next(partition)
            if decision is None:
                parameters = partition.architecture().num_parameters()
                raise MegatronPruneError(
                    f"no group may be removed at {parameters:,} parameters and the target is not met; "
                    "raise the target or lower --prune-align, the floor of ffn and stem"
                )
            agreed(json.dumps([decision.group.type, decision.group.removed]), self._mesh)
            if not self._pending and replay is None and doubted(decision):
                self._next_average = self._average  # one odd batch leaves no trace
                return decision.group.type
            self._pending.append(decision)
            spent += units(decision.group.type, partition.source, decision.group.size)
            partition, vectors = decision.partition, strike_out(vectors, decision.group)
        return None

    def commit(self) -> Iterator[Decision]:
        """Remove what was chosen, the step having been applied; yields after each removal."""
        decisions, self._pending = self._pending, []
        self._average = self._next_average
        for decision in decisions:
            self._observer.compensate(decision.group)
            self._engine.remove(decision.partition)
            yield decision
        self._observer.clear()

    def discard(self) -> None:
        """Forget what was chosen: the step was skipped and decides nothing."""
        self._pending = []
        self._next_average = self._average
        self._observer.clear()

    def _measure(self, step: int) -> SaliencyVectors:
        return self._observer.vectors(step)

    def _smoothed(self, vectors: SaliencyVectors) -> SaliencyVectors:
        if self._average is None:
            return vectors
        self._next_average = self._average.including(self._whole(vectors))
        return self._next_average.of(vectors)

    def _whole(self, vectors: SaliencyVectors) -> SaliencyVectors:
        """The vectors of all stages, so that any layout can go on with their mean."""
        if self._mesh.pp_size == 1:
            return vectors
        return SaliencyVectors(self._gather(vectors.heads), self._gather(vectors.ffn), vectors.stem, vectors.finite)

    def _gather(self, by_layer: FloatArray) -> FloatArray:
        """Each layer's row from the stage that has the layer.

        A decision needs the minima of each, 32 bytes a layer; only a mean that is to be saved needs the vectors.
        """
        if self._mesh.pp_size == 1:
            return by_layer
        own = torch.zeros(by_layer.shape, dtype=torch.float64, device=self._mesh.device)
        rows = list(self._engine.layers)
        own[rows] = torch.from_numpy(by_layer[rows]).to(own)
        sum_over_stages_(own, self._mesh)
        return own.cpu().numpy()
