"""Hugging Face exports, and the proof that an export is what it should be."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_prune.architecture import Architecture, TensorSpec, tensor_specs
from megatron_prune.checkpoint.hf_config import TOKEN_ID_KEYS, hf_config_from_architecture
from megatron_prune.checkpoint.hf_quiet import quiet_transformers
from megatron_prune.checkpoint.hf_source import CONFIG_FILE, INDEX_FILE, TOKENIZER_PATTERNS, WEIGHTS_FILE, read_config
from megatron_prune.errors import MegatronPruneError, UserError
from megatron_prune.model.attention import logical_shapes
from megatron_prune.model.transformer import CausalLM
from megatron_prune.ops.dispatch import torch_ops

GENERATION_FILE: Final = "generation_config.json"
#: safetensors metadata; "format" is what transformers asks for, the other marks what may be replaced.
METADATA: Final[Mapping[str, str]] = {"format": "pt", "written_by": "megatron-prune"}
LOGIT_TOLERANCE: Final = 1e-4  # fp32, largest difference to transformers, relative to logits above 1
VERIFY_TOKENS: Final = (2, 16)  # batch and length of the random text logits are compared on

#: Gives a tensor by its logical name, in the logical shape and any float dtype.
TensorSource = Callable[[str], Tensor] | Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What :func:`export_hf` wrote.

    Attributes:
        directory: of the export.
        hf_class: the transformers class that loads it.
        dtype: of the weights, e.g. ``bfloat16``.
        num_parameters: as stored, a tied matrix once.
        num_bytes: of all weights.
        shards: names of the safetensors files.
        expanded_kv: K/V heads were repeated, one per query head, because stock GQA can't express the groups.
    """

    directory: Path
    hf_class: str
    dtype: str
    num_parameters: int
    num_bytes: int
    shards: tuple[str, ...]
    expanded_kv: bool


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """What :func:`verify_export` found.

    Attributes:
        num_tensors: stored tensors compared bit for bit.
        max_abs_logit_difference: transformers against this project, fp32.
    """

    num_tensors: int
    max_abs_logit_difference: float


def export_hf(
    directory: Path,
    arch: Architecture,
    tensors: TensorSource,
    *,
    dtype: torch.dtype,
    tokenizer_dir: Path | None,
    source_config: Mapping[str, Any] | None,
    max_shard_bytes: int,
) -> ExportReport:
    """Write a model that stock transformers loads. Complete or not at all; an earlier export is replaced.

    Args:
        directory: target; absent, empty or an earlier export.
        arch: what the model is.
        tensors: weights by logical name, asked for once each in model order and one shard held at a time.
        dtype: to store in; a floating point type.
        tokenizer_dir: directory whose tokenizer and generation config travel with the export, if any.
        source_config: the source's ``config.json``; its token ids are kept.
        max_shard_bytes: largest size of one safetensors file, unless a single tensor is larger.

    Returns:
        What was written.

    Raises:
        UserError: the target is a file or a directory of something else.
    """
    directory = directory.resolve()
    check_replaceable(directory)
    specs = {spec.name: spec for spec in tensor_specs(arch)}
    sizes = {name: _stored_bytes(arch, spec, dtype) for name, spec in specs.items()}
    plan = _plan_shards(sizes, max_shard_bytes)
    dtype_name = str(dtype).removeprefix("torch.")
    config = hf_config_from_architecture(arch, torch_dtype=dtype_name, extra=source_config or {})
    with replacing(directory) as scratch:
        for file_name, names in plan.items():
            shard = {name: _stored(arch, specs[name], _logical(arch, specs[name], tensors), dtype) for name in names}
            save_file(shard, scratch / file_name, metadata=dict(METADATA))
        if len(plan) > 1:
            weight_map = {name: file_name for file_name, names in plan.items() for name in names}
            total = {"total_size": sum(sizes.values())}
            _write_json(scratch / INDEX_FILE, {"metadata": total, "weight_map": weight_map})
        _write_json(scratch / CONFIG_FILE, config)
        _write_json(scratch / GENERATION_FILE, {key: config[key] for key in TOKEN_ID_KEYS})
        if tokenizer_dir is not None:
            copy_companions(tokenizer_dir, scratch)
    return ExportReport(
        directory=directory,
        hf_class=config["architectures"][0],
        dtype=dtype_name,
        num_parameters=sum(sizes.values()) // dtype.itemsize,
        num_bytes=sum(sizes.values()),
        shards=tuple(plan),
        expanded_kv=not arch.uniform_kv,
    )


