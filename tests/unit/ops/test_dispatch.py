"""Which implementation is chosen, forced and explained; optional libraries are stood in for by small fakes."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_prune.errors import UserError
from megatron_prune.ops import Ops, build_ops, format_choices, parse_forced, torch_ops
from megatron_prune.ops import attention as attention_ops
from megatron_prune.ops.__main__ import main

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BUILT_IN = ("rms_norm", "swiglu", "attention", "cross_entropy", "adam")
OPS = (*BUILT_IN, "saliency")


def chosen(ops: Ops) -> dict[str, str]:
    """What was chosen, but for saliency: that depends on what this installation could build."""
    return {choice.op: choice.implementation for choice in ops.choices if choice.op != "saliency"}


class FakeRMSNorm(torch.nn.Module):
    """Transformer Engine's constructor; its backward pass reads the weight from the module, hence the hook below."""

    def __init__(self, normalized_shape: int, *, eps: float, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.empty(normalized_shape, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        y.register_hook(lambda grad: grad + 0 * self.weight.sum())  # fails on a meta weight
        return y


class FakeDotProductAttention(torch.nn.Module):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        *,
        num_gqa_groups: int,
        attention_dropout: float,
        qkv_format: str,
    ) -> None:
        super().__init__()
        assert attention_dropout == 0.0
        assert qkv_format == "bshd"
        self.sizes = (num_attention_heads, num_gqa_groups, kv_channels)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, attn_mask_type: str, window_size: tuple[int, int]) -> Tensor:
        assert attn_mask_type == "causal"
        assert (q.shape[2], k.shape[2], q.shape[3]) == self.sizes
        left, right = window_size
        assert right == 0
        window = None if left == -1 else left + 1
        output = attention_ops.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), window)
        return output.transpose(1, 2).flatten(2)


class FakeFusedAdam(torch.optim.AdamW):
    def __init__(self, params: Any, *, adam_w_mode: bool, **settings: Any) -> None:
        assert adam_w_mode
        super().__init__(params, **settings)


def fake_parallel_cross_entropy(logits: Tensor, target: Tensor, smoothing: float, reduce_loss: bool, /) -> Tensor:
    assert smoothing == 0.0
    assert reduce_loss
    assert logits.dim() == 3
    return F.cross_entropy(logits[0].float(), target[0])


class FakeXentropy:
    @staticmethod
    def apply(logits: Tensor, labels: Tensor, smoothing: float, padding_idx: int, half_to_float: bool) -> Tensor:
        assert smoothing == 0.0
        assert half_to_float == (logits.dtype != torch.float32)
        loss = F.cross_entropy(logits.float(), labels, reduction="none")
        return loss.masked_fill(labels == padding_idx, 0.0)


