"""Chooses, once per run, which implementation of every hot operation is used, and remembers why.

Every operation has an order of preference; the first that can be used on the device is taken, or the one the user
forces. Optional libraries are looked for by the very submodule that is needed, because a package called ``apex``
that is not NVIDIA's exists and because partial builds are common.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from megatron_prune.config.values import nearest
from megatron_prune.errors import UserError
from megatron_prune.ops import activation, attention, loss, norm, optimizer, saliency, saliency_torch

#: Device types for which torch.optim.AdamW(fused=True) exists.
FUSED_ADAM_DEVICES = ("cpu", "cuda", "mps", "xpu")


@dataclasses.dataclass(frozen=True)
class OpChoice:
    """One row of the table a run prints.

    Attributes:
        op: operation, e.g. ``rms_norm``.
        implementation: ``transformer-engine``, ``apex``, ``csrc`` (our kernels), ``fused`` (a PyTorch kernel) or
            ``torch`` (written out).
        reason: why this one, and why the preferred ones before it were passed over.
    """

    op: str
    implementation: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Ops:
    """The operations the model and the trainer call. Shapes and dtypes are with the plain versions.

    Attributes:
        rms_norm: :func:`megatron_prune.ops.norm.rms_norm`.
        swiglu: :func:`megatron_prune.ops.activation.swiglu`.
        attention: :func:`megatron_prune.ops.attention.attention`.
        cross_entropy: :func:`megatron_prune.ops.loss.chunked`.
        adam: :func:`megatron_prune.ops.optimizer.adam`.
        saliency: :class:`megatron_prune.ops.saliency.Saliency`.
        choices: which implementation each of them is, and why.
    """

    rms_norm: norm.RmsNorm
    swiglu: activation.Swiglu
    attention: attention.Attention
    cross_entropy: loss.HeadLoss
    adam: optimizer.Adam
    saliency: saliency.Saliency
    choices: tuple[OpChoice, ...]


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """An implementation: where it runs, what speaks for it, and how to get it (may raise when not installed)."""

    name: str
    devices: tuple[str, ...] | None
    note: str
    load: Callable[[], Any]


class _Unavailable(Exception):
    """An implementation cannot be used here; the message says why."""


def torch_ops() -> Ops:
    """The written-out implementation of everything: the reference, on any device and dtype."""
    return build_ops({op: "torch" for op in _candidates()}, torch.device("cpu"))


def build_ops(forced: Mapping[str, str], device: torch.device) -> Ops:
    """Choose every operation's implementation.

    Args:
        forced: operation to implementation, see :func:`parse_forced`; the others are chosen.
        device: where the model will run; only its type matters, nothing is allocated.

    Raises:
        UserError: a forced implementation is unknown or cannot be used here.
    """
    chosen: dict[str, Any] = {}
    choices = []
    for op, candidates in _candidates(device.type).items():
        if op in forced:
            candidate = _named(op, forced[op], device.type)
            chosen[op] = _load_forced(op, candidate, device)
            choices.append(OpChoice(op, candidate.name, "forced"))
            continue
        chosen[op], choice = _first_usable(op, candidates, device)
        choices.append(choice)
    return Ops(**chosen, choices=tuple(choices))


def parse_forced(settings: Sequence[str]) -> dict[str, str]:
    """Read ``OP=IMPLEMENTATION`` settings, e.g. ``("rms_norm=torch",)``.

    Raises:
        UserError: not of that form, or an unknown operation or implementation (the valid ones are listed).
    """
    forced: dict[str, str] = {}
    for setting in settings:
        op, equals, implementation = setting.partition("=")
        if not equals:
            raise UserError(f"op setting {setting!r} is not OP=IMPLEMENTATION; write e.g. rms_norm=torch")
        forced[op] = _named(op, implementation).name
    return forced


def format_choices(ops: Ops) -> str:
    """The table of :attr:`Ops.choices`, one line per operation, with a heading."""
    rows = [("operation", "implementation", "why")]
    rows += [(choice.op, choice.implementation, choice.reason) for choice in ops.choices]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{op:<{widths[0]}}  {name:<{widths[1]}}  {why}" for op, name, why in rows)


def _candidates(device_type: str = "cpu") -> dict[str, tuple[_Candidate, ...]]:
    """Every operation with its implementations, the preferred one first. Names are the fields of :class:`Ops`.

    The names are the same for every device; ``csrc`` is another module for each.
    """
    gpu = ("cuda",)
    te, apex, csrc, fused, plain = "transformer-engine", "apex", "csrc", "fused", "torch"
    written_out = "written out in PyTorch, runs everywhere"
    return {
        "rms_norm": (
            _Candidate(te, gpu, "one kernel each way", norm.load_transformer_engine),
            _Candidate(apex, gpu, "one kernel each way", norm.load_apex),
            _Candidate(fused, gpu, "torch.nn.functional.rms_norm", lambda: norm.fused_rms_norm),
            _Candidate(plain, None, written_out, lambda: norm.rms_norm),
        ),
        "swiglu": (
            _Candidate(fused, None, "keeps two tensors for backward, not three", lambda: activation.fused_swiglu),
            _Candidate(plain, None, written_out, lambda: activation.swiglu),
        ),
        "attention": (
            _Candidate(te, gpu, "flash or cuDNN kernels", attention.load_transformer_engine),
            _Candidate(fused, None, "torch scaled_dot_product_attention", lambda: attention.sdpa_attention),
            _Candidate(plain, None, written_out, lambda: attention.attention),
        ),
        "cross_entropy": (
            _Candidate("chunked", None, "with the output projection, never holds all logits", lambda: loss.chunked),
            _Candidate(te, gpu, "gradient in place of logits", lambda: loss.on_logits(loss.load_transformer_engine())),
            _Candidate(apex, gpu, "fused softmax and loss", lambda: loss.on_logits(loss.load_apex())),
            _Candidate(fused, None, "torch's cross_entropy", lambda: loss.on_logits(loss.fused_cross_entropy)),
            _Candidate(plain, None, written_out, lambda: loss.on_logits(loss.cross_entropy)),
        ),
        # PyTorch's own fused AdamW goes first: as fast as the libraries', and its state is the one PyTorch documents.
        "adam": (
            _Candidate(fused, FUSED_ADAM_DEVICES, "torch.optim.AdamW(fused=True)", lambda: optimizer.fused_adam),
            _Candidate(te, gpu, "FusedAdam", optimizer.load_transformer_engine),
            _Candidate(apex, gpu, "FusedAdam", optimizer.load_apex),
            _Candidate(plain, None, "torch.optim.AdamW, runs everywhere", lambda: optimizer.adam),
        ),
        "saliency": (
            _Candidate(
                csrc,
                tuple(saliency.MODULES),
                "our kernels: one pass over weight and gradient",
                lambda: saliency.load_csrc(device_type),
            ),
            _Candidate(plain, None, written_out, saliency_torch.TorchSaliency),
        ),
    }


def _named(op: str, implementation: str, device_type: str = "cpu") -> _Candidate:
    table = _candidates(device_type)
    if op not in table:
        raise UserError(f"unknown op {op!r}{nearest(op, table)} (ops: {', '.join(table)})")
    by_name = {candidate.name: candidate for candidate in table[op]}
    if implementation not in by_name:
        guess = nearest(implementation, by_name)
        raise UserError(f"op {op} has no implementation {implementation!r}{guess} (it has: {', '.join(by_name)})")
    return by_name[implementation]


def _load(candidate: _Candidate, device: torch.device) -> Any:
    if candidate.devices is not None and device.type not in candidate.devices:
        raise _Unavailable(f"needs {' or '.join(candidate.devices)}, the device is {device.type}")
    try:
        return candidate.load()
    # A library built for another PyTorch or CUDA fails to load in each of these ways.
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise _Unavailable(f"{type(error).__name__}: {first_line}") from error


def _load_forced(op: str, candidate: _Candidate, device: torch.device) -> Any:
    try:
        return _load(candidate, device)
    except _Unavailable as why:
        raise UserError(
            f"op {op} cannot use {candidate.name} here ({why}); leave {op}={candidate.name} out to have one chosen"
        ) from why


def _first_usable(op: str, candidates: tuple[_Candidate, ...], device: torch.device) -> tuple[Any, OpChoice]:
    passed_over = []
    for candidate in candidates:
        try:
            function = _load(candidate, device)
        except _Unavailable as why:
            passed_over.append(f"no {candidate.name} ({why})")
            continue
        return function, OpChoice(op, candidate.name, "; ".join([candidate.note, *passed_over]))
    raise AssertionError(f"the last candidate of {op} must be usable everywhere")
