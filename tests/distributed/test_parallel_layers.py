"""Split layers compute what whole ones do, in fp64, and one process needs no process group.

The processes of one start go through all cases: starting them costs more than everything they check.
"""

from __future__ import annotations

import faulthandler
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megatron_prune.parallel import linear_loss
from megatron_prune.parallel.layers import ColumnParallelLinear, RowParallelLinear, TensorParallel
from megatron_prune.parallel.linear_loss import linear_cross_entropy
from megatron_prune.parallel.vocab import VocabParallelEmbedding

HANG_SECONDS = 90
BATCH, LENGTH, HIDDEN, FFN = 2, 6, 5, 7  # neither 2 nor 3 divides FFN: the last rank has dead channels
VOCABULARIES = (11, 12, 2, 1)  # padded; whole; fewer than 3 ranks; fewer than any
close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("world", [2, 3])
def test_split_over_processes(tmp_path: Path, world: int) -> None:
    mp.spawn(run, args=(world, str(tmp_path / "rendezvous")), nprocs=world)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_one_process_is_plain_torch(sequence_parallel: bool) -> None:
    assert not dist.is_initialized()
    torch.manual_seed(0)
    tp = TensorParallel(sequence_parallel=sequence_parallel)
    x = torch.randn(2, 7, 5)
    assert tp.enter(x) is x
    assert tp.leave(x) is x
    for layer in (ColumnParallelLinear(5, 3), RowParallelLinear(5, 3, bias=True, tp=tp)):
        assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    without = RowParallelLinear(5, 3, bias=False, tp=tp)
    assert torch.equal(without(x), F.linear(x, without.weight))
    embedding = VocabParallelEmbedding(11, 0, 11, 5, tp)
    ids = torch.randint(11, (2, 7))
    assert torch.equal(embedding(ids), F.embedding(ids, embedding.weight))


@pytest.mark.parametrize("chunk", [None, 1, 4, 6, 100])
def test_loss_of_one_process(chunk: int | None) -> None:
    torch.manual_seed(0)
    labels = torch.randint(11, (6,))
    hidden, weight = torch.randn(6, 5).double().requires_grad_(), torch.randn(11, 5).double().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, 0, 11, TensorParallel(), chunk)
    found = torch.autograd.grad(loss * 3, (hidden, weight))
    expected = F.cross_entropy(F.linear(hidden, weight), labels)
    close(loss, expected)
    for own, complete in zip(found, torch.autograd.grad(expected * 3, (hidden, weight)), strict=True):
        close(own, complete)
    with torch.no_grad(), mock.patch.object(linear_loss, "_add_product_") as product:
        close(linear_cross_entropy(hidden, weight, labels, 0, 11, TensorParallel(), chunk), expected)
    assert not product.called, "an evaluation forms no gradients"


def test_a_token_of_no_rank_fails_without_splitting() -> None:
    tp = TensorParallel()
    with pytest.raises(IndexError):
        VocabParallelEmbedding(4, 0, 4, 5, tp)(torch.tensor([[4]]))


def test_place_must_be_consistent() -> None:
    with pytest.raises(AssertionError, match="rank 2 of 2"):
        TensorParallel(rank=2, size=2)
    with pytest.raises(AssertionError, match="a group exactly where"):
        TensorParallel(rank=0, size=2)
    with pytest.raises(AssertionError, match="5 valid of 4 rows"):
        VocabParallelEmbedding(4, 0, 5, 3, TensorParallel())


def run(rank: int, world: int, rendezvous: str) -> None:
    """Check everything over all processes and, of three, once more over the last two."""
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    check_all(rank, world, dist.group.WORLD)
    if world == 3:
        # Rank 0 stays out: a collective over anything but the given group would wait for it.
        members = dist.new_group([1, 2])
        if rank > 0:
            check_all(rank - 1, 2, members)
    dist.barrier()
    dist.destroy_process_group()


def check_all(rank: int, size: int, group: Any) -> None:
    """Every case, with and without sequence parallelism and recomputation where these matter."""
    for parallel_sequence in (False, True):
        tp = TensorParallel(rank, size, group, parallel_sequence)
        for recompute in (False, True):
            check_mlp(tp, recompute)
            for vocab in VOCABULARIES:
                check_language_model(tp, recompute, vocab)
        check_inputs_survive(tp)
    check_indivisible_sequence(TensorParallel(rank, size, group, sequence_parallel=True))
    tp = TensorParallel(rank, size, group)
    for vocab, strided in itertools.product(VOCABULARIES, (False, True)):
        check_loss(tp, vocab, strided)
    check_extreme_loss(tp)
    check_bf16_loss(tp)


