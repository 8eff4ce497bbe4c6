"""Which query heads may go together under grouped-query attention (paper B.4).

``cluster``, the paper's rule, takes the least salient query of every layer, whichever K/V head it reads; a K/V head
goes with its last query, and layers come to differ. ``balanced`` keeps as many queries under every K/V head as under
any other: a removal takes the least salient query of *each* K/V head or, once they have one query each, one K/V head
with its query. Such a model is stock GQA at every event. (LLM-Pruner's fold pairs K/V head 0 with queries 0, 8, 16
and 24, which are not those that read it.)
"""

from __future__ import annotations

import numpy as np

from megatron_prune.config.schema import GqaMode
from megatron_prune.parallel.partition import IntArray, Partition, live
from megatron_prune.pruning.saliency import FloatArray


def heads_at_once(partition: Partition, mode: GqaMode) -> int:
    """Query heads that the next removal of the attention type takes from every layer."""
    arch = partition.architecture()
    if mode == "cluster":
        return 1
    assert arch.uniform_kv, f"balanced needs equal groups, not {arch.kv_groups}"
    return arch.num_query_groups if arch.num_attention_heads > arch.num_query_groups else 1


def least_heads(scores: FloatArray, partition: Partition, mode: GqaMode) -> IntArray:
    """The heads of every layer that go next, ascending; ties go to the lowest index.

    Args:
        scores: ``[layers, source heads]`` fp64, ``inf`` where a head is gone. Rows of layers that are not this
            stage's may be anything.
        partition: which heads are left, and which K/V head each reads.
        mode: ``cluster`` or ``balanced``.

    Returns:
        int64 ``[layers, heads_at_once]``.
    """
    if heads_at_once(partition, mode) == 1:
        return scores.argmin(axis=1)[:, None]
    return np.stack([_least_of_each(scores[layer], partition, layer) for layer in range(len(scores))])


def _least_of_each(scores: FloatArray, partition: Partition, layer: int) -> IntArray:
    heads = live(partition.heads[layer])
    groups = np.asarray(partition.source.kv_of_head(layer))[heads]
    members = [heads[groups == group] for group in np.unique(groups)]
    return np.array([queries[scores[queries].argmin()] for queries in members])
