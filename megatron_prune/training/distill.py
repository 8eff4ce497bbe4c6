"""The frozen source beside the model that it teaches, split in the same way over the same processes.

Before a step the teacher's stages pass the step's micro-batches on from one to the next, forward only, and the last one
keeps the last hidden states; with a single stage each micro-batch is taught when it is its turn. The loss multiplies
them by the teacher's output projection (:mod:`~megatron_prune.parallel.distill_loss`), so its logits never travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_prune.architecture import Architecture, TensorSpec, tensor_specs
from megatron_prune.config import DistillConfig
from megatron_prune.model.attention import RMSNorm
from megatron_prune.model.pipeline import layer_shapes, vocab_rows
from megatron_prune.model.transformer import DecoderLayer
from megatron_prune.ops.dispatch import Ops
from megatron_prune.parallel.distill_loss import Guide
from megatron_prune.parallel.layers import TensorParallel
from megatron_prune.parallel.mesh import Mesh
from megatron_prune.parallel.partition import Partition
from megatron_prune.parallel.placement import place
from megatron_prune.parallel.stages import stage_layers
from megatron_prune.parallel.vocab import VocabParallelEmbedding
from megatron_prune.training.batches import Sample


class Teacher:
    """This rank's part of the frozen source.

    Without sequence parallelism, whatever the student does: a pass that keeps nothing has nothing to save by it.

    Args:
        source: what the teacher is.
        weights: gives a logical tensor of it.
        ops: kernels.
        mesh: the layout.
        dtype: of its weights.
    """

    def __init__(
        self,
        source: Architecture,
        weights: Callable[[TensorSpec], Tensor],
        ops: Ops,
        mesh: Mesh,
        dtype: torch.dtype,
    ) -> None:
        self._mesh = mesh
        self._dtype = dtype
        self._hidden_size = source.hidden_size
        partition = Partition.of(source, mesh.tp_size)
        specs = {spec.name: spec for spec in tensor_specs(source)}

        def load(name: str) -> nn.Parameter:
            value = place(weights(specs[name]), specs[name], partition, mesh.tp_rank)
            return nn.Parameter(value.to(mesh.device, dtype), requires_grad=False)

        modules: dict[str, nn.Module] = {}
        for prefix, module in _stage(source, partition, ops, mesh):  # one at a time: each begins in fp32 on the host
            for local_name, _ in list(module.named_parameters()):
                *path, attribute = local_name.split(".")
                setattr(module.get_submodule(".".join(path)), attribute, load(prefix + local_name))
            modules[prefix] = module.eval().to(mesh.device)
        self._modules = list(modules.values())
        self._head: Tensor | None = None
        if self._is_last:
            embedding = modules.get("model.embed_tokens.") if source.tie_embeddings else None
            name = "model.embed_tokens.weight" if source.tie_embeddings else "lm_head.weight"
            self._head = load(name) if embedding is None else embedding.get_parameter("weight")

    @property
    def _is_last(self) -> bool:
        return self._mesh.pp_rank == self._mesh.pp_size - 1

    def guide(self, settings: DistillConfig) -> Guide | None:
        """What the loss needs of it; None on all stages but the last."""
        if self._head is None:
            return None
        return Guide(self._head, settings.distill_weight, settings.distill_temperature)

    def __call__(self, batches: Iterable[Sample]) -> Iterator[Sample]:
        """The micro-batches of a step, on the last stage with the teacher's hidden states beside the labels.

        A collective of all stages, and of the ranks that split them.
        """
        taught = map(self._taught, batches)
        # The student's first micro-batch leaves the first stage before the last one asks for anything: all are taught
        # first, or the stages would wait for each other.
        return taught if self._mesh.pp_size == 1 else iter(list(taught))

    @torch.no_grad()
    def _taught(self, sample: Sample) -> Sample:
        tokens, labels = sample
        assert isinstance(labels, Tensor), "validate_config refuses a teacher of instructions"
        x = tokens if self._mesh.pp_rank == 0 else self._received(tokens.shape)
        for module in self._modules:
            x = module(x)
        if self._is_last:
            return tokens, (labels, x)
        group = self._mesh.pp_group
        assert group is not None
        dist.send(x.contiguous(), dist.get_global_rank(group, self._mesh.pp_rank + 1), group)
        return tokens, labels

    def _received(self, shape: torch.Size) -> Tensor:
        group = self._mesh.pp_group
        assert group is not None
        x = torch.empty(*shape, self._hidden_size, dtype=self._dtype, device=self._mesh.device)
        dist.recv(x, dist.get_global_rank(group, self._mesh.pp_rank - 1), group)
        return x


def _stage(source: Architecture, partition: Partition, ops: Ops, mesh: Mesh) -> Iterator[tuple[str, nn.Module]]:
    """``(Hugging Face prefix, module)`` of a stage, weights not loaded, the output projection left out."""
    tp = TensorParallel(mesh.tp_rank, mesh.tp_size, mesh.tp_group)
    shapes = layer_shapes(partition, mesh.tp_rank)
    if mesh.pp_rank == 0:
        rows = vocab_rows(partition, mesh.tp_rank)
        yield "model.embed_tokens.", VocabParallelEmbedding(*rows, source.hidden_size, tp)
    for layer in stage_layers(source.num_layers, mesh.pp_size)[mesh.pp_rank]:
        yield f"model.layers.{layer}.", DecoderLayer(source, shapes[layer], ops, tp)
    if mesh.pp_rank == mesh.pp_size - 1:
        yield "model.norm.", RMSNorm(source.hidden_size, source.hidden_size, source.norm_eps, ops)
