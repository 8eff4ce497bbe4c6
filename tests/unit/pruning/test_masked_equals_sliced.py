"""A zeroed group equals a removed one: same logits, same training under AdamW with decay, clipping and a schedule."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megatron_prune.architecture import Architecture, TensorSpec, tensor_specs
from megatron_prune.model.pipeline import layer_shapes
from megatron_prune.model.transformer import CausalLM, init_weights
from megatron_prune.ops.dispatch import build_ops
from megatron_prune.parallel.partition import Partition
from megatron_prune.parallel.placement import deposit_, kept_mask, place
from megatron_prune.pruning.groups import MiniGroup, remove
from megatron_prune.pruning.surgery import dead_elements, zero_fragment_, zero_tensor_

ARCH = Architecture(
    family="qwen3",
    num_layers=2,
    hidden_size=24,
    ffn_hidden_size=32,
    num_attention_heads=6,
    kv_groups=((2, 2, 2),) * 2,
    head_dim=8,
    vocab_size=40,
    tie_embeddings=True,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    qk_norm=True,
)
MOMENTS = ("exp_avg", "exp_avg_sq")
ATTENTION = [MiniGroup("attention", (0, 5)), MiniGroup("attention", (1, 2)), MiniGroup("attention", (3, 3))]
FFN = [MiniGroup("ffn", (i, 31 - i)) for i in range(5)]
STEM = [MiniGroup("stem", i) for i in (3, 0, 23, 11)]


def build(partition: Partition, tensors: dict[str, Tensor]) -> CausalLM:
    model = CausalLM(ARCH, layer_shapes(partition), build_ops({}, torch.device("cpu"))).double()
    for name, value in tensors.items():
        *path, attribute = name.split(".")
        setattr(model.get_submodule(".".join(path)), attribute, nn.Parameter(value.clone()))
    return model


def extract(physical: Tensor, spec: TensorSpec, partition: Partition) -> Tensor:
    """Inverse of :func:`place`."""
    logical = physical.new_zeros(partition.logical_shape(spec))
    deposit_(logical, physical.reshape(-1), spec, partition, 0, 0)
    return logical


def move(physical: Tensor, spec: TensorSpec, old: Partition, new: Partition) -> Tensor:
    return place(extract(physical, spec, old), spec, new)


def adamw(model: CausalLM) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}])


def train(
    model: CausalLM, steps: int, optimizer: torch.optim.Optimizer | None = None
) -> tuple[list[float], torch.optim.Optimizer]:
    optimizer = optimizer or adamw(model)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        tokens = torch.randint(ARCH.vocab_size, (4, 13), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    return losses, optimizer


def masked_and_sliced(groups: list[MiniGroup]) -> tuple[CausalLM, CausalLM, Partition]:
    full = Partition.of(ARCH)
    whole = CausalLM(ARCH, layer_shapes(full), build_ops({}, torch.device("cpu")))
    init_weights(whole, ARCH, 0)
    torch.manual_seed(0)
    for parameter in whole.parameters():  # biases and gains that differ from their neutral start
        nn.init.normal_(parameter, 0.1 if parameter.dim() > 1 else 0.8, 0.2)
    tensors = {name: p.detach().double() for name, p in whole.named_parameters()}
    after = full
    for group in groups:
        after = remove(after, group)
    for spec, dim, index in dead_elements(full, after):
        zero_tensor_(tensors[spec.name], dim, index)
    small = after.compacted(1)
    sliced = {spec.name: move(tensors[spec.name], spec, after, small) for spec in tensor_specs(ARCH)}
    return build(after, tensors), build(small, sliced), after


@pytest.mark.parametrize(
    "groups", [ATTENTION, FFN, STEM, ATTENTION + FFN + STEM], ids=["attention", "ffn", "stem", "all"]
)
def test_masked_equals_sliced(groups: list[MiniGroup]) -> None:
    masked, sliced, _ = masked_and_sliced(groups)
    tokens = torch.randint(ARCH.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(masked(tokens), sliced(tokens), rtol=0, atol=1e-6)
    masked_losses, masked_optimizer = train(masked, 20)
    sliced_losses, sliced_optimizer = train(sliced, 20)
    assert masked_losses[-1] < masked_losses[0]
    assert masked_losses == pytest.approx(sliced_losses, abs=1e-6, rel=1e-6)


def test_moments_that_are_older_than_the_removal_are_kept() -> None:
    full = Partition.of(ARCH)
    whole, _, _ = masked_and_sliced([])
    _, optimizer = train(whole, 5)
    after = full
    for group in ATTENTION + FFN + STEM:
        after = remove(after, group)
    small = after.compacted(1)
    weights = {name: p.detach().clone() for name, p in whole.named_parameters()}
    moments = {(name, key): optimizer.state[p][key].clone() for name, p in whole.named_parameters() for key in MOMENTS}
    for spec, dim, index in dead_elements(full, after):
        for tensor in (weights[spec.name], *(moments[spec.name, key] for key in MOMENTS)):
            zero_tensor_(tensor, dim, index)
    losses = []
    for where in (after, small):
        model = build(where, {s.name: move(weights[s.name], s, after, where) for s in tensor_specs(ARCH)})
        again = adamw(model)
        specs = {spec.name: spec for spec in tensor_specs(ARCH)}
        for name, parameter in model.named_parameters():
            state = {key: move(moments[name, key], specs[name], after, where).clone() for key in MOMENTS}
            again.state[parameter] = {"step": torch.tensor(5.0), **state}
        losses.append(train(model, 20, again)[0])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6, rel=1e-6)
    fresh, _ = train(build(small, {s.name: move(weights[s.name], s, after, small) for s in tensor_specs(ARCH)}), 20)
    assert max(abs(a - b) for a, b in zip(losses[1], fresh, strict=True)) > 1e-3, "fresh moments train differently"


@pytest.mark.parametrize("groups", [ATTENTION, FFN, STEM], ids=["attention", "ffn", "stem"])
def test_dead_units_stay_exactly_zero_in_training(groups: list[MiniGroup]) -> None:
    masked, _, after = masked_and_sliced(groups)
    _, optimizer = train(masked, 20)
    specs = {spec.name: spec for spec in tensor_specs(ARCH)}
    dead = 0
    for name, parameter in masked.named_parameters():
        gone = ~kept_mask(specs[name], after, 0, 0, parameter.numel()).view(parameter.shape)
        dead += int(gone.sum())
        for tensor in (parameter.detach(), *(optimizer.state[parameter][k] for k in ("exp_avg", "exp_avg_sq"))):
            assert not tensor[gone].any(), name
    assert dead > 0


@pytest.mark.parametrize("dim", [0, 1])
def test_zeroing_by_fragments_equals_zeroing_the_tensor(dim: int) -> None:
    import numpy as np

    index = np.array([0, 3, 4, 6])
    whole = torch.arange(1.0, 7 * 9 + 1).view(7, 9)
    for first in (0, 5, 9, 20):
        for second in (20, 21, 40, 63):
            pieces = [p.clone() for p in whole.view(-1).tensor_split([first, second])]
            for start, piece in zip((0, first, second), pieces, strict=True):
                zero_fragment_(piece, start, (7, 9), dim, index)
            expected = whole.clone()
            zero_tensor_(expected, dim, index)
            assert torch.equal(torch.cat(pieces).view(7, 9), expected)


def test_place_and_extract_are_inverse_under_dead_padding() -> None:
    partition = Partition.of(ARCH)
    for group in ATTENTION + FFN + STEM:
        partition = remove(partition, group)
    padded = partition.compacted(8)
    arch = partition.architecture()
    assert len(padded.stem) == 24
    assert len(padded.ffn[0][0]) == 32
    for spec in tensor_specs(arch):
        logical = torch.randn(arch.tensor_shape(spec))
        for where in (partition, padded, partition.compacted(1)):
            physical = place(logical, spec, where)
            assert physical.shape == where.shape(spec)
            assert torch.equal(extract(physical, spec, where), logical)
            alive = kept_mask(spec, where, 0, 0, physical.numel()).view(physical.shape)
            assert int(alive.sum()) == logical.numel()
            assert not physical[~alive].any()


def test_kept_mask_of_fragments_joins_to_the_whole() -> None:
    partition = remove(Partition.of(ARCH), MiniGroup("stem", 5))
    spec = TensorSpec("model.layers.0.mlp.down_proj.weight", ("stem", "ffn"), 0)
    whole = kept_mask(spec, partition, 0, 0, 24 * 32)
    pieces = [kept_mask(spec, partition, 0, start, 100) for start in range(0, 700, 100)]
    assert torch.equal(torch.cat([*pieces, kept_mask(spec, partition, 0, 700, 68)]), whole)