def install(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    """Make a module importable, with its parents."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        prefix = ".".join(parts[:end])
        if prefix not in sys.modules:
            monkeypatch.setitem(sys.modules, prefix, types.ModuleType(prefix))
    for attribute, value in attributes.items():
        monkeypatch.setattr(sys.modules[name], attribute, value, raising=False)


@pytest.fixture
def transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    te = "transformer_engine.pytorch"
    install(monkeypatch, te, RMSNorm=FakeRMSNorm, DotProductAttention=FakeDotProductAttention)
    install(monkeypatch, f"{te}.cross_entropy", parallel_cross_entropy=fake_parallel_cross_entropy)
    install(monkeypatch, f"{te}.optimizers", FusedAdam=FakeFusedAdam)


@pytest.fixture
def nvidia_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    def affine(x: Tensor, weight: Tensor, shape: torch.Size, eps: float) -> Tensor:
        return F.rms_norm(x, shape, weight, eps)

    install(monkeypatch, "apex.normalization.fused_layer_norm", fused_rms_norm_affine=affine)
    install(monkeypatch, "apex.contrib.xentropy", SoftmaxCrossEntropyLoss=FakeXentropy)
    install(monkeypatch, "apex.optimizers", FusedAdam=FakeFusedAdam)
    for extension in ("amp_C", "fused_layer_norm_cuda"):
        install(monkeypatch, extension)


@pytest.fixture
def no_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformer_engine", "transformer_engine.pytorch", "apex", "amp_C", "fused_layer_norm_cuda"):
        monkeypatch.setitem(sys.modules, name, None)


def test_cpu_choices() -> None:
    assert chosen(build_ops({}, CPU)) == {
        "rms_norm": "torch",  # quicker there than F.rms_norm
        "swiglu": "fused",
        "attention": "fused",
        "cross_entropy": "chunked",
        "adam": "fused",
    }


def test_torch_ops_is_all_plain() -> None:
    assert chosen(torch_ops()) == dict.fromkeys(BUILT_IN, "torch")


@pytest.mark.usefixtures("no_libraries")
def test_cuda_without_libraries_is_pytorchs_own() -> None:
    ops = build_ops({}, CUDA)
    assert chosen(ops) == {**dict.fromkeys(BUILT_IN, "fused"), "cross_entropy": "chunked"}
    reasons = {choice.op: choice.reason for choice in ops.choices}
    assert "no transformer-engine" in reasons["rms_norm"]
    assert "no apex" in reasons["rms_norm"]
    assert "Error" in reasons["attention"]


@pytest.mark.usefixtures("transformer_engine", "nvidia_apex")
def test_cuda_with_both_libraries() -> None:
    assert chosen(build_ops({}, CUDA)) == {
        "rms_norm": "transformer-engine",
        "swiglu": "fused",
        "attention": "transformer-engine",
        "cross_entropy": "chunked",
        "adam": "fused",
    }


@pytest.mark.usefixtures("nvidia_apex")
def test_cuda_with_apex_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    names = chosen(build_ops({}, CUDA))
    assert (names["rms_norm"], names["attention"]) == ("apex", "fused")


@pytest.mark.usefixtures("no_libraries")
def test_the_other_package_called_apex_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    assert "apex" not in chosen(build_ops({}, CUDA)).values()
    with pytest.raises(UserError, match="rms_norm cannot use apex"):
        build_ops({"rms_norm": "apex"}, CUDA)


@pytest.mark.usefixtures("nvidia_apex")
def test_apex_without_its_cuda_extension_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    monkeypatch.setitem(sys.modules, "fused_layer_norm_cuda", None)
    assert chosen(build_ops({}, CUDA))["rms_norm"] == "fused"


@pytest.mark.usefixtures("transformer_engine", "nvidia_apex")
@pytest.mark.parametrize("library", ["transformer-engine", "apex"])
def test_library_wrappers_compute_the_same(library: str) -> None:
    forced = {"rms_norm": library, "cross_entropy": library, "adam": library}
    if library == "transformer-engine":
        forced["attention"] = library
    ops, plain = build_ops(forced, CUDA), torch_ops()
    generator = torch.Generator().manual_seed(0)

    x = torch.randn(3, 8, generator=generator)
    x[:, 6:] = 0
    gains = [torch.nn.Parameter(torch.linspace(0.5, 2, 8)) for _ in range(2)]
    results = [which.rms_norm(x, gain, 0.1, 6) for which, gain in zip((ops, plain), gains, strict=True)]
    for result in results:
        result.square().sum().backward()
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(gains[0].grad, gains[1].grad)

    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight = (torch.randn(size, 4, generator=generator).to(dtype) for size in (5, 7))
        labels = torch.tensor([0, 6, 2, 2, 1])
        expected = plain.cross_entropy(hidden, weight, labels)
        torch.testing.assert_close(ops.cross_entropy(hidden, weight, labels), expected)

    q, k, v = (torch.randn(2, heads, 5, 4, generator=generator) for heads in (4, 2, 2))
    for window in (None, 2, 9):
        torch.testing.assert_close(ops.attention(q, k, v, window), plain.attention(q, k, v, window))

    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    for which, parameter in zip((ops, plain), parameters, strict=True):
        parameter.grad = torch.tensor([1.0, -2.0, 0.0])
        which.adam([parameter], 0.1, (0.9, 0.95), 1e-8, 0.5).step()
    torch.testing.assert_close(parameters[0], parameters[1])


def test_forcing_is_obeyed_and_said() -> None:
    ops = build_ops({"attention": "torch"}, CPU)
    assert ops.attention is attention_ops.attention
    assert next(choice for choice in ops.choices if choice.op == "attention").reason == "forced"


@pytest.mark.parametrize("implementation", ["transformer-engine", "apex", "fused"])
def test_forcing_a_gpu_kernel_on_a_cpu_says_why(implementation: str) -> None:
    with pytest.raises(UserError, match="needs cuda, the device is cpu") as caught:
        build_ops({"rms_norm": implementation}, CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_libraries")
def test_forcing_a_missing_library_says_why() -> None:
    with pytest.raises(UserError, match="attention cannot use transformer-engine here .*Error"):
        build_ops({"attention": "transformer-engine"}, CUDA)


def test_parse_forced() -> None:
    assert parse_forced(("rms_norm=torch", "adam=fused")) == {"rms_norm": "torch", "adam": "fused"}
    assert parse_forced(()) == {}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("rms_norm", ["'rms_norm'", "OP=IMPLEMENTATION"]),
        ("rmsnorm=torch", ["'rmsnorm'", "did you mean rms_norm", "cross_entropy"]),
        ("rms_norm=apx", ["'apx'", "did you mean apex", "transformer-engine, apex, fused, torch"]),
        ("swiglu=apex", ["swiglu", "'apex'", "fused, torch"]),
        ("rms_norm=", ["''", "torch"]),
    ],
)
def test_parse_forced_refuses(setting: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_forced((setting,))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_table_has_a_line_per_op() -> None:
    heading, *lines = format_choices(build_ops({}, CPU)).splitlines()
    assert heading.split() == ["operation", "implementation", "why"]
    assert tuple(line.split()[0] for line in lines) == OPS


def test_command_prints_facts_and_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--force", "swiglu=torch", "rms_norm=torch"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert "forced" in next(line for line in out.splitlines() if line.startswith("swiglu"))


def test_command_refuses_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--force", "rms_norm=none"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
