"""From weight and gradient fragments to one score per head, FFN channel and stem channel (paper 3.2).

Only the output layer group is measured: column sums over ``o_proj`` give heads, over ``down_proj`` FFN channels, row
sums of both over all layers give stem channels. A rank reduces whatever fragments of those matrices it owns; the sums
of all ranks add up, so only vectors travel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_prune.architecture import TensorSpec
from megatron_prune.ops.saliency import Piece, Saliency
from megatron_prune.parallel.partition import DEAD, IntArray, Partition, live
from megatron_prune.pruning.metrics import Metric, element_score

FloatArray = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Fragment:
    """A contiguous piece of one matrix as an optimizer shard holds it.

    Attributes:
        spec: the matrix.
        weight: flat master weights ``[numel]``.
        grad: flat gradient of the mean loss ``[numel]``.
        start: position of the first element in the flattened physical matrix.
        shape: physical ``(rows, columns)``.
        hessian: flat diagonal of the Hessian ``[numel]`` fp32, for the metrics that use it.
    """

    spec: TensorSpec
    weight: Tensor
    grad: Tensor
    start: int
    shape: tuple[int, int]
    hessian: Tensor | None = None


def _alone(tensor: Tensor) -> None:
    """The sum over a group of one."""


@dataclasses.dataclass(frozen=True)
class Sums:
    """In-place sums over processes; by default there is only this one.

    Attributes:
        over_stage: over the copies and tensor-parallel ranks of this pipeline stage.
        over_all: over all processes.
        over_copies: over the copies of this shard.
        beside: one tensor of every tensor-parallel rank of this copy's stage, in rank order.
        turn: this process's place in its stage and the processes there are, for work that they share out.
    """

    over_stage: Callable[[Tensor], None] = _alone
    over_all: Callable[[Tensor], None] = _alone
    over_copies: Callable[[Tensor], None] = _alone
    beside: Callable[[Tensor], list[Tensor]] = lambda tensor: [tensor]
    turn: tuple[int, int] = (0, 1)


@dataclasses.dataclass(frozen=True)
class SaliencyVectors:
    """Sums of element scores in source coordinates, fp64; ``inf`` where the unit is gone.

    Attributes:
        heads: ``[layers, source heads]``.
        ffn: ``[layers, source channels]``.
        stem: ``[source hidden]``.
        finite: False when a live sum is NaN or infinite: nothing may be decided from these vectors.
    """

    heads: FloatArray
    ffn: FloatArray
    stem: FloatArray
    finite: bool = True


def is_output_matrix(spec: TensorSpec) -> bool:
    """True for the matrices whose elements are scored (the paper's "Efficient Calculation")."""
    return spec.name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight"))


@torch.no_grad()
def accumulate(
    fragments: Iterable[Fragment],
    partition: Partition,
    metric: Metric,
    kernels: Saliency,
    layers: Sequence[int],
    sums: Sums,
    device: torch.device,
    tp_rank: int = 0,
    norms: Mapping[str, Tensor] | None = None,
) -> SaliencyVectors:
    """Score the fragments this rank owns and add up all ranks.

    Two vectors of fp64 travel: live heads and channels of this stage's layers within the stage, the stem over all.

    Args:
        fragments: this rank's pieces of ``o_proj`` and ``down_proj`` of any layers of its stage.
        partition: the placement the fragments are in.
        metric: any but ``random`` and ``obc``, which are not summed from fragments.
        kernels: to form the sums of a fragment with.
        layers: of this stage.
        sums: over the processes.
        device: where the sums are formed.
        tp_rank: whose slots the fragments use.
        norms: for ``wanda``, by the name of the matrix ``[physical columns]`` fp32 norms of its input.

    Returns:
        The stem is the same on every rank; heads and channels are those of this stage's layers, the same on all of
        its ranks, and zero for other layers.
    """
    scores = UnitScores.zeros(partition, device)
    fragments = list(fragments)
    pieces = [Piece(f.weight, f.grad, f.hessian, f.start, f.shape[1]) for f in fragments]
    if metric == "wanda":
        assert norms is not None, "wanda needs the norms of the inputs"
        found = kernels.wanda_sums(pieces, [norms[f.spec.name] for f in fragments])
    else:
        found = kernels.row_and_column_sums(pieces, element_score(metric))
    for fragment, piece, (rows, columns) in zip(fragments, pieces, found, strict=True):
        layer = fragment.spec.layer
        assert layer is not None
        scores.stem[piece.first_row : piece.first_row + piece.num_rows] += rows
        if fragment.spec.axes[1] == "heads":
            per_head = columns.view(-1, partition.source.head_dim).sum(1)
            _scatter(scores.heads[layer], partition.slots("heads", layer, tp_rank), per_head)
        else:
            _scatter(scores.ffn[layer], partition.slots("ffn", layer, tp_rank), columns)
    # The abs of a sum can be taken only when every addend is in it.
    return scores.summed(partition, layers, sums, absolute=metric == "vectorize")


@dataclasses.dataclass(frozen=True)
class UnitScores:
    """One rank's addends of every unit's score, fp64, before the ranks are added up.

    Attributes:
        heads: ``[layers, source heads]``.
        ffn: ``[layers, source channels]``.
        stem: ``[physical slots]``.
    """

    heads: Tensor
    ffn: Tensor
    stem: Tensor

    @classmethod
    def zeros(cls, partition: Partition, device: torch.device) -> UnitScores:
        """No addends yet."""
        source = partition.source
        return cls(
            torch.zeros(source.num_layers, source.num_attention_heads, dtype=torch.float64, device=device),
            torch.zeros(source.num_layers, source.ffn_hidden_size, dtype=torch.float64, device=device),
            torch.zeros(len(partition.stem), dtype=torch.float64, device=device),
        )

    def summed(
        self, partition: Partition, layers: Sequence[int], sums: Sums, absolute: bool = False
    ) -> SaliencyVectors:
        """The scores of all ranks together; a collective of all processes.

        Args:
            partition: the placement.
            layers: of this stage.
            sums: over the processes.
            absolute: take the abs of every unit's sum.
        """
        alive = [(self.ffn[layer], live(partition.ffn[layer])) for layer in layers]
        alive += [(self.heads[layer], live(partition.heads[layer])) for layer in layers]
        device = self.stem.device
        packed = torch.cat([vector[torch.from_numpy(units).to(device)] for vector, units in alive])
        sums.over_stage(packed)
        for (vector, units), values in zip(alive, packed.split([len(units) for _, units in alive]), strict=True):
            vector[torch.from_numpy(units).to(device)] = values
        sums.over_all(self.stem)
        heads, ffn, stem = ((t.abs() if absolute else t).cpu().numpy() for t in (self.heads, self.ffn, self.stem))
        by_channel = np.zeros(partition.source.hidden_size)
        by_channel[live(partition.stem)] = stem[in_order(partition.stem)]
        # Every element is in some row, dead slots included: this one sum tells of all, and is equal on every rank.
        return mask_removed(SaliencyVectors(heads, ffn, by_channel), partition, finite=bool(np.isfinite(stem).all()))


def random_vectors(partition: Partition, seed: int, step: int) -> SaliencyVectors:
    """The ``random`` baseline: uniform draws that depend on the seed and the step alone, scaled to group sizes."""
    source, arch = partition.source, partition.architecture()
    draw = np.random.Generator(np.random.Philox(key=[seed, step]))
    head_size = arch.hidden_size * arch.head_dim
    stem_size = arch.num_layers * (arch.num_attention_heads * arch.head_dim + arch.ffn_hidden_size)
    vectors = SaliencyVectors(
        heads=draw.random((source.num_layers, source.num_attention_heads)) * head_size,
        ffn=draw.random((source.num_layers, source.ffn_hidden_size)) * arch.hidden_size,
        stem=draw.random(source.hidden_size) * stem_size,
    )
    return mask_removed(vectors, partition)


def mask_removed(vectors: SaliencyVectors, partition: Partition, finite: bool = True) -> SaliencyVectors:
    """Put ``inf`` where a unit is gone, so that no minimum finds it."""

    def masked(vector: FloatArray, slots: IntArray) -> FloatArray:
        gone = np.ones(vector.shape, dtype=bool)
        flat = slots.reshape(-1)
        gone[flat[flat != DEAD]] = False
        return np.where(gone, np.inf, vector)

    layers = range(partition.source.num_layers)
    return SaliencyVectors(
        heads=np.stack([masked(vectors.heads[layer], partition.heads[layer]) for layer in layers]),
        ffn=np.stack([masked(vectors.ffn[layer], partition.ffn[layer]) for layer in layers]),
        stem=masked(vectors.stem, partition.stem),
        finite=finite,
    )


def in_order(slots: IntArray) -> IntArray:
    """Positions of the live slots in the order of their units."""
    alive = np.nonzero(slots != DEAD)[0]
    return alive[np.argsort(slots[alive])]


def _scatter(target: Tensor, slots: IntArray, values: Tensor) -> None:
    alive = torch.from_numpy(np.nonzero(slots != DEAD)[0]).to(values.device)
    units = torch.from_numpy(slots[slots != DEAD]).to(values.device)
    target[units] += values[alive]
