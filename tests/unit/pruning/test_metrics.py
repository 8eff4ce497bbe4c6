"""Every metric against an independent float64 reference, over sixty consecutive decisions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from metric_reference import layer_inputs, measure, reference_class
from watched_model import ARCH, LEARNING_RATE, MICRO_BATCHES, Watched, random_weights

from megatron_prune.parallel.partition import Partition, live
from megatron_prune.pruning.metrics import Metric
from megatron_prune.pruning.planner import Budget, choose
from megatron_prune.pruning.saliency import SaliencyVectors

METRICS: tuple[Metric, ...] = ("taylor", "taylor-mixed", "diag-hessian", "vectorize", "wanda", "obc", "magnitude")


def test_sixty_decisions_of_every_metric_agree_with_the_reference() -> None:
    """All metrics see every model; they take turns at deciding what goes."""
    generator = torch.Generator().manual_seed(0)
    weights = random_weights(generator)
    reference = reference_class()(weights, 2, 6, ARCH.kv_groups, 4, ARCH.norm_eps, 100.0, False)
    watched = Watched(weights)
    budget = Budget(1, None, {"attention": 1, "ffn": 1, "stem": 1})
    kinds, choices = set(), set()
    for event in range(60):
        tokens = torch.randint(ARCH.vocab_size, (4, 9), generator=generator)
        watched.backward(tokens)
        gradients = [reference.gradients(part) for part in tokens.chunk(MICRO_BATCHES)]
        inputs = layer_inputs(reference, tokens)
        for metric in METRICS[event % len(METRICS) :] + METRICS[: event % len(METRICS)]:
            vectors = watched.vectors(metric)
            assert_same_sums(vectors, measure(reference, metric, gradients, inputs), watched.partition, metric)
            decision, expected = choose(vectors, watched.partition, budget, "mean"), reference.decide()
            assert decision is not None
            assert (decision.group.type, decision.group.listed()) == (expected["type"], expected["removed"]), metric
            choices.add((event, str(expected["removed"])))
        assert decision is not None
        for name in reference.weights:
            gradient = sum(part[name] for part in gradients) / MICRO_BATCHES
            reference.weights[name] = reference.weights[name] - LEARNING_RATE * gradient
        watched.sgd()
        reference.remove(expected)
        watched.remove(decision.partition)
        kinds.add(decision.group.type)
    assert kinds == {"attention", "ffn", "stem"}
    assert len(choices) > 4 * 60, "metrics that all choose alike would not be told apart"


def assert_same_sums(vectors: SaliencyVectors, expected: Any, partition: Partition, metric: Metric) -> None:
    heads, ffn, stem = expected
    # The kernels' arithmetic is fp32; sums with signs may cancel.
    exact: Any = {"rtol": 2e-6, "atol": 1e-8 if metric == "vectorize" else 0, "err_msg": metric}
    for layer in range(2):
        np.testing.assert_allclose(vectors.heads[layer][live(partition.heads[layer])], heads[layer], **exact)
        np.testing.assert_allclose(vectors.ffn[layer][live(partition.ffn[layer])], ffn[layer], **exact)
    np.testing.assert_allclose(vectors.stem[live(partition.stem)], stem, **exact)
