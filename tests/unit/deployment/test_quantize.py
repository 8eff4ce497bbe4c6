"""8-bit exports, smoothing and clipping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from megatron_prune.deployment import quantize
from megatron_prune.deployment.quantize import Calibration, model_bytes, quantize_export
from megatron_prune.deployment.smoothing import CLIPS, _best_clips, clip, fold, rounded, sites, smooth
from megatron_prune.errors import UserError
from megatron_prune.evaluation.scoring import load_model

VOCAB = 256


def tiny(family: str = "Mistral", **changes: Any) -> Any:
    """Odd widths, two query heads on each K/V head; gains and biases that are not what they begin as."""
    import transformers

    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 37,
        "intermediate_size": 51,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    config = getattr(transformers, f"{family}Config")(**settings | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    return model


def tokens(count: int = 2) -> Tensor:
    return torch.randint(VOCAB, (count, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(input_ids=tokens()).logits
    return result


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "export"
    tiny(hidden_size=131, intermediate_size=301, head_dim=32).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def quantized(export: Path) -> Path:
    return quantize_export(export, export.with_name("int8"), None).directory


@pytest.mark.parametrize("calibration", [None, Calibration(tokens(8), smooth=True, clip=True)], ids=["plain", "both"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_directory_gives_the_outputs_of_the_model_in_memory(
    tied: bool, calibration: Calibration | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was quantised is held on to, and compared with what its directory is loaded as."""
    import transformers

    model = tiny(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "export")
    in_memory: list[Any] = []

    def keep(directory: Path, **options: Any) -> Any:
        in_memory.append(load_model(directory, **options))
        return in_memory[-1]

    monkeypatch.setattr(quantize, "load_model", keep)
    output = quantize_export(tmp_path / "export", tmp_path / "int8", calibration).directory
    ours = in_memory[-1]
    assert ours.model.layers[0].mlp.up_proj.weight.qdata.dtype == torch.int8
    loaded = transformers.AutoModelForCausalLM.from_pretrained(output).eval()
    assert torch.equal(logits(loaded), logits(ours))
    assert 0 < (logits(loaded) - logits(model)).norm() < 0.15 * logits(model).norm()
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_biases_stay_as_they_are(tmp_path: Path) -> None:
    import transformers

    model = tiny("Qwen2", hidden_size=32, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "export")
    output = quantize_export(tmp_path / "export", tmp_path / "int8", None).directory
    loaded = transformers.AutoModelForCausalLM.from_pretrained(output).eval()
    ours, theirs = model.model.layers[0].self_attn.q_proj.bias, loaded.model.layers[0].self_attn.q_proj.bias
    assert type(theirs.data) is Tensor
    assert torch.equal(ours, theirs)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    assert (logits(loaded) - logits(model)).norm() < 0.05 * logits(model).norm()


def test_weights_are_stored_once_and_in_eight_bits(export: Path, quantized: Path) -> None:
    with safe_open(quantized / "model.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert not [name for name in stored if name.startswith("lm_head")]
    matrices = [dtype for name, dtype in stored.items() if name.endswith("_weight_qdata")]
    assert matrices == [torch.int8] * (1 + 2 * 7)
    # Scales and the file's heading are much in a model of this size; 0.28 is what the demo's has.
    assert model_bytes(quantized) < 0.33 * model_bytes(export)


def test_smoothing_and_clipping_reach_the_file(export: Path) -> None:
    report = quantize_export(export, export.with_name("both"), Calibration(tokens(8), smooth=True, clip=True))
    assert report.smoothed is not None
    assert report.smoothed.num_sites == 8
    assert report.clipped is not None
    assert json.loads((report.directory / "quantization.json").read_text())["clip"]
    assert not (report.directory.parent / "calibrated").exists()


def test_what_cannot_be_quantised_is_named(quantized: Path, export: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quantised already"):
        quantize_export(quantized, tmp_path / "new", None)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match="no earlier result"):
        quantize_export(export, tmp_path / "mine", None)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("family", "changes"),
    [("Mistral", {}), ("Qwen2", {"num_attention_heads": 4, "hidden_size": 32}), ("SeedOss", {"mlp_bias": True})],
)
def test_folding_any_scale_leaves_the_outputs(family: str, changes: dict[str, Any]) -> None:
    model = tiny(family, **changes)
    before = logits(model)
    found = list(sites(model))
    assert len(found) == 8
    for number, site in enumerate(found):
        makes = site.makers[0].shape[0]
        old = site.readers[0].weight.clone()
        fold(site, 0.25 + 4 * torch.rand(makes, generator=torch.Generator().manual_seed(number)))
        assert not torch.equal(site.readers[0].weight, old)
    assert (logits(model) - before).abs().max() < 1e-5 * before.abs().max()


def test_smoothing_helps_where_a_channel_is_loud() -> None:
    model = tiny()
    with torch.no_grad():  # one channel of an activation a hundred times as large as others
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight[3] *= 100
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[:, 3] /= 100
    before = logits(model)
    rough = error_of_rounding(model)
    result = smooth(model, tokens(8))
    assert result.num_scaled >= 2
    assert (logits(model) - before).abs().max() < 1e-4 * before.abs().max()
    assert error_of_rounding(model) < 0.5 * rough


def error_of_rounding(model: Any) -> float:
    """Of the first MLP's inputs and weights, relative."""
    layer = model.model.layers[0]
    inputs = torch.randn(50, 37, generator=torch.Generator().manual_seed(2)) * layer.post_attention_layernorm.weight
    weight = layer.mlp.gate_proj.weight
    exact = inputs @ weight.T
    return float(((rounded(inputs) @ rounded(weight).T - exact).norm() / exact.norm()).detach())


def test_a_row_is_cut_where_its_largest_weight_does_not_matter() -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)
    weight[2, 5] = 1.4
    silent = torch.randn(500, 40, generator=torch.Generator().manual_seed(4))
    silent[:, 5] = 0
    shares = _best_clips(weight, silent.T @ silent)
    assert shares[2] < 1
    assert all(any(share == pytest.approx(known) for known in CLIPS) for share in shares.tolist())
    loud = silent.clone()
    loud[:, 5] = 100
    assert _best_clips(weight, loud.T @ loud)[2] == 1


def test_clipping_keeps_to_the_weights_own_range() -> None:
    model = tiny()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    share = clip(model, tokens(8))
    assert 0 <= share <= 1
    for name, parameter in model.named_parameters():
        changed = parameter != before[name]
        assert (parameter.abs() <= before[name].abs()).all()
        assert "_proj" in name or not changed.any()
