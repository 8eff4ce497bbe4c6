"""Rotary position embedding: inverse frequencies of each kind, and the cosine and sine tables.

The formulas are those Hugging Face's ``modeling_rope_utils`` defines, so that an imported model sees the same
angles. Everything is computed in fp32; the tables are cast to the model dtype by the caller, as Hugging Face does.

Shapes: S sequence length, hd head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from megatron_prune.architecture import Architecture, Rope
from megatron_prune.errors import UserError

#: Option names each supported kind needs, besides ``theta``.
REQUIRED_OPTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
OPTIONAL_NUMBERS: Final = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")  # of yarn
YARN_BETA_FAST: Final = 32.0  # rotations within the original context above which a frequency is kept (YaRN, 3.2)
YARN_BETA_SLOW: Final = 1.0  # rotations below which a frequency is fully interpolated
YARN_MIN_RAMP: Final = 0.001  # keeps the ramp finite when both borders fall on one dimension
YARN_MSCALE_SLOPE: Final = 0.1  # YaRN, eq. 22: 0.1 ln(s) + 1


def check_rope(rope: Rope) -> None:
    """Refuse what :func:`inverse_frequencies` cannot compute.

    Raises:
        UserError: the kind is not supported, or an option it needs is missing or not a number.
    """
    if rope.kind not in REQUIRED_OPTIONS:
        known = ", ".join(REQUIRED_OPTIONS)
        raise UserError(f"rope type '{rope.kind}' is not supported (supported: {known}); choose another source model")
    options = dict(rope.options)
    for key in REQUIRED_OPTIONS[rope.kind]:
        value = options.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(
                f"rope type '{rope.kind}' needs a positive number for '{key}', not {value!r}; "
                "mend rope_scaling (rope_parameters) in config.json"
            )
    for key in OPTIONAL_NUMBERS if rope.kind == "yarn" else ():
        value = options.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"rope option '{key}' must be a number, not {value!r}; mend rope_scaling in config.json")
    if rope.kind == "llama3" and options["high_freq_factor"] <= options["low_freq_factor"]:
        raise UserError("rope option 'high_freq_factor' must be above 'low_freq_factor'; mend it in config.json")


def inverse_frequencies(rope: Rope, head_dim: int) -> tuple[Tensor, float]:
    """Angle per position of every rotated pair, and the factor on cosine and sine.

    Args:
        rope: kind, base and options.
        head_dim: width of a head, even.

    Returns:
        fp32 tensor [hd / 2] in radians per position, and YaRN's attention factor (1 for every other kind).

    Raises:
        UserError: unsupported kind or missing option.
    """
    check_rope(rope)
    options = dict(rope.options)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / options["factor"], 1.0
    if rope.kind == "llama3":
        return _llama3(frequencies, options), 1.0
    if rope.kind == "yarn":
        return _yarn(rope.theta, head_dim, options), _yarn_attention_factor(options)
    return frequencies, 1.0


def _llama3(frequencies: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Long wavelengths are divided by ``factor``, short ones kept, those between are blended."""
    factor, context = options["factor"], options["original_max_position_embeddings"]
    low, high = options["low_freq_factor"], options["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    blend = ((context / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    blended: Tensor = (1 - blend) * frequencies / factor + blend * frequencies
    return blended


def _yarn(theta: float, head_dim: int, options: Mapping[str, Any]) -> Tensor:
    """Interpolate slow dimensions, keep fast ones, with a linear ramp between (YaRN, "NTK-by-parts")."""
    context = options["original_max_position_embeddings"]

    def dimension_with(rotations: float) -> float:
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first = dimension_with(options.get("beta_fast") or YARN_BETA_FAST)
    last = dimension_with(options.get("beta_slow") or YARN_BETA_SLOW)
    if options.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or YARN_MIN_RAMP
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / width).clamp(0.0, 1.0)
    wavelengths = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    keep = 1 - ramp
    blended: Tensor = (1.0 / (options["factor"] * wavelengths)) * (1 - keep) + (1.0 / wavelengths) * keep
    return blended


def _yarn_attention_factor(options: Mapping[str, Any]) -> float:
    given = options.get("attention_factor")
    if given is not None:
        return float(given)

    def magnitude(slope: float) -> float:
        return YARN_MSCALE_SLOPE * slope * math.log(options["factor"]) + 1.0 if options["factor"] > 1 else 1.0

    mscale, mscale_all_dim = options.get("mscale"), options.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return magnitude(mscale) / magnitude(mscale_all_dim)
    return magnitude(1.0)


class RotaryTables:
    """Cosine and sine for positions 0..S-1, kept per device for the longest sequence seen so far.

    A plain object rather than a module: the tables are no state of the model and never enter a checkpoint.

    Args:
        arch: gives head_dim and the rope settings.

    Raises:
        UserError: unsupported kind or missing option.
    """

    def __init__(self, arch: Architecture) -> None:
        with torch.device("cpu"):  # real numbers even where a model without content is built on the meta device
            self._frequencies, self._factor = inverse_frequencies(arch.rope, arch.head_dim)
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(self, seq_length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine, ``[S, hd]`` each, on ``device``; made in fp32 (fp64 for fp64), handed out in ``dtype``."""
        wide = torch.promote_types(dtype, torch.float32)
        tables = self._tables.get((device, wide))
        if tables is None or tables[0].shape[0] < seq_length:
            tables = self._tables[device, wide] = self._build(seq_length, device, wide)
        return tables[0][:seq_length].to(dtype), tables[1][:seq_length].to(dtype)

    def _build(self, seq_length: int, device: torch.device, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        # Tables first made under inference_mode (an evaluation) must serve the training step that follows.
        with torch.inference_mode(False), torch.no_grad():
            positions = torch.arange(seq_length, dtype=wide, device=device)
            angles = torch.outer(positions, self._frequencies.to(device, wide))
            angles = torch.cat((angles, angles), dim=-1)
            return angles.cos() * self._factor, angles.sin() * self._factor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + hd/2) of every head, the Llama order of Hugging Face checkpoints.

    Args:
        x: [B, H, S, hd].
        cos: [S, hd] in the dtype of ``x``.
        sin: like ``cos``.

    Returns:
        [B, H, S, hd] in the dtype of ``x``.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
