"""A tiny float64 model of which everything is seen that a metric or the second-order update asks for."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from megatron_prune.architecture import Architecture, Rope, TensorSpec, tensor_specs
from megatron_prune.model.pipeline import layer_shapes
from megatron_prune.model.sites import InputSite, input_sites
from megatron_prune.model.transformer import CausalLM
from megatron_prune.ops.dispatch import torch_ops
from megatron_prune.ops.saliency_torch import TorchSaliency
from megatron_prune.parallel.partition import Partition
from megatron_prune.parallel.placement import deposit_
from megatron_prune.pruning.groups import MiniGroup
from megatron_prune.pruning.metrics import Metric
from megatron_prune.pruning.saliency import Fragment, SaliencyVectors, Sums, accumulate, is_output_matrix
from megatron_prune.pruning.second_order import compensations, obc_vectors
from megatron_prune.pruning.statistics import FisherDiagonal, InputProducts, InputSquares
from megatron_prune.pruning.surgery import dead_elements, zero_tensor_

CPU = torch.device("cpu")
KERNELS = TorchSaliency()
MICRO_BATCHES = 2
LEARNING_RATE = 1e-3
ARCH = Architecture(
    family="llama",
    num_layers=2,
    hidden_size=22,
    ffn_hidden_size=36,
    num_attention_heads=6,
    kv_groups=((3, 3),) * 2,
    head_dim=4,
    vocab_size=30,
    rope=Rope(theta=100.0),
)


def extract(physical: Tensor, spec: TensorSpec, partition: Partition) -> Tensor:
    """Inverse of :func:`place`."""
    logical = physical.new_zeros(partition.logical_shape(spec))
    deposit_(logical, physical.reshape(-1), spec, partition, 0, 0)
    return logical


class Watched:
    """A float64 model with everything that a metric may want to see of its passes."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.partition = Partition.of(ARCH)
        self.model = CausalLM(ARCH, layer_shapes(self.partition), torch_ops()).double()
        self.model.load_state_dict(weights)
        assert self.model.lm_head is not None
        layers = [(f"model.layers.{i}.", layer) for i, layer in enumerate(self.model.model.layers)]
        self.sites = tuple(input_sites([*layers, ("lm_head.", self.model.lm_head)]))
        matrices = {spec.name: self.parameter(spec) for spec in tensor_specs(ARCH) if is_output_matrix(spec)}
        self.squares = InputSquares([s for s in self.sites if s.axis != "stem"], 0, Sums(), KERNELS)
        self.products = InputProducts(self.sites, 0, Sums())
        self.fisher = FisherDiagonal(matrices, MICRO_BATCHES, 1, Sums(), KERNELS)

    def parameter(self, spec: TensorSpec) -> torch.nn.Parameter:
        return self.model.get_parameter(spec.name)

    def logical(self, spec: TensorSpec) -> Tensor:
        return extract(self.parameter(spec).detach(), spec, self.partition)

    def backward(self, tokens: Tensor) -> None:
        self.model.zero_grad()
        with contextlib.ExitStack() as watches:
            watches.enter_context(self.squares.watching(self.model))
            watches.enter_context(self.products.watching(self.model))
            watches.enter_context(self.fisher.watching())
            for part in tokens.chunk(MICRO_BATCHES):
                logits = self.model(part[:, :-1])
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())
                (loss / MICRO_BATCHES).backward()

    def product(self, site: InputSite) -> Tensor:
        return self.products.matrix(site, self.partition)

    def vectors(self, metric: Metric) -> SaliencyVectors:
        layers = range(ARCH.num_layers)
        if metric == "obc":
            return obc_vectors(self.sites, self.partition, layers, Sums(), self.product, self.logical, CPU)
        fragments = []
        for spec in filter(is_output_matrix, tensor_specs(ARCH)):
            weight = self.parameter(spec)
            assert weight.grad is not None
            diagonal = self.fisher.fragment(spec.name, 0, weight.numel())
            shape = (weight.shape[0], weight.shape[1])
            fragments.append(Fragment(spec, weight.detach().flatten(), weight.grad.flatten(), 0, shape, diagonal))
        return accumulate(fragments, self.partition, metric, KERNELS, layers, Sums(), CPU, 0, self.squares.norms())

    @torch.no_grad()
    def compensate(self, group: MiniGroup) -> None:
        """Update every matrix as one fragment that is the whole of it."""
        for update in compensations(group, self.sites, self.partition, Sums(), self.product):
            for reader in update.readers:
                weight = self.model.get_parameter(reader)
                flat = weight.detach().view(-1)
                update.apply_(flat, 0, update.lost_of(flat, 0, self.partition, 0), self.partition, 0)

    @torch.no_grad()
    def sgd(self) -> None:
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            parameter.sub_(LEARNING_RATE * parameter.grad)

    def remove(self, after: Partition) -> None:
        for spec, dim, index in dead_elements(self.partition, after):
            zero_tensor_(self.parameter(spec), dim, index)
        self.partition = after
        self.model.set_shapes(layer_shapes(after))


def random_weights(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        spec.name: torch.randn(ARCH.tensor_shape(spec), generator=generator, dtype=torch.float64) * 0.3
        + (1.0 if "norm" in spec.name else 0.0)
        for spec in tensor_specs(ARCH)
    }
