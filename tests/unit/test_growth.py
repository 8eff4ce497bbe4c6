"""The micro-batch grows when the model has shrunk enough, and never beyond what the source needed."""

from __future__ import annotations

import pytest

from megatron_prune.config import Config, parse_source_shape
from megatron_prune.config.yaml_file import with_values
from megatron_prune.growth import micro_batch_rule, physical_architecture
from megatron_prune.memory import stage_memory
from megatron_prune.parallel.partition import Partition
from megatron_prune.pruning.groups import MiniGroup, remove

SOURCE = parse_source_shape("hidden=64,ffn=96,heads=6,kv_heads=3,head_dim=8,layers=4,vocab=50,tied=1")


def _config(**values: object) -> Config:
    given = {"seq_length": 32, "micro_batch_size": 2, "global_batch_size": 24, "grow_micro_batch": True}
    return with_values(Config(), given | values)


def _shrunk(heads: int = 0, ffn: int = 0, stem: int = 0, tensor: int = 1) -> Partition:
    partition, layers = Partition.of(SOURCE, tensor), SOURCE.num_layers
    for kind, count in (("attention", heads), ("ffn", ffn), ("stem", stem)):
        for index in range(count):
            removed = index if kind == "stem" else (index,) * layers
            partition = remove(partition, MiniGroup(kind, removed))  # type: ignore[arg-type]
    return partition.compacted(1)


def _size(config: Config, partition: Partition, num_gpus: int = 1) -> int:
    rule = micro_batch_rule(config, SOURCE, num_gpus)
    assert rule is not None
    return rule(partition)


def test_without_the_flag_there_is_no_rule() -> None:
    assert micro_batch_rule(_config(grow_micro_batch=False), SOURCE, 1) is None


@pytest.mark.parametrize("recompute", [False, True])
def test_it_is_the_largest_that_fits_what_the_source_needed(recompute: bool) -> None:
    config = _config(recompute=recompute)
    assert _size(config, _shrunk()) == 2
    seen = set()
    for part in range(1, 6):
        partition = _shrunk(heads=min(5, part), ffn=16 * part, stem=10 * part)
        size = _size(config, partition)
        seen.add(size)

        def held(shape: Partition, size: int) -> int:
            (memory,) = stage_memory(physical_architecture(shape), _config(micro_batch_size=size), 1)
            return memory.activations_recomputed if recompute else memory.activations

        room = held(_shrunk(), 2)
        assert held(partition, size) <= room
        larger = [other for other in (2, 4, 6, 8, 12, 24) if other > size]
        assert not larger or held(partition, larger[0]) > room
    assert len(seen) > 1


def test_it_divides_what_a_copy_gets() -> None:
    tiny = _shrunk(heads=5, ffn=90, stem=60)
    assert _size(_config(), tiny) == 12  # 24 would need more than the source
    assert _size(_config(), tiny, 4) == 6
    assert _size(_config(global_batch_size=20), tiny, 2) == 10
    assert _size(_config(micro_batch_size=4, global_batch_size=20), tiny) == 20


def test_every_stage_keeps_something_to_do() -> None:
    tiny = _shrunk(heads=5, ffn=90, stem=60)
    assert _size(_config(pipeline_model_parallel_size=3), tiny, 3) == 8
    assert _size(_config(pipeline_model_parallel_size=3, global_batch_size=2), tiny, 3) == 2


def test_physical_widths_count_padding() -> None:
    whole = physical_architecture(_shrunk(tensor=4))
    assert (whole.hidden_size, whole.ffn_hidden_size, whole.num_attention_heads) == (64, 96, 8)
    assert _size(_config(tensor_model_parallel_size=4), _shrunk(tensor=4), 4) == 2
    dead = remove(Partition.of(SOURCE), MiniGroup("stem", 1))
    assert physical_architecture(dead) == physical_architecture(Partition.of(SOURCE))
