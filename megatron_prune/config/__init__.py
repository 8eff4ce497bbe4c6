"""Everything a run can be told: one schema, read from YAML and flags, checked as a whole before anything starts."""

from megatron_prune.config.cli import dump_yaml, load_config
from megatron_prune.config.deepspeed_json import deepspeed_config
from megatron_prune.config.schema import (
    BaselineConfig,
    Config,
    DataConfig,
    DistillConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PruneConfig,
    RunConfig,
    TrainConfig,
)
from megatron_prune.config.targets import floor_shape, shape_between
from megatron_prune.config.validate import validate_against_source, validate_config
from megatron_prune.config.values import (
    TargetShape,
    parse_count,
    parse_ratio,
    parse_shape,
    parse_source_shape,
)

__all__ = [
    "BaselineConfig",
    "Config",
    "DataConfig",
    "DistillConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "PruneConfig",
    "RunConfig",
    "TargetShape",
    "TrainConfig",
    "deepspeed_config",
    "dump_yaml",
    "floor_shape",
    "load_config",
    "parse_count",
    "parse_ratio",
    "parse_shape",
    "parse_source_shape",
    "shape_between",
    "validate_against_source",
    "validate_config",
]
