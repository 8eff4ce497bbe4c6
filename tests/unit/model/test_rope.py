"""Inverse frequencies against transformers' own, and the tables made of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_prune.architecture import Architecture, Rope, uniform_kv_groups
from megatron_prune.errors import UserError
from megatron_prune.model.rope import RotaryTables, apply_rope, inverse_frequencies

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
KINDS: list[tuple[str, float, dict[str, Any]]] = [
    ("linear", 10000.0, {"factor": 2.5}),
    ("llama3", 500000.0, LLAMA3),
    ("yarn", 1000000.0, YARN),
    ("yarn", 1000000.0, YARN | {"beta_fast": 16.0, "beta_slow": 2.0}),
    ("yarn", 1000000.0, YARN | {"truncate": False}),
    ("yarn", 1000000.0, YARN | {"attention_factor": 0.7}),
    ("yarn", 1000000.0, YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}),
    ("yarn", 10000.0, YARN | {"factor": 1.0}),
]


def tiny(rope: Rope, head_dim: int = 64) -> Architecture:
    return Architecture("llama", 1, 64, 8, 1, uniform_kv_groups(1, 1, 1), head_dim, 10, rope=rope)


@pytest.mark.parametrize(("kind", "theta", "options"), KINDS)
def test_frequencies_equal_transformers(kind: str, theta: float, options: dict[str, Any]) -> None:
    parameters = {"rope_type": kind, "rope_theta": theta, **options}
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=1, head_dim=64, max_position_embeddings=131072, rope_parameters=parameters
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), torch.float32)
    actual, factor = inverse_frequencies(Rope(theta, kind, tuple(sorted(options.items()))), 64)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0.0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


def test_default_frequencies_are_the_geometric_progression() -> None:
    frequencies, factor = inverse_frequencies(Rope(theta=100.0), 4)
    torch.testing.assert_close(frequencies, torch.tensor([1.0, 0.1]))
    assert factor == 1.0


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "nonsense"])
def test_unsupported_kind_is_named(kind: str) -> None:
    with pytest.raises(UserError, match=f"rope type '{kind}' is not supported"):
        inverse_frequencies(Rope(kind=kind), 8)


@pytest.mark.parametrize("value", [None, "4", -1.0, True])
def test_missing_or_silly_option_is_named(value: object) -> None:
    with pytest.raises(UserError, match="needs a positive number for 'factor'"):
        inverse_frequencies(Rope(kind="linear", options=(("factor", value),)), 8)


def test_optional_options_and_their_order_are_checked() -> None:
    yarn = (("beta_fast", "x"), ("factor", 2.0), ("original_max_position_embeddings", 64))
    with pytest.raises(UserError, match="'beta_fast' must be a number"):
        inverse_frequencies(Rope(kind="yarn", options=yarn), 8)
    llama3 = {"factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    with pytest.raises(UserError, match="must be above 'low_freq_factor'"):
        inverse_frequencies(Rope(kind="llama3", options=tuple(sorted(llama3.items()))), 8)


def test_tables_grow_and_keep_their_prefix() -> None:
    tables = RotaryTables(tiny(Rope()))
    short_cos, _ = tables(3, torch.device("cpu"), torch.float32)
    long_cos, long_sin = tables(9, torch.device("cpu"), torch.float32)
    again, _ = tables(3, torch.device("cpu"), torch.float32)
    assert short_cos.shape == (3, 64)
    assert torch.equal(long_cos[:3], short_cos)
    assert again.data_ptr() == long_cos.data_ptr()
    torch.testing.assert_close(long_cos**2 + long_sin**2, torch.ones(9, 64))


def test_tables_made_during_inference_serve_training() -> None:
    tables = RotaryTables(tiny(Rope()))
    with torch.inference_mode():
        tables(4, torch.device("cpu"), torch.float32)
    x = torch.ones(1, 1, 4, 64, requires_grad=True)
    apply_rope(x, *tables(4, torch.device("cpu"), torch.float32)).sum().backward()
    assert x.grad is not None


def test_rotation_depends_on_the_distance_only() -> None:
    cos, sin = RotaryTables(tiny(Rope()))(12, torch.device("cpu"), torch.float32)
    q, k = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    rotated_q = apply_rope(q.expand(1, 1, 12, 64), cos, sin)[0, 0]
    rotated_k = apply_rope(k.expand(1, 1, 12, 64), cos, sin)[0, 0]
    scores = rotated_q @ rotated_k.T
    for offset in range(5):
        diagonal = scores.diagonal(-offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