@torch.no_grad()
def verify_export(directory: Path, arch: Architecture, tensors: TensorSource) -> VerifyReport:
    """Reload an export with plain transformers and compare it with what was to be written.

    Args:
        directory: of the export.
        arch: what was exported.
        tensors: the weights given to :func:`export_hf`.

    Returns:
        The number of tensors, all equal to the bit, and the largest logit difference.

    Raises:
        MegatronPruneError: a weight differs, is missing or too many, or the logits differ by more than 1e-4 (times the
            largest logit where that is above 1).
    """
    import transformers  # takes seconds, and only exports need it

    quiet_transformers()
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    stock, loading = loaded
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    problems = sorted(str(item) for kind in kinds for item in loading[kind])
    if problems:
        raise MegatronPruneError(f"export {directory}: transformers reports missing or unexpected tensors: {problems}")
    specs = tensor_specs(arch)
    expanded = _compare_weights(directory, arch, tensors, stock.state_dict())
    stock.eval().float()
    reloaded = stock.state_dict()
    with torch.device("meta"):
        ours = CausalLM(arch, logical_shapes(arch), torch_ops())
    # The reloaded storage serves both models; only expanded K/V heads exist in two shapes.
    ours.load_state_dict({spec.name: expanded.get(spec.name, reloaded[spec.name]) for spec in specs}, assign=True)
    ours.set_shapes(logical_shapes(arch))  # remakes the K/V index, which the meta device left without content
    tokens = torch.randint(arch.vocab_size, VERIFY_TOKENS, generator=torch.Generator().manual_seed(0))
    logits = ours(tokens)
    difference = (stock(input_ids=tokens).logits.float() - logits).abs().max().item()
    limit = LOGIT_TOLERANCE * max(1.0, logits.abs().max().item())  # rounding grows with the logits
    if not difference <= limit:  # also catches NaN
        raise MegatronPruneError(
            f"export {directory}: logits of transformers differ by {difference:.2e} (limit {limit:.0e})"
        )
    return VerifyReport(num_tensors=len(specs), max_abs_logit_difference=difference)


def export_verified(
    directory: Path,
    arch: Architecture,
    tensors: TensorSource,
    *,
    dtype: torch.dtype,
    tokenizer_dir: Path | None,
    source_config: Mapping[str, Any] | None,
    max_shard_bytes: int,
) -> tuple[ExportReport, VerifyReport]:
    """:func:`export_hf`, then :func:`verify_export`; takes the same arguments.

    Raises:
        MegatronPruneError: the check failed; what was written is kept beside the target as ``NAME.unverified``.
    """
    report = export_hf(
        directory,
        arch,
        tensors,
        dtype=dtype,
        tokenizer_dir=tokenizer_dir,
        source_config=source_config,
        max_shard_bytes=max_shard_bytes,
    )
    try:
        return report, verify_export(report.directory, arch, tensors)
    except MegatronPruneError:
        suspect = report.directory.with_name(f"{report.directory.name}.unverified")
        shutil.rmtree(suspect, ignore_errors=True)
        report.directory.rename(suspect)
        raise


