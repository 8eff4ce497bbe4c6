"""Optimal brain surgery, layer by layer (paper A.1): the ``obc`` scores, and the update of the weights that stay.

For a matrix ``W [out, in]`` with inputs ``X [in, tokens]`` let ``H = X X^T``. To zero the columns B of W and change the
others so that ``||(W + dW) X - W X||`` is least costs, summed over rows, ``w_B ([H^-1]_BB)^-1 w_B^T`` and takes
``dW = -W_B ([H^-1]_BB)^-1 [H^-1]_B:``. For one column these are the paper's ``w_p^2 / [H^-1]_pp`` and Eq. A.1. Only
live columns have a place in H. :data:`DAMPING` of its mean diagonal is added, which never makes the update worse than
zeroing alone: what damping adds to the cost is least for dW = -W_B itself.

Factors are fp64 Cholesky factors. The processes of a stage share out the matrices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from megatron_prune.architecture import Axis, TensorSpec, tensor_specs
from megatron_prune.model.sites import InputSite
from megatron_prune.parallel.partition import IntArray, Partition
from megatron_prune.parallel.placement import blocks
from megatron_prune.pruning.groups import GroupType, MiniGroup
from megatron_prune.pruning.saliency import SaliencyVectors, Sums, UnitScores, in_order, is_output_matrix
from megatron_prune.pruning.statistics import live_columns

#: Share of the mean diagonal that is added to it.
DAMPING: Final = 0.01
#: The inputs whose columns a group takes.
AXIS_OF: Final[dict[GroupType, Axis]] = {"attention": "heads", "ffn": "ffn", "stem": "stem"}

#: H of an input, ``[live, live]`` fp64; a collective of the stage.
Products = Callable[[InputSite], Tensor]


def factor(h: Tensor) -> Tensor:
    """Cholesky factor of the damped H, ``[n, n]`` fp64; NaN where H is no sum of finite inputs. Inputs that are all
    zero have the factor of the identity: nothing can be said about them."""
    h = h.double()
    mean = h.diagonal().mean()
    damped = h + torch.eye(len(h), dtype=h.dtype, device=h.device) * torch.where(mean > 0, DAMPING * mean, 1.0)
    lower, failed = torch.linalg.cholesky_ex(damped)
    return torch.where(failed == 0, lower, torch.nan)


def column_scores(weight: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column sums of ``w_ij^2 / [H^-1]_jj``.

    Args:
        weight: ``[out, in]``.
        h: ``[in, in]``.

    Returns:
        ``[out]`` and ``[in]`` fp64.
    """
    scores = weight.double().square() / torch.cholesky_inverse(factor(h)).diagonal()
    return scores.sum(1), scores.sum(0)


