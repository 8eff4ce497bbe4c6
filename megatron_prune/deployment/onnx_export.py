"""An export as an ONNX file, by torch's own exporter, compared with transformers in onnxruntime."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from megatron_prune.checkpoint.run_export import check_export
from megatron_prune.errors import MegatronPruneError, UserError
from megatron_prune.evaluation.scoring import load_model
from megatron_prune.tool import check_output, written_at_once

INSTALL: Final = "pip install onnx onnxscript onnxruntime"
#: Batch and length that logits are compared at; neither is the exporter's example.
CHECKED: Final = ((1, 7), (3, 33))
_EXAMPLE: Final = (2, 17)  # of sizes that no model has, so that none is taken for a constant
_MAX_BATCH: Final = 1024


@dataclasses.dataclass(frozen=True)
class OnnxReport:
    """What :func:`export_onnx` found.

    Attributes:
        file: what was written.
        positions: positions whose most likely token was compared, all equal.
        max_abs_logit_difference: onnxruntime against transformers, fp32.
    """

    file: Path
    positions: int
    max_abs_logit_difference: float


class _Logits(nn.Module):
    """A model as a function of tokens alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def export_onnx(model_dir: Path, file: Path) -> OnnxReport:
    """Write ``input_ids [batch, length] -> logits [batch, length, vocabulary]`` in fp32, both dimensions free, no
    KV cache, and compare it. Only a file that compares well takes its place.

    Args:
        model_dir: Hugging Face directory.
        file: what to write; weights above 2 GB go into a file beside it.

    Returns:
        What the comparison found.

    Raises:
        UserError: a package is missing, the directory is no whole model or 8-bit, or the file cannot be written.
        MegatronPruneError: onnxruntime's most likely token differs anywhere.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch's exporter asks for it late, and less clearly
    except ImportError as error:
        raise UserError(f"ONNX needs a package that cannot be imported ({error}); run: {INSTALL}") from error
    check_output("--output", file)
    check_export(model_dir)
    # Eager attention is plain products, which export to plain operators.
    model = load_model(model_dir, torch.float32, attn_implementation="eager")
    longest = model.config.max_position_embeddings
    dynamic = {"input_ids": {0: torch.export.Dim("batch", max=_MAX_BATCH), 1: torch.export.Dim("length", max=longest)}}
    wrapped, example = _Logits(model).eval(), torch.zeros(_EXAMPLE, dtype=torch.long)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about torch
        program: Any = torch.onnx.export(
            wrapped,
            (example,),
            dynamo=True,
            dynamic_shapes=dynamic,
            input_names=["input_ids"],
            output_names=["logits"],
            verbose=False,
        )
    with written_at_once(file) as scratch:
        program.save(str(scratch / file.name))  # the name matters: the file names another beside it for large weights
        session = onnxruntime.InferenceSession(str(scratch / file.name), providers=["CPUExecutionProvider"])
        return _compared(file, wrapped, session, model.config.vocab_size)


@torch.inference_mode()
def _compared(file: Path, model: nn.Module, session: Any, vocab_size: int) -> OnnxReport:
    random, largest, positions = torch.Generator().manual_seed(0), 0.0, 0
    for shape in CHECKED:
        tokens = torch.randint(vocab_size, shape, generator=random)
        ours = model(tokens)
        theirs = torch.from_numpy(session.run(["logits"], {"input_ids": tokens.numpy()})[0])
        different = int((ours.argmax(-1) != theirs.argmax(-1)).sum())
        if different:
            raise MegatronPruneError(
                f"{file}: onnxruntime's most likely token differs at {different} of {tokens.numel()} positions"
            )
        largest = max(largest, (ours - theirs).abs().max().item())
        positions += tokens.numel()
    return OnnxReport(file, positions, largest)
