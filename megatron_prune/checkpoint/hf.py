"""Hugging Face model directories: one place to import reading and writing from."""

from __future__ import annotations

from megatron_prune.checkpoint.hf_config import architecture_from_hf, export_model_type, hf_config_from_architecture
from megatron_prune.checkpoint.hf_export import (
    ExportReport,
    TensorSource,
    VerifyReport,
    check_replaceable,
    copy_companions,
    export_hf,
    export_verified,
    replacing,
    verify_export,
)
from megatron_prune.checkpoint.hf_source import (
    SourceWeights,
    check_weights,
    has_weights,
    read_architecture,
    read_config,
    resolve_source,
)

__all__ = [
    "ExportReport",
    "SourceWeights",
    "TensorSource",
    "VerifyReport",
    "architecture_from_hf",
    "check_replaceable",
    "check_weights",
    "copy_companions",
    "export_hf",
    "export_model_type",
    "export_verified",
    "has_weights",
    "hf_config_from_architecture",
    "read_architecture",
    "read_config",
    "replacing",
    "resolve_source",
    "verify_export",
]
