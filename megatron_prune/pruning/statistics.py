"""What some metrics and the second-order update have to know of a step beside its gradient.

All of it is collected by hooks during the one step that prunes, over every micro-batch and every copy of the model, and
dropped after it. What is seen of an input is counted once, however often recomputation passes it again: only inside the
model's own forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_prune.architecture import Axis
from megatron_prune.model.sites import InputSite
from megatron_prune.ops.saliency import Saliency
from megatron_prune.parallel.layers import TensorParallel
from megatron_prune.parallel.partition import DEAD, IntArray, Partition
from megatron_prune.pruning.saliency import Sums


class Inputs:
    """Sums over the inputs of a model's matrices, micro-batch by micro-batch; base of the two kinds of sums.

    Args:
        sites: the inputs.
        tp_rank: whose columns and parts of the sequence these are.
        sums: over the processes.
    """

    def __init__(self, sites: Iterable[InputSite], tp_rank: int, sums: Sums) -> None:
        self.sites = tuple(sites)
        self._tp_rank = tp_rank
        self._sums = sums
        self._totals: dict[InputSite, Tensor] = {}
        self._inside = False

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Sum what the sites are given while ``model``, which has them, runs forward. Starts from nothing.

        torch.compile is off meanwhile, since compiled code would call no hook.
        """
        self._totals.clear()
        handles = [
            model.register_forward_pre_hook(lambda *_: self._enter(True)),
            model.register_forward_hook(lambda *_: self._enter(False)),
            *(site.module.register_forward_pre_hook(self._hook(site)) for site in self.sites),
        ]
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def clear(self) -> None:
        """Free the sums."""
        self._totals.clear()

    def _enter(self, inside: bool) -> None:
        self._inside = inside

    def _hook(self, site: InputSite) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if self._inside:
                x = arguments[0].detach()
                self._add(site, x.reshape(-1, x.shape[-1]), module)

        return see

    def _add(self, site: InputSite, x: Tensor, module: nn.Module) -> None:
        raise NotImplementedError


class InputSquares(Inputs):
    """``sum x_j^2`` of every input column, fp64; the sites are those of ``o_proj`` and ``down_proj``.

    Args:
        sites: see :class:`Inputs`.
        tp_rank: see :class:`Inputs`.
        sums: see :class:`Inputs`.
        kernels: to form the sums with.
    """

    def __init__(self, sites: Iterable[InputSite], tp_rank: int, sums: Sums, kernels: Saliency) -> None:
        super().__init__(sites, tp_rank, sums)
        self._kernels = kernels

    def norms(self) -> dict[str, Tensor]:
        """``||X_j||`` of this rank's columns over all tokens of the global batch.

        A collective of the copies.

        Returns:
            ``[physical columns]`` fp32 by the name of the weight.
        """
        norms: dict[str, Tensor] = {}
        for site in self.sites:
            total = self._totals[site].clone()
            self._sums.over_copies(total)
            norms |= {name: total.sqrt().float() for name in site.readers}
        return norms

    def _add(self, site: InputSite, x: Tensor, module: nn.Module) -> None:
        if site not in self._totals:
            self._totals[site] = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        self._kernels.column_square_sums_([x.contiguous()], [self._totals[site]])


class InputProducts(Inputs):
    """``H = X X^T`` of every input, ``[width, width]`` in fp32 (fp64 for fp64 inputs).

    Under tensor parallelism the columns of ``heads`` and ``ffn`` inputs are gathered, so that H is that of the whole
    layer and not of blocks; each rank sums the rows of H for its own columns: ``width^2 / TP`` numbers. Inputs of the
    stem are whole on every rank: each sums ``width^2`` numbers over its part of the tokens.
    """

    def matrix(self, site: InputSite, partition: Partition) -> Tensor:
        """H over the live columns in source order, summed over the processes of the stage; a collective of these.

        Args:
            site: one of the sites.
            partition: the placement; units may have been removed since H was summed, but none may have moved.

        Returns:
            ``[live, live]`` fp64.
        """
        own = live_columns(partition, site.axis, site.layer, self._tp_rank)
        ranks = [self._tp_rank] if site.axis == "stem" else range(partition.tensor_parallel)
        placed = [live_columns(partition, site.axis, site.layer, rank) for rank in ranks]
        width = len(partition.elements(site.axis, site.layer, self._tp_rank))
        slots = np.concatenate([columns + turn * width for turn, (columns, _) in enumerate(placed)])
        where = np.concatenate([positions for _, positions in placed])
        total = self._totals[site]
        live = len(partition.live_elements(site.axis, site.layer))
        whole = torch.zeros(live, live, dtype=total.dtype, device=total.device)
        whole[_grid(own[1], where, total.device)] = total[_grid(own[0], slots, total.device)]
        self._sums.over_stage(whole)
        return whole.double()

    def _add(self, site: InputSite, x: Tensor, module: nn.Module) -> None:
        tp: TensorParallel = module.tp  # type: ignore[assignment]
        if site.axis == "stem":
            # Without sequence parallelism every rank has all tokens: each takes its share.
            rows = x if tp.sequence_parallel else x[tp.rank :: tp.size]
            columns = rows
        else:
            rows, columns = x, torch.cat(self._sums.beside(x.contiguous()), dim=1)
        dtype = torch.promote_types(x.dtype, torch.float32)
        if site not in self._totals:
            self._totals[site] = torch.zeros(x.shape[1], columns.shape[1], dtype=dtype, device=x.device)
        self._totals[site].addmm_(rows.to(dtype).T, columns.to(dtype))


class FisherDiagonal:
    """The empirical Fisher diagonal: the mean over all micro-batches of the global batch of squared gradients.

    Holds 4 bytes for each element of the matrices, unsharded.

    Args:
        parameters: the matrices by name.
        micro_batches: each copy's in a step; the loss of each is divided by so many before its backward pass.
        copies: of the model.
        sums: over the processes.
        kernels: to form the sums with.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], micro_batches: int, copies: int, sums: Sums, kernels: Saliency
    ) -> None:
        self._parameters = parameters
        # The squares are of gradients divided by the number of micro-batches.
        self._scale = micro_batches / copies
        self._sums = sums
        self._kernels = kernels
        self._totals: dict[str, Tensor] = {}
        self._summed = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Add up the squares while backward passes run. Starts from nothing."""
        self._summed = False
        self._totals = {
            name: torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            for name, parameter in self._parameters.items()
        }
        handles = [parameter.register_hook(self._hook(name)) for name, parameter in self._parameters.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def fragment(self, name: str, start: int, numel: int) -> Tensor:
        """A run of the flattened diagonal of a matrix, ``[numel]`` fp32; the first call is a collective of copies."""
        if not self._summed:
            for total in self._totals.values():
                self._sums.over_copies(total)
                total *= self._scale
            self._summed = True
        return self._totals[name].view(-1)[start : start + numel]

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def add(grad: Tensor) -> None:
            self._kernels.square_add_([grad.detach().contiguous()], [self._totals[name]])

        return add


def live_columns(partition: Partition, axis: Axis, layer: int | None, tp_rank: int) -> tuple[IntArray, IntArray]:
    """Of every live element of a dimension on one rank its physical place, and its place in the logical dimension."""
    elements = partition.elements(axis, layer, tp_rank)
    slots = np.nonzero(elements != DEAD)[0]
    return slots, np.searchsorted(partition.live_elements(axis, layer), elements[slots])


def _grid(rows: IntArray, columns: IntArray, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(rows).to(device)[:, None], torch.from_numpy(columns).to(device)[None, :]