def _compare_weights(
    directory: Path, arch: Architecture, tensors: TensorSource, stored: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Compare every stored tensor to the bit; returns the fp32 logical form of those stored expanded."""
    dtype = getattr(torch, read_config(directory)["torch_dtype"])
    expanded: dict[str, Tensor] = {}
    for spec in tensor_specs(arch):
        logical = _logical(arch, spec, tensors)
        if not _same_bits(stored[spec.name].cpu(), _stored(arch, spec, logical, dtype)):
            raise MegatronPruneError(f"export {directory}: tensor '{spec.name}' differs from the one to be written")
        if _is_expanded(arch, spec):
            expanded[spec.name] = logical.to(dtype).float()
    return expanded


def _same_bits(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def _logical(arch: Architecture, spec: TensorSpec, tensors: TensorSource) -> Tensor:
    tensor = tensors[spec.name] if isinstance(tensors, Mapping) else tensors(spec.name)
    expected = arch.tensor_shape(spec)
    assert tuple(tensor.shape) == expected, (spec.name, tuple(tensor.shape), expected)
    return tensor.detach().cpu()


def _is_expanded(arch: Architecture, spec: TensorSpec) -> bool:
    """Stock GQA wants equal groups in all layers; otherwise every query head gets its own copy of K and V."""
    return not arch.uniform_kv and "kv_heads" in spec.axes


def _stored(arch: Architecture, spec: TensorSpec, logical: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor as it stands in the file."""
    tensor = logical.to(dtype)
    if _is_expanded(arch, spec):
        assert spec.layer is not None, spec
        assert spec.axes[0] == "kv_heads", spec
        heads = tensor.reshape(arch.num_kv_heads(spec.layer), arch.head_dim, *tensor.shape[1:])
        tensor = heads.index_select(0, torch.tensor(arch.kv_of_head(spec.layer))).flatten(0, 1)
    return tensor.contiguous()


def _stored_bytes(arch: Architecture, spec: TensorSpec, dtype: torch.dtype) -> int:
    shape = arch.tensor_shape(spec)
    if _is_expanded(arch, spec):
        shape = (arch.axis_size("heads"), *shape[1:])
    return torch.Size(shape).numel() * dtype.itemsize


def _plan_shards(sizes: Mapping[str, int], max_bytes: int) -> dict[str, list[str]]:
    """Names of the tensors of every file, in order and each file filled before the next."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {WEIGHTS_FILE: shards[0]}
    stem, count = Path(WEIGHTS_FILE).stem, len(shards)
    return {f"{stem}-{index:05d}-of-{count:05d}.safetensors": names for index, names in enumerate(shards, start=1)}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def copy_companions(source: Path, target: Path, tokenizer: str | None = None) -> None:
    """Copy the generation config and the tokenizer of a model directory.

    Args:
        source: model directory.
        target: where the files go.
        tokenizer: take the tokenizer from here instead: a directory, ``tokenizer.json``, sentencepiece model or hub id.
    """
    _copy_matching(source, target, (GENERATION_FILE,))
    if tokenizer is None:
        _copy_matching(source, target, TOKENIZER_PATTERNS)
    elif Path(tokenizer).is_dir():
        _copy_matching(Path(tokenizer), target, TOKENIZER_PATTERNS)
    elif Path(tokenizer).is_file():
        shutil.copyfile(tokenizer, target / f"tokenizer{Path(tokenizer).suffix}")
    else:
        import transformers

        transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(target)


def _copy_matching(source: Path, target: Path, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def check_replaceable(directory: Path) -> None:
    """Only an empty directory or an export of ours may be replaced: the target could be the user's source model.

    Raises:
        UserError: the target is something else.
    """
    if not directory.exists():
        return
    if directory.is_dir() and (not any(directory.iterdir()) or any(map(_is_ours, directory.glob("*.safetensors")))):
        return
    raise UserError(f"export target {directory} exists and is no earlier export; choose another or remove it")


def _is_ours(file: Path) -> bool:
    try:
        with safetensors.safe_open(file, framework="pt") as handle:
            return (handle.metadata() or {}).get("written_by") == METADATA["written_by"]
    except (OSError, safetensors.SafetensorError):
        return False


@contextlib.contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """Give a scratch directory beside ``directory`` and let it take that place once the block has succeeded.

    Both names are fixed, so that the next attempt finds what one that was killed has left.
    """
    scratch = directory.with_name(f".writing_{directory.name}")
    previous = directory.with_name(f".replaced_{directory.name}")
    if previous.exists() and not directory.exists():  # killed between the two renames
        previous.rename(directory)
    for leftover in (scratch, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        _sync(sorted(scratch.iterdir()))
        if directory.exists():
            directory.rename(previous)
        try:
            scratch.rename(directory)
        except OSError:
            if previous.exists():
                previous.rename(directory)
            raise
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _sync(files: Sequence[Path]) -> None:
    """Have the contents on the disk before the rename makes them visible."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
