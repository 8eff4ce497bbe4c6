"""The yardstick measured: gradients by finite differences, logits against transformers, deletion by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from reference import Reference
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2, 12, 10, 4, 2, 6, 17
EPS, THETA = 1e-5, 10000.0


def _hf_model(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "tie_word_embeddings": tied,
        "attention_bias": True,
        "mlp_bias": True,
        "attn_implementation": "eager",
    }
    model = LlamaForCausalLM(LlamaConfig(**settings)).double()
    with torch.no_grad():
        for parameter in model.parameters():  # gains of one and biases of zero would hide mistakes
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def _reference(tied: bool = False) -> Reference:
    weights = {name: parameter.detach() for name, parameter in _hf_model(tied).named_parameters()}
    groups = [[HEADS // KV_HEADS] * KV_HEADS] * LAYERS
    return Reference(weights, LAYERS, HEADS, groups, HEAD_DIM, EPS, THETA, tied)


def _tokens() -> Tensor:
    return torch.randint(VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_transformers(tied: bool) -> None:
    tokens = _tokens()
    with torch.no_grad():
        expected = _hf_model(tied)(tokens).logits
    torch.testing.assert_close(_reference(tied).logits(tokens), expected, atol=1e-6, rtol=0)


def test_parameters_equal_transformers() -> None:
    assert _reference(tied=True).num_parameters() == sum(p.numel() for p in _hf_model(tied=True).parameters())


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"],
)
def test_gradients_equal_finite_differences(name: str) -> None:
    reference, tokens, step = _reference(tied=True), _tokens(), 1e-6
    gradient = reference.gradients(tokens)[name].flatten()
    flat = reference.weights[name].view(-1)
    for index in (0, 7, flat.numel() - 1):
        value = flat[index].item()
        flat[index] = value + step
        above = reference.loss(tokens).item()
        flat[index] = value - step
        below = reference.loss(tokens).item()
        flat[index] = value
        assert gradient[index].item() == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-9)


def test_sums_equal_tensor_sums() -> None:
    reference, tokens = _reference(), _tokens()
    heads, ffn, stem = reference.saliency(tokens)
    gradients = reference.gradients(tokens)
    rows = torch.zeros(HIDDEN, dtype=torch.float64)
    for layer in range(LAYERS):
        names = (f"model.layers.{layer}.self_attn.o_proj.weight", f"model.layers.{layer}.mlp.down_proj.weight")
        o_proj, down = ((reference.weights[name] * gradients[name]).abs() for name in names)
        assert heads[layer] == pytest.approx(o_proj.sum(0).view(HEADS, HEAD_DIM).sum(1).tolist(), rel=1e-12)
        assert ffn[layer] == pytest.approx(down.sum(0).tolist(), rel=1e-12)
        rows += o_proj.sum(1) + down.sum(1)
    assert stem == pytest.approx(rows.tolist(), rel=1e-12)


def test_scores_are_means_per_element() -> None:
    """With abs(w * g) the same everywhere all three types score alike, and the tie goes to attention, index 0."""
    reference = _reference()
    score = 0.25
    heads = [[score * HIDDEN * HEAD_DIM] * HEADS for _ in range(LAYERS)]
    ffn = [[score * HIDDEN] * FFN for _ in range(LAYERS)]
    stem = [score * LAYERS * (HEADS * HEAD_DIM + FFN)] * HIDDEN
    reference._sums = (heads, ffn, stem)
    event = reference.decide()
    assert event is not None
    assert event["scores"] == pytest.approx({"attention": score, "ffn": score, "stem": score})
    assert event["type"] == "attention"
    assert event["removed"] == [0] * LAYERS


def test_events_count_in_source_coordinates_and_parameters_are_right() -> None:
    reference, tokens = _reference(), _tokens()
    removed: dict[str, list[Any]] = {"attention": [], "ffn": [], "stem": []}
    while True:
        reference.saliency(tokens)
        event = reference.decide()
        if event is None:
            break
        reference.remove(event)
        assert reference.num_parameters() == event["parameters"]
        assert event["shape"] == {
            "hidden_size": reference.hidden_size,
            "ffn_hidden_size": reference.ffn_hidden_size,
            "num_attention_heads": reference.num_heads,
        }
        removed[event["type"]].append(event["removed"])
    assert (reference.num_heads, reference.ffn_hidden_size, reference.hidden_size) == (1, 1, 1)
    assert sorted([*removed["stem"], *reference.alive_stem]) == list(range(HIDDEN))
    for layer in range(LAYERS):
        for kind, alive, size in (("attention", reference.alive_heads, HEADS), ("ffn", reference.alive_ffn, FFN)):
            gone = [indices[layer] for indices in removed[kind]]
            assert sorted([*gone, *alive[layer]]) == list(range(size))
        assert reference.kv_groups[layer] == [1]


@pytest.mark.parametrize("kind", ["attention", "ffn"])
def test_deleting_a_group_equals_zeroing_its_output(kind: str) -> None:
    """A head or channel whose output weights are zero contributes nothing: deleting it must not move the logits."""
    zeroed, tokens = _reference(), _tokens()
    removed = [1, 3]
    for layer, index in enumerate(removed):
        if kind == "attention":
            columns = slice(index * HEAD_DIM, (index + 1) * HEAD_DIM)
            zeroed.weights[f"model.layers.{layer}.self_attn.o_proj.weight"][:, columns] = 0
        else:
            zeroed.weights[f"model.layers.{layer}.mlp.down_proj.weight"][:, index] = 0
    cut = copy.deepcopy(zeroed)
    cut.remove({"type": kind, "removed": removed})
    assert cut.num_parameters() < zeroed.num_parameters()
    torch.testing.assert_close(cut.logits(tokens), zeroed.logits(tokens), atol=1e-13, rtol=0)


def test_deleting_a_stem_channel_equals_zeroing_it_with_the_smaller_mean() -> None:
    reference, tokens, channel = _reference(), _tokens(), 5
    zeroed = copy.deepcopy(reference)
    for layer in range(LAYERS):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            zeroed.weights[f"model.layers.{layer}.{name}.weight"][channel] = 0
            zeroed.weights[f"model.layers.{layer}.{name}.bias"][channel] = 0
    zeroed.weights["model.embed_tokens.weight"][:, channel] = 0
    # The mean of squares over D - 1 channels is that over D times D / (D - 1); so is the epsilon's share.
    scale = (HIDDEN / (HIDDEN - 1)) ** 0.5
    zeroed.eps = reference.eps / scale**2
    for name in zeroed.weights:
        if name.endswith("layernorm.weight") or name == "model.norm.weight":
            zeroed.weights[name] = zeroed.weights[name] / scale
    reference.remove({"type": "stem", "removed": channel})
    torch.testing.assert_close(reference.logits(tokens), zeroed.logits(tokens), atol=1e-12, rtol=0)


def test_kv_head_goes_with_its_last_query() -> None:
    reference = _reference()
    k_name = "model.layers.0.self_attn.k_proj.weight"
    second_kv_head = reference.weights[k_name][HEAD_DIM:].clone()
    reference.remove({"type": "attention", "removed": [0, 3]})
    assert reference.kv_groups == [[1, 2], [2, 1]]
    assert reference.weights[k_name].shape[0] == KV_HEADS * HEAD_DIM
    reference.remove({"type": "attention", "removed": [1, 0]})
    assert reference.kv_groups == [[2], [1, 1]]
    assert torch.equal(reference.weights[k_name], second_kv_head)
    assert reference.weights["model.layers.1.self_attn.k_proj.bias"].shape[0] == KV_HEADS * HEAD_DIM


def test_a_removal_that_overshoots_more_than_the_smallest_is_no_candidate() -> None:
    reference = _reference()
    reference.saliency(_tokens())
    assert reference._sums is not None
    reference._sums = ([[0.0] * HEADS] * LAYERS, reference._sums[1], reference._sums[2])  # heads look worthless
    count = reference.num_parameters()
    free = reference.decide()
    assert free is not None
    assert free["type"] == "attention"
    just_fits = reference.decide(target_parameters=free["parameters"])
    assert just_fits is not None
    assert just_fits["type"] == "attention"
    too_much = reference.decide(target_parameters=free["parameters"] + 1)
    assert too_much is not None
    assert too_much["type"] != "attention"
    only = reference.decide(target_parameters=count - 1, floors=(1, FFN, HIDDEN))
    assert only is not None
    assert only["type"] == "attention"
    assert reference.decide(target_parameters=count) is None
    assert reference.decide(floors=(HEADS, FFN, HIDDEN)) is None


def test_moments_are_cut_with_the_weights() -> None:
    reference = _reference()
    moments = {name: value.clone() for name, value in reference.weights.items()}
    for event in (
        {"type": "stem", "removed": 3},
        {"type": "attention", "removed": [2, 0]},
        {"type": "ffn", "removed": [9, 4]},
    ):
        reference.remove(event, also=[moments])
    assert all(torch.equal(moments[name], value) for name, value in reference.weights.items())
