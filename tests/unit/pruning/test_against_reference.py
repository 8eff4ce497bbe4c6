"""The package against the brute force of reference.py: same sums, same choice at every one of 200 events."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_prune.architecture import Architecture, Rope, tensor_specs
from megatron_prune.model.pipeline import layer_shapes
from megatron_prune.model.transformer import CausalLM
from megatron_prune.ops.dispatch import torch_ops
from megatron_prune.ops.saliency_torch import TorchSaliency
from megatron_prune.parallel.partition import DEAD, Partition, live
from megatron_prune.pruning.planner import Budget, choose
from megatron_prune.pruning.saliency import Fragment, SaliencyVectors, Sums, accumulate, is_output_matrix
from megatron_prune.pruning.surgery import dead_elements, zero_tensor_

LEARNING_RATE = 1e-3  # small: two correct trainings of a random net drift apart chaotically at large steps


def reference_class() -> Any:
    path = Path(__file__).with_name("reference.py")
    spec = importlib.util.spec_from_file_location("brute_force_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Reference


def make_architecture(kv_groups: tuple[int, ...], tied: bool, bias: bool) -> Architecture:
    return Architecture(
        family="qwen2" if bias else "llama",
        num_layers=2,
        hidden_size=48,
        ffn_hidden_size=168,
        num_attention_heads=sum(kv_groups),
        kv_groups=(kv_groups,) * 2,
        head_dim=4,
        vocab_size=50,
        rope=Rope(theta=100.0),
        tie_embeddings=tied,
        qkv_bias=bias,
    )


class MaskedModel:
    """A full-size float64 model that loses groups logically, driven through the package's own functions."""

    def __init__(self, arch: Architecture, weights: dict[str, Tensor]) -> None:
        self.partition = Partition.of(arch)
        self.model = CausalLM(arch, layer_shapes(self.partition), torch_ops()).double()
        self.model.load_state_dict(weights)

    def backward(self, tokens: Tensor) -> None:
        self.model.zero_grad()
        logits = self.model(tokens[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()

    def saliency(self) -> SaliencyVectors:
        fragments = []
        parameters = dict(self.model.named_parameters())
        for spec in filter(is_output_matrix, tensor_specs(self.partition.source)):
            weight = parameters[spec.name]
            assert weight.grad is not None
            rows, columns = weight.shape
            fragments.append(Fragment(spec, weight.flatten(), weight.grad.flatten(), 0, (rows, columns)))
        layers = range(self.partition.source.num_layers)
        kernels = TorchSaliency()
        return accumulate(fragments, self.partition, "taylor", kernels, layers, Sums(), torch.device("cpu"))

    def sgd(self) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                assert parameter.grad is not None
                parameter.sub_(LEARNING_RATE * parameter.grad)

    def remove(self, after: Partition) -> None:
        parameters = dict(self.model.named_parameters())
        for spec, dim, index in dead_elements(self.partition, after):
            zero_tensor_(parameters[spec.name], dim, index)
        self.partition = after
        self.model.set_shapes(layer_shapes(after))


@pytest.mark.parametrize(
    ("kv_groups", "tied", "bias", "seed"),
    [((1, 1, 1, 1, 1, 1), True, False, 0), ((3, 3, 3), False, True, 1)],
    ids=["mha-tied", "gqa-untied-bias"],
)
def test_two_hundred_events_agree_with_the_brute_force(
    kv_groups: tuple[int, ...], tied: bool, bias: bool, seed: int
) -> None:
    arch = make_architecture(kv_groups, tied, bias)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        spec.name: torch.randn(arch.tensor_shape(spec), generator=generator, dtype=torch.float64) * 0.3
        + (1.0 if "norm" in spec.name else 0.0)
        for spec in tensor_specs(arch)
    }
    reference = reference_class()(
        weights, arch.num_layers, arch.num_attention_heads, arch.kv_groups, arch.head_dim, arch.norm_eps, 100.0, tied
    )
    masked = MaskedModel(arch, weights)
    floors = {"attention": 1, "ffn": 1, "stem": 1}
    budget = Budget(target_params=1, target_shape=None, floors=floors)  # type: ignore[arg-type]
    kinds = []
    for _ in range(202):
        tokens = torch.randint(arch.vocab_size, (2, 13), generator=generator)
        masked.backward(tokens)
        vectors = masked.saliency()
        assert_same_sums(vectors, reference.saliency(tokens), masked.partition)
        decision = choose(vectors, masked.partition, budget, "mean")
        expected = reference.decide(target_parameters=1)
        assert decision is not None
        removed = decision.group.removed
        assert decision.group.type == expected["type"]
        assert (list(removed) if isinstance(removed, tuple) else removed) == expected["removed"]
        for kind, score in decision.scores.items():
            assert score == pytest.approx(expected["scores"][kind], rel=1e-8)
        gradients = reference.gradients(tokens)
        for name, gradient in gradients.items():
            reference.weights[name] = reference.weights[name] - LEARNING_RATE * gradient
        masked.sgd()
        reference.remove(expected)
        masked.remove(decision.partition)
        assert masked.partition.architecture().num_parameters() == reference.num_parameters() == expected["parameters"]
        kinds.append(decision.group.type)
    assert set(kinds) == {"attention", "ffn", "stem"}
    assert kinds.count("stem") > 10


def assert_same_sums(vectors: SaliencyVectors, expected: Any, partition: Partition) -> None:
    heads, ffn, stem = expected
    for layer in range(partition.source.num_layers):
        for mine, slots, theirs in (
            (vectors.heads[layer], partition.heads[layer], heads[layer]),
            (vectors.ffn[layer], partition.ffn[layer], ffn[layer]),
        ):
            np.testing.assert_allclose(mine[live(slots)], theirs, rtol=1e-6)
    np.testing.assert_allclose(vectors.stem[live(partition.stem)], stem, rtol=1e-6)
    gone = np.setdiff1d(np.arange(partition.source.hidden_size), live(partition.stem))
    assert np.isinf(vectors.stem[gone]).all()


def test_overshoot_rule_agrees_near_the_target() -> None:
    arch = make_architecture((1, 1, 1, 1), True, False)
    generator = torch.Generator().manual_seed(5)
    weights = {
        spec.name: torch.randn(arch.tensor_shape(spec), generator=generator, dtype=torch.float64) * 0.3
        for spec in tensor_specs(arch)
    }
    # Heads that hardly matter win every comparison unless they overshoot the budget.
    for layer, part in itertools.product(range(2), ("self_attn.o_proj.weight",)):
        weights[f"model.layers.{layer}.{part}"] *= 1e-6
    reference = reference_class()(weights, 2, 4, arch.kv_groups, 4, arch.norm_eps, 100.0, True)
    masked = MaskedModel(arch, weights)
    floors = {"attention": 1, "ffn": 1, "stem": 1}
    tokens = torch.randint(arch.vocab_size, (2, 13), generator=generator)
    masked.backward(tokens)
    vectors = masked.saliency()
    reference.saliency(tokens)
    parameters = arch.num_parameters()
    chosen = set()
    for distance in (1, 100, 300, 433, 434, 1000, 2000, 2303, 2304, 5000):
        budget = Budget(parameters - distance, None, floors)  # type: ignore[arg-type]
        decision = choose(vectors, masked.partition, budget, "mean")
        assert decision is not None
        assert decision.group.type == reference.decide(target_parameters=parameters - distance)["type"]
        chosen.add(decision.group.type)
    assert "attention" in chosen
    assert len(chosen) > 1, "near the target a head must not be taken"


def test_dead_slots_stay_dead_in_the_placement() -> None:
    partition = Partition.of(make_architecture((3, 3), True, False))
    vectors = SaliencyVectors(heads=np.arange(12.0).reshape(2, 6), ffn=np.ones((2, 160)) * 1e9, stem=np.ones(72) * 1e9)
    budget = Budget(1, None, {"attention": 1, "ffn": 1, "stem": 1})
    decision = choose(vectors, partition, budget, "mean")
    assert decision is not None
    assert decision.group.removed == (0, 0)
    assert decision.partition.heads[0][0, 0] == DEAD
    assert decision.partition.architecture().kv_groups == ((2, 3), (2, 3))