def check_mlp(tp: TensorParallel, recompute: bool) -> None:
    """``x + down(silu(gate(n)) * up(n))`` with ``n = x * gain``: outputs and every gradient."""
    torch.manual_seed(1)
    x = torch.randn(LENGTH, BATCH, HIDDEN).transpose(0, 1)
    weights = [torch.randn(FFN, HIDDEN), torch.randn(FFN, HIDDEN), torch.randn(HIDDEN, FFN)]
    bias, gain = torch.randn(HIDDEN), torch.randn(HIDDEN)
    upstream = torch.randn(BATCH, LENGTH, HIDDEN)

    whole = [t.clone().requires_grad_() for t in (x, gain, *weights, bias)]
    expected = reference_mlp(*whole)
    expected.backward(upstream)
    x_grad, gain_grad, gate_grad, up_grad, down_grad, bias_grad = [grad_of(t) for t in whole]

    rows = -(-FFN // tp.size)
    gate, up = (ColumnParallelLinear(HIDDEN, rows, bias=False) for _ in range(2))
    down = RowParallelLinear(rows, HIDDEN, bias=True, tp=tp)
    fill(gate.weight, shard(weights[0], 0, rows, tp))
    fill(up.weight, shard(weights[1], 0, rows, tp))
    fill(down.weight, shard(weights[2], 1, rows, tp))
    fill(down.bias, bias)
    own_gain = nn.Parameter(gain.clone())
    own_x = sequence_part(x, tp).detach().requires_grad_()

    def block(x: Tensor) -> Tensor:
        entered = tp.enter(x * own_gain)
        residual: Tensor = x + down(F.silu(gate(entered)) * up(entered))
        return residual

    y = recomputed(block)(own_x) if recompute else block(own_x)
    close(y, sequence_part(expected, tp))
    y.backward(sequence_part(upstream, tp))
    close(grad_of(own_x), sequence_part(x_grad, tp))
    close(grad_of(gate.weight), shard(gate_grad, 0, rows, tp))
    close(grad_of(up.weight), shard(up_grad, 0, rows, tp))
    close(grad_of(down.weight), shard(down_grad, 1, rows, tp))
    for own, complete in ((grad_of(down.bias), bias_grad), (grad_of(own_gain), gain_grad)):
        if tp.sequence_parallel:
            assert not torch.allclose(own, complete), "expected a part of the gradient"
            dist.all_reduce(own, group=tp.group)
        close(own, complete)


def reference_mlp(x: Tensor, gain: Tensor, gate: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
    n = x * gain
    return x + F.linear(F.silu(F.linear(n, gate)) * F.linear(n, up), down, bias)


def check_language_model(tp: TensorParallel, recompute: bool, vocab: int) -> None:
    """Embedding, something pointwise, tied head and loss; padding rows hold garbage that must not matter."""
    torch.manual_seed(2)
    table = torch.randn(vocab, HIDDEN)
    ids, labels = torch.randint(vocab, (2, LENGTH, BATCH)).transpose(1, 2)
    whole = table.clone().requires_grad_()
    expected = F.cross_entropy(F.linear(F.embedding(ids, whole).tanh(), whole).flatten(0, 1), labels.flatten())
    expected.backward()

    rows, first, valid = place_vocabulary(vocab, tp)
    embedding = VocabParallelEmbedding(rows, first, valid, HIDDEN, tp)
    fill(embedding.weight, shard(table, 0, rows, tp))
    with torch.no_grad():
        embedding.weight[valid:] = 100.0

    def stem(ids: Tensor) -> Tensor:
        return torch.tanh(embedding(ids))

    def head(x: Tensor) -> Tensor:
        entered = tp.enter(x).flatten(0, 1)
        return linear_cross_entropy(entered, embedding.weight, labels.flatten(), first, valid, tp, chunk_tokens=5)

    loss = recomputed(head)(recomputed(stem)(ids)) if recompute else head(stem(ids))
    close(loss, expected)
    loss.backward()
    own = grad_of(embedding.weight)
    assert torch.count_nonzero(own[valid:]) == 0
    pieces = [torch.empty_like(own) for _ in range(tp.size)]
    dist.all_gather(pieces, own, group=tp.group)
    close(torch.cat(pieces)[:vocab], grad_of(whole))


def check_loss(tp: TensorParallel, vocab: int, strided: bool) -> None:
    """The loss alone: NaN in the padding, another scale than 1, one backward pass only, and what it sends.

    The head is the identity, so that its input's gradient is the logits'.
    """
    torch.manual_seed(3)
    count = 9
    full = torch.randn(count, vocab).requires_grad_()
    labels = torch.randint(vocab, (count, 2))[:, 0]
    expected = F.cross_entropy(full, labels)
    (expected * 3).backward()
    rows, first, valid = place_vocabulary(vocab, tp)
    weight = shard(torch.eye(vocab), 0, rows, tp)
    weight[valid:] = torch.nan
    weight.requires_grad_()
    hidden = full.detach().clone()
    hidden = (hidden.t().contiguous().t() if strided else hidden).requires_grad_()
    before = hidden.detach().clone()
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sent:
        loss = linear_cross_entropy(hidden, weight, labels, first, valid, tp, chunk_tokens=4)
        (loss * 3).backward(retain_graph=True)
    mine = slice(first, first + valid)
    close(grad_of(hidden)[:, mine], grad_of(full)[:, mine])
    assert torch.count_nonzero(grad_of(weight)[valid:]) == 0
    with pytest.raises(RuntimeError, match="differentiated once"):
        (loss * 3).backward()
    close(loss, expected)
    assert torch.equal(hidden, before)
    chunks = [4, 4, 1]
    assert [tuple(call.args[0].shape) for call in sent.call_args_list] == [s for n in chunks for s in ((n,), (2, n))]


def check_extreme_loss(tp: TensorParallel) -> None:
    """Logits of +-1e4, whose exponentials overflow or vanish: the largest one may sit on any rank."""
    vocab = 11
    full = torch.linspace(-1e4, 1e4, vocab).repeat(vocab, 1)
    full = torch.stack([row.roll(n) for n, row in enumerate(full)]).requires_grad_()
    labels = torch.arange(vocab)
    expected = F.cross_entropy(full, labels)
    expected.backward()
    loss, grad = identity_loss(full.detach(), labels, tp)
    close(loss, expected)
    close(grad, grad_of(full))


def check_bf16_loss(tp: TensorParallel) -> None:
    """bf16 logits: the loss is an fp32 one, and gradients are rounded twice, as softmax and as a product."""
    torch.manual_seed(4)
    vocab = 11
    full = (torch.randn(9, vocab) * 5).bfloat16()
    labels = torch.randint(vocab, (9,))
    exact = full.double().requires_grad_()
    expected = F.cross_entropy(exact, labels)
    expected.backward()
    loss, grad = identity_loss(full, labels, tp)
    assert loss.dtype == torch.float32
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), grad_of(exact), rtol=2**-7, atol=1e-9)