def block_scores(weight: Tensor, h: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The cost of each block of neighbouring columns, a head say, and the row sums of :func:`column_scores`.

    Args:
        weight: ``[out, blocks * width]``.
        h: ``[in, in]``.
        width: columns of a block.

    Returns:
        ``[out]`` row sums and ``[blocks]`` costs, fp64.
    """
    inverse = torch.cholesky_inverse(factor(h))
    columns = weight.double()
    parts = columns.unflatten(1, (-1, width)).transpose(0, 1)  # [blocks, out, width]
    corners = torch.stack([inverse[i : i + width, i : i + width] for i in range(0, len(inverse), width)])
    costs = (torch.linalg.solve_ex(corners, parts, left=False)[0] * parts).sum((1, 2))
    return (columns.square() / inverse.diagonal()).sum(1), costs


def compensation(h: Tensor, lost: Tensor) -> Tensor:
    """What a removed column gives to each column: ``W += W[:, lost] @ C`` is the update and zeroes the lost columns.

    Args:
        h: ``[n, n]``.
        lost: ``[b]`` int64, the columns that go.

    Returns:
        C ``[b, n]`` fp64. Where H cannot be factored the others get nothing.
    """
    targets = torch.zeros(len(h), len(lost), dtype=torch.float64, device=h.device)
    targets[lost, torch.arange(len(lost), device=h.device)] = 1
    inverse = torch.cholesky_solve(targets, factor(h))
    # A solution lies in columns; a sum over processes adds up memory as it lies.
    shares = -torch.linalg.solve_ex(inverse[lost], inverse.T)[0].contiguous()
    if not bool(torch.isfinite(shares).all()):
        shares = torch.zeros_like(shares)
    shares[:, lost] = -torch.eye(len(lost), dtype=torch.float64, device=h.device)
    return shares


def obc_vectors(
    sites: Iterable[InputSite],
    partition: Partition,
    layers: Sequence[int],
    sums: Sums,
    products: Products,
    master: Callable[[TensorSpec], Tensor],
    device: torch.device,
) -> SaliencyVectors:
    """The ``obc`` scores: heads in block form, FFN channels by column, stem channels by the row sums over both.

    A collective of all processes. H and the whole matrix of one layer lie on a process at a time.

    Args:
        sites: this stage's inputs; those of the stem are left aside.
        partition: the placement.
        layers: of this stage.
        sums: over the processes.
        products: H of an input.
        master: the logical fp32 matrix; a collective of the stage.
        device: where to compute.
    """
    scores = UnitScores.zeros(partition, device)
    stem = torch.from_numpy(in_order(partition.stem)).to(device)
    specs = {spec.name: spec for spec in tensor_specs(partition.source) if is_output_matrix(spec)}
    turn, processes = sums.turn
    for number, site in enumerate(site for site in sites if site.axis != "stem"):
        h, weight, layer = products(site), master(specs[site.readers[0]]), site.layer
        if number % processes != turn or layer is None:
            continue
        units = partition.live_elements(site.axis, layer)
        if site.axis == "heads":
            width = partition.source.head_dim
            rows, costs = block_scores(weight, h, width)
            scores.heads[layer, torch.from_numpy(units[::width] // width).to(device)] = costs
        else:
            rows, costs = column_scores(weight, h)
            scores.ffn[layer, torch.from_numpy(units).to(device)] = costs
        scores.stem[stem] += rows
    return scores.summed(partition, layers, sums)


@dataclasses.dataclass(frozen=True)
class Compensation:
    """The update of the matrices that share an input, for the columns that go.

    Attributes:
        axis: of the input.
        layer: decoder layer, or None.
        readers: names of the matrices.
        lost: ``[b]`` logical columns that go.
        shares: C of :func:`compensation`, ``[b, live columns]`` fp64.
    """

    axis: Axis
    layer: int | None
    readers: tuple[str, ...]
    lost: IntArray
    shares: Tensor

    def lost_of(self, fragment: Tensor, start: int, partition: Partition, tp_rank: int) -> Tensor:
        """What a flat fragment of a matrix holds of the columns that go, the rest zero.

        Args:
            fragment: ``[numel]``.
            start: of its first element in the flattened physical matrix.
            partition: the placement before the removal.
            tp_rank: whose fragment.

        Returns:
            ``[rows touched, b]`` and zero elsewhere; the first row is ``start // columns``.
        """
        columns, here = self._lost_slots(partition, tp_rank)
        width = len(partition.elements(self.axis, self.layer, tp_rank))
        first, last = start // width, -(-(start + len(fragment)) // width)
        found = torch.zeros(last - first, len(self.lost), dtype=fragment.dtype, device=fragment.device)
        for block in blocks(start, len(fragment), width):
            inside = (columns >= block.columns.start) & (columns < block.columns.stop)
            into = torch.from_numpy(here[inside]).to(found.device)
            take = torch.from_numpy(columns[inside] - block.columns.start).to(found.device)
            found[block.rows.start - first : block.rows.stop - first, into] = block.view(fragment)[:, take]
        return found

    def apply_(self, fragment: Tensor, start: int, lost: Tensor, partition: Partition, tp_rank: int) -> None:
        """Update a flat fragment in place.

        Args:
            fragment: ``[numel]``.
            start: of its first element in the flattened physical matrix.
            lost: ``[physical rows, b]`` the columns that go, of all rows.
            partition: the placement before the removal.
            tp_rank: whose fragment.
        """
        slots, positions = live_columns(partition, self.axis, self.layer, tp_rank)
        width = len(partition.elements(self.axis, self.layer, tp_rank))
        shares = torch.zeros(len(self.lost), width, dtype=torch.float64, device=fragment.device)
        places = (torch.from_numpy(index).to(fragment.device) for index in (slots, positions))
        into, take = places
        shares[:, into] = self.shares[:, take]
        for block in blocks(start, len(fragment), width):
            view = block.view(fragment)
            view += (lost[block.rows].double() @ shares[:, block.columns]).to(view.dtype)

    def _lost_slots(self, partition: Partition, tp_rank: int) -> tuple[IntArray, IntArray]:
        """Physical columns of the lost ones that this rank has, and which of them they are."""
        slots, positions = live_columns(partition, self.axis, self.layer, tp_rank)
        which = np.nonzero(np.isin(positions, self.lost))[0]
        return slots[which], np.searchsorted(self.lost, positions[which])


def compensations(
    group: MiniGroup, sites: Iterable[InputSite], partition: Partition, sums: Sums, products: Products
) -> Iterator[Compensation]:
    """The updates that the removal of a group asks for, matrix by matrix; a collective of the stage.

    What a removal changes in the inputs of later layers, and that a norm divides by fewer channels afterwards, is not
    part of the layerwise problem.

    Args:
        group: what goes.
        sites: this stage's inputs.
        partition: the placement before the removal.
        sums: over the processes.
        products: H of an input.
    """
    axis = AXIS_OF[group.type]
    width = partition.source.head_dim if axis == "heads" else 1
    turn, processes = sums.turn
    for number, site in enumerate(site for site in sites if site.axis == axis):
        units = np.sort(np.array(group.indices(site.layer or 0)))
        elements = (units[:, None] * width + np.arange(width)).reshape(-1)
        lost = np.searchsorted(partition.live_elements(axis, site.layer), elements)
        h = products(site)
        if number % processes == turn:
            shares = compensation(h, torch.from_numpy(lost).to(h.device))
        else:
            shares = torch.zeros(len(lost), len(h), dtype=torch.float64, device=h.device)
        sums.over_stage(shares)
        yield Compensation(axis, site.layer, site.readers, lost, shares)
