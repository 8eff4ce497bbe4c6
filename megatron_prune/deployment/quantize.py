"""8-bit weights and activations (W8A8) by torchao, in a directory that stock transformers loads.

Linear layers keep int8 weights with one scale per output channel and quantise what they are given per token as it
comes. The embedding is int8 with a scale per token of the vocabulary. A head that is tied to it stays tied, one int8
matrix for both, whose inputs are not quantised; so are those of a head of its own. torchao's files would hold a tied
matrix twice; here it is written once.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, Final

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_prune.checkpoint.hf import copy_companions
from megatron_prune.checkpoint.hf_quiet import quiet_transformers
from megatron_prune.checkpoint.hf_source import WEIGHTS_FILE
from megatron_prune.checkpoint.run_export import check_export
from megatron_prune.deployment.smoothing import Smoothed, clip, smooth
from megatron_prune.errors import UserError
from megatron_prune.evaluation.scoring import load_model
from megatron_prune.tool import check_output_directory, written_at_once

REPORT_FILE: Final = "quantization.json"
HEAD: Final = "lm_head"
EMBEDDING: Final = "model.embed_tokens"
LINEARS: Final = r"re:model\.layers\..*_proj\.weight"  # torchao's mark of a pattern; a module's would take biases too
INSTALL: Final = "pip install 'torchao>=0.18'"


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What is done to the weights before they are rounded.

    Attributes:
        tokens: int64 ``[batch, length]`` of text that the model knows the kind of.
        smooth: move outliers from activations into weights.
        clip: cut weight rows where that brings outputs closer.
    """

    tokens: Tensor
    smooth: bool
    clip: bool


@dataclasses.dataclass(frozen=True)
class QuantizeReport:
    """What :func:`quantize_export` wrote.

    Attributes:
        directory: of the quantised model.
        num_bytes: of its weights file.
        smoothed: what smoothing did, or None.
        clipped: share of weight rows that were cut, or None.
    """

    directory: Path
    num_bytes: int
    smoothed: Smoothed | None
    clipped: float | None


def quantize_export(export: Path, output: Path, calibration: Calibration | None) -> QuantizeReport:
    """Write an export's W8A8 form. Complete or not at all; an earlier result is replaced.

    Args:
        export: a Hugging Face directory with floating-point weights.
        output: absent, empty or an earlier result.
        calibration: for smoothing and clipping, or None for neither.

    Raises:
        UserError: torchao is missing, the export is quantised already or no model, or the output is something else.
    """
    config = int8_config()
    check_target(export, output)
    output = output.resolve()
    smoothed, clipped, source = None, None, export
    with written_at_once(output) as scratch:
        if calibration is not None:
            source = scratch / "calibrated"
            model = load_model(export)
            smoothed = smooth(model, calibration.tokens) if calibration.smooth else None
            clipped = clip(model, calibration.tokens) if calibration.clip else None
            model.save_pretrained(source)
            del model
        quantized = load_model(source, quantization_config=config)
        if source != export:
            shutil.rmtree(source)
        final = scratch / output.name
        # One file: torchao finds a tensor's parts by name only within a file.
        quantized.save_pretrained(final, max_shard_size=2**62)
        if quantized.config.tie_word_embeddings:
            _drop_copies(final / WEIGHTS_FILE)
        copy_companions(export, final)
        report = {"scheme": "W8A8", "smooth": smoothed is not None, "clip": clipped is not None}
        (final / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return QuantizeReport(output, (output / WEIGHTS_FILE).stat().st_size, smoothed, clipped)


def check_target(export: Path, output: Path) -> None:
    """See, before work begins, that an export can be quantised to a directory.

    Raises:
        UserError: the export is 8-bit already or not whole, the output something else or not to be written.
    """
    check_output_directory("--output", output)
    _check_replaceable(output)
    check_export(export)


def int8_config() -> Any:
    """transformers' quantisation config of W8A8 with an int8 embedding and head.

    Raises:
        UserError: torchao is not installed.
    """
    quiet_transformers()
    try:
        from torchao.quantization import FqnToConfig, Int8DynamicActivationInt8WeightConfig, IntxWeightOnlyConfig
        from torchao.quantization.granularity import PerAxis
    except ImportError as error:
        raise UserError(f"quantising needs torchao, which cannot be imported ({error}); run: {INSTALL}") from error
    from transformers import TorchAoConfig

    rows = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    kinds = {LINEARS: Int8DynamicActivationInt8WeightConfig(), EMBEDDING: rows, HEAD: rows}
    return TorchAoConfig(FqnToConfig(kinds), include_input_output_embeddings=True)


def model_bytes(directory: Path) -> int:
    """Bytes of a model directory's weights files."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def _drop_copies(file: Path) -> None:
    """Take the head's copy of the embedding out of a weights file: transformers ties the two again when it loads."""
    with safetensors.safe_open(file, framework="pt") as handle:
        metadata = dict(handle.metadata() or {})
        kept = {name: handle.get_tensor(name) for name in handle.keys() if not name.startswith(f"{HEAD}.")}  # noqa: SIM118
    names = json.loads(metadata["tensor_names"])
    metadata["tensor_names"] = json.dumps([name for name in names if not name.startswith(f"{HEAD}.")])
    metadata = {name: value for name, value in metadata.items() if not name.startswith(f"{HEAD}.")}
    save_file(kept, file, metadata=metadata)


def _check_replaceable(directory: Path) -> None:
    if not directory.exists():
        return
    if directory.is_dir() and (not any(directory.iterdir()) or (directory / REPORT_FILE).is_file()):
        return
    raise UserError(f"--output {directory} exists and is no earlier result of quantising; choose another or remove it")