def identity_loss(logits: Tensor, labels: Tensor, tp: TensorParallel) -> tuple[Tensor, Tensor]:
    """The loss of logits that an identity head passes on, and their gradient, added up over the ranks."""
    vocab = logits.shape[1]
    rows, first, valid = place_vocabulary(vocab, tp)
    weight = shard(torch.eye(vocab), 0, rows, tp).to(logits.dtype)
    hidden = logits.clone().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, first, valid, tp)
    loss.backward()
    grad = grad_of(hidden)
    dist.all_reduce(grad, group=tp.group)
    return loss.detach(), grad


def check_inputs_survive(tp: TensorParallel) -> None:
    """A batch of one is where packing for a collective could alias the caller's tensor."""
    x = torch.full((1, LENGTH, HIDDEN), float(tp.rank + 1))
    total = tp.size * (tp.size + 1) / 2
    left = tp.leave(x)
    assert torch.equal(left, torch.full_like(left, total))
    entered = tp.enter(x)
    assert entered.shape[1] == (tp.size * LENGTH if tp.sequence_parallel else LENGTH)
    assert torch.equal(x, torch.full_like(x, float(tp.rank + 1)))


def check_indivisible_sequence(tp: TensorParallel) -> None:
    with pytest.raises(AssertionError, match=f"a sequence of 7 does not divide over {tp.size}"):
        tp.leave(torch.zeros(1, 7, HIDDEN))


def place_vocabulary(vocab: int, tp: TensorParallel) -> tuple[int, int, int]:
    """Rows, first and valid of this rank."""
    rows = -(-vocab // tp.size)
    first = tp.rank * rows
    return rows, first, min(max(vocab - first, 0), rows)


def shard(full: Tensor, dim: int, rows: int, tp: TensorParallel) -> Tensor:
    """This rank's block along a dimension, zeros where the whole ends."""
    padded = full.new_zeros([rows * tp.size if d == dim else n for d, n in enumerate(full.shape)])
    padded.narrow(dim, 0, full.shape[dim]).copy_(full.detach())
    return padded.narrow(dim, tp.rank * rows, rows).clone()


def sequence_part(x: Tensor, tp: TensorParallel) -> Tensor:
    return x.chunk(tp.size, dim=1)[tp.rank] if tp.sequence_parallel else x


def recomputed(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        result: Tensor = checkpoint(function, x, use_reentrant=False)
        return result

    return call


def fill(parameter: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        assert parameter.shape == value.shape
        parameter.copy_(value)


def grad_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad
