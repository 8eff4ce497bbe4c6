"""The estimate of activations against every byte that is alive in the passes themselves, on the CPU."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from megatron_prune import activations
from megatron_prune.activations import Stage, activation_bytes, loss_bytes
from megatron_prune.architecture import Architecture
from megatron_prune.config import parse_source_shape
from megatron_prune.model.attention import RMSNorm, logical_shapes
from megatron_prune.model.transformer import DecoderLayer
from megatron_prune.ops.dispatch import Ops, build_ops
from megatron_prune.parallel import linear_loss, matmul
from megatron_prune.parallel.layers import TensorParallel
from megatron_prune.parallel.linear_loss import linear_cross_entropy

MOST_ABOVE = 1.15
MHA = "hidden=64,ffn=192,heads=4,kv_heads=4,head_dim=16,layers=4,vocab=512"
GQA = "hidden=96,ffn=256,heads=6,kv_heads=2,head_dim=16,layers=3,vocab=300,qk_norm=1"
NARROW = "hidden=64,ffn=16,heads=8,kv_heads=8,head_dim=16,layers=2,vocab=64"
TIED = "hidden=64,ffn=96,heads=4,kv_heads=4,head_dim=16,layers=2,vocab=2048,tied=1"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that operations make, while it is alive; the peak is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {
            tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), given)
        return out

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._alive or place in given:  # a view, or written in place
            return
        self._alive.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, place, size)

    def _forget(self, place: int, size: int) -> None:
        self._alive.discard(place)
        self.now -= size


class _FusedNorm(torch.autograd.Function):
    """Keeps what a GPU's kernel keeps: the input and one number a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        with torch.no_grad():
            scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return x * scale.to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        return grads[0] * weight, (grads[0] * x).flatten(0, -2).sum(0), None


def _gpu_ops() -> Ops:
    """The implementations that a GPU gets, as far as the bytes they keep go."""
    ops = build_ops({"attention": "fused", "swiglu": "fused"}, torch.device("cpu"))
    return dataclasses.replace(ops, rms_norm=lambda x, weight, eps, live: _FusedNorm.apply(x, weight, eps))


class _Model:
    """One stage with both ends; its weights lie side by side in one buffer, as under ZeRO."""

    def __init__(self, arch: Architecture, dtype: torch.dtype, recompute: bool) -> None:
        ops, tp = _gpu_ops(), TensorParallel()
        self.layers = nn.ModuleList([DecoderLayer(arch, shape, ops, tp) for shape in logical_shapes(arch)]).to(dtype)
        self.norm = RMSNorm(arch.hidden_size, arch.hidden_size, arch.norm_eps, ops).to(dtype)
        self.embedding = nn.Embedding(arch.vocab_size, arch.hidden_size, dtype=dtype)
        self.head = (
            self.embedding
            if arch.tie_embeddings
            else nn.Linear(arch.hidden_size, arch.vocab_size, bias=False).to(dtype)
        )
        self.recompute = recompute
        self.buffers: Any = None
        self.parameters: list[nn.Parameter] = [
            *self.embedding.parameters(),
            *self.layers.parameters(),
            *self.norm.parameters(),
        ]
        self.parameters += [] if arch.tie_embeddings else self.head.parameters()
        self.parameters.sort(key=lambda parameter: parameter.dim() < 2)
        flat = torch.cat([parameter.detach().flatten() for parameter in self.parameters])
        pieces = flat.split([parameter.numel() for parameter in self.parameters])
        for parameter, piece in zip(self.parameters, pieces, strict=True):
            parameter.data = piece.view_as(parameter)
            parameter.grad = torch.zeros_like(parameter)
            if dtype != torch.float32:
                parameter.register_post_accumulate_grad_hook(self._add_to_sum)

    def _add_to_sum(self, parameter: Tensor) -> None:
        """As DeepSpeed: the sum in fp32 takes each gradient as it comes."""
        assert parameter.grad is not None
        parameter.grad.to(torch.float32)
        parameter.grad.zero_()

    def micro_batch(self, tokens: Tensor) -> None:
        """Forward and backward, with the output held until the next one's is there."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        out = self.norm(x)
        del x
        self.buffers = (out, self.buffers and self.buffers[0])
        loss = linear_cross_entropy(
            out.flatten(0, -2), self.head.weight, tokens.flatten(), 0, len(self.head.weight), TensorParallel()
        )
        loss.backward()


def _within(estimate: int, measured: int) -> None:
    assert measured <= estimate <= MOST_ABOVE * measured, f"{estimate / measured:.3f} of {measured} B"


@pytest.fixture(autouse=True)
def _products_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (matmul, linear_loss):
        monkeypatch.setattr(module, "product_dtype", lambda x: x.dtype)


def _stage(arch: Architecture, tokens: int, dtype: torch.dtype, chunk_bytes: int) -> Stage:
    return Stage(
        arch,
        range(arch.num_layers),
        first=True,
        last=True,
        in_flight=1,
        tokens=tokens,
        stem_tokens=tokens,
        element_bytes=dtype.itemsize,
        chunk_bytes=chunk_bytes,
    )


def test_chunks_are_the_losses() -> None:
    assert linear_loss.CHUNK_BYTES["cuda"] == activations.CHUNK_BYTES
    assert linear_loss.LEAST_CHUNK == activations.LEAST_CHUNK


@DTYPES
@pytest.mark.parametrize(("tokens", "hidden", "vocab"), [(2048, 16, 4096), (160, 64, 6000), (512, 256, 1024)])
def test_loss(tokens: int, hidden: int, vocab: int, dtype: torch.dtype) -> None:
    chunk_bytes = 512 * vocab * 4
    arch = parse_source_shape(f"hidden={hidden},ffn=4,heads=1,head_dim=2,layers=1,vocab={vocab}")
    x = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, hidden, dtype=dtype, requires_grad=True)
    labels = torch.randint(vocab, (tokens,))
    with mock.patch.dict(linear_loss.CHUNK_BYTES, cpu=chunk_bytes), LiveBytes() as live:
        loss = linear_cross_entropy(x, weight, labels, 0, vocab, TensorParallel())
    _within(loss_bytes(_stage(arch, tokens, dtype, chunk_bytes)), live.peak)
    assert loss.isfinite()


@DTYPES
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("source", "chunk"), [(MHA, 128), (GQA, 4096), (NARROW, 4096), (TIED, 128), (TIED, 4096)])
def test_step(source: str, recompute: bool, dtype: torch.dtype, chunk: int) -> None:
    arch, (batch, seq_length) = parse_source_shape(source), (2, 128)
    chunk_bytes = chunk * arch.vocab_size * 4
    model = _Model(arch, dtype, recompute)
    batches = torch.randint(arch.vocab_size, (3, batch, seq_length))
    model.micro_batch(batches[0])
    with mock.patch.dict(linear_loss.CHUNK_BYTES, cpu=chunk_bytes), LiveBytes() as live:
        for tokens in batches:
            model.micro_batch(tokens)
    _within(activation_bytes(_stage(arch, batch * seq_length, dtype, chunk_bytes), recompute), live.peak)
