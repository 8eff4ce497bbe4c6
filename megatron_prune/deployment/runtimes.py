"""What other runtimes accept of a shape, said before anything is converted.

Every rule cites where it comes from: a version of the runtime's source that was read, or a run that was made. Runtimes
change; the versions are named so that a reader knows what to check again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final, Literal

from megatron_prune.architecture import Architecture
from megatron_prune.checkpoint.hf import export_model_type
from megatron_prune.checkpoint.hf_config import HF_CLASSES
from megatron_prune.errors import UserError

#: accepted as it is; accepted, but another way than asked for (slower, larger, wider); refused.
Verdict = Literal["yes", "but", "no"]
BLOCK_Q8_0: Final = 32  # elements of a row that share a scale
BLOCK_K: Final = 256
TENSOR_PARALLEL: Final = (1, 2, 4, 8)
HEAD_SIZES_VLLM: Final = tuple(range(32, 257, 32))
CUTLASS_MULTIPLE: Final = 16
MARLIN_OUT, MARLIN_IN = 64, 128

VLLM: Final = "vllm-project/vllm"
LLAMA_CPP: Final = "llama.cpp 4227c9b (in the llama-cpp-python 0.3.16 source)"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a runtime does with a shape in one respect.

    Attributes:
        runtime: its name.
        topic: what it is about, e.g. ``TP 2`` or ``q8_0``.
        verdict: whether it is accepted.
        reason: why, with the numbers.
        basis: where the rule comes from.
    """

    runtime: str
    topic: str
    verdict: Verdict
    reason: str
    basis: str


def check_targets(arch: Architecture, runtimes: Sequence[str]) -> list[Finding]:
    """What each runtime says to a shape.

    Args:
        arch: of the model to export. K/V heads in groups of different size are judged as exported, one per query head.
        runtimes: of :func:`runtime_names`.

    Raises:
        UserError: an unknown runtime.
    """
    unknown = [name for name in runtimes if name not in _RULES]
    if unknown:
        raise UserError(f"--check-targets {unknown[0]!r} is unknown; there are {', '.join(runtime_names())}")
    return [finding for name in runtimes for finding in _RULES[name](arch)]


def runtime_names() -> tuple[str, ...]:
    """The runtimes there are rules for."""
    return tuple(_RULES)


def matrices(arch: Architecture) -> dict[str, tuple[int, int]]:
    """Kinds of matrices of an export, ``(output channels, input channels)`` each; llama.cpp's rows have the latter."""
    heads, kv_heads = arch.num_attention_heads * arch.head_dim, _kv_heads(arch) * arch.head_dim
    hidden, ffn = arch.hidden_size, arch.ffn_hidden_size
    found = {
        "embedding and head": (arch.vocab_size, hidden),
        "q_proj": (heads, hidden),
        "k_proj, v_proj": (kv_heads, hidden),
        "o_proj": (hidden, heads),
        "gate_proj, up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
    }
    return found


def report(findings: Sequence[Finding]) -> list[str]:
    """The findings as lines, grouped by runtime."""
    lines = []
    for name in dict.fromkeys(finding.runtime for finding in findings):
        lines.append(f"{name}:")
        own = [finding for finding in findings if finding.runtime == name]
        width = max(len(finding.topic) for finding in own)
        bases = {basis: number for number, basis in enumerate(dict.fromkeys(finding.basis for finding in own), 1)}
        lines += [f"  {item.verdict:<4} {item.topic.ljust(width)}  {item.reason} [{bases[item.basis]}]" for item in own]
        lines += [f"  [{number}] {basis}" for basis, number in bases.items()]
    return lines


def _kv_heads(arch: Architecture) -> int:
    """As exported: K and V are repeated where stock GQA cannot express the groups."""
    return arch.num_query_groups if arch.uniform_kv else arch.num_attention_heads


def _transformers(arch: Architecture) -> Iterator[Finding]:
    model_type = export_model_type(arch)
    basis = "an export is loaded and compared when it is written; Llama's refusal: transformers 5.17, LlamaConfig"
    if model_type == arch.family:
        yield Finding("transformers", "class", "yes", f"{HF_CLASSES[model_type]}, any widths", basis)
    else:
        odd = f"hidden {arch.hidden_size} is no multiple of {arch.num_attention_heads} heads"
        reason = f"{HF_CLASSES[model_type]}: {odd}, which LlamaConfig refuses"
        yield Finding("transformers", "class", "but", reason, basis)
    if not arch.uniform_kv:
        reason = f"K/V heads are repeated to {arch.num_attention_heads}: groups differ in size; the cache grows"
        yield Finding("transformers", "K/V heads", "but", reason, "docs/shape_search.md, grouped-query attention")
    reason = "int8 in any widths (tools/quantize.py)"
    yield Finding("transformers", "torchao W8A8", "yes", reason, "torchao 0.18, tried at hidden 119 and ffn 63, 301")


def _onnx(arch: Architecture) -> Iterator[Finding]:
    reason = "any widths; prefill without a cache (tools/export_onnx.py)"
    yield Finding("onnx", "fp32", "yes", reason, "torch 2.13, onnxruntime 1.32: a test at odd widths")


def _vllm(arch: Architecture) -> Iterator[Finding]:
    heads, kv_heads, ffn = arch.num_attention_heads, _kv_heads(arch), arch.ffn_hidden_size
    model_type = export_model_type(arch)
    if model_type == "qwen2" and arch.hidden_size != heads * arch.head_dim:
        basis = f"{VLLM} 013a279, qwen2.py: Qwen2Attention"
        reason = f"head_dim is taken as hidden / heads = {arch.hidden_size // heads}, not {arch.head_dim}"
        yield Finding("vllm", "Qwen2", "no", reason, basis)
    for size in TENSOR_PARALLEL:
        problems = list(_vllm_tensor_parallel(heads, kv_heads, ffn, size))
        reason = "; ".join(problems) or _kv_note(kv_heads, size)
        basis = f"{VLLM} 0035bdf, llama.py: LlamaAttention, LlamaMLP"
        yield Finding("vllm", f"TP {size}", "no" if problems else "yes", reason, basis)
    sizes = f"{HEAD_SIZES_VLLM[0]} to {HEAD_SIZES_VLLM[-1]} in steps of 32"
    fits = arch.head_dim in HEAD_SIZES_VLLM
    reason = f"head_dim {arch.head_dim}; FlashAttention takes {sizes}" + (
        "" if fits else ", else FlexAttention, slower"
    )
    basis = f"{VLLM} 0084b78, v1/attention/backends/flash_attn.py"
    yield Finding("vllm", "attention", "yes" if fits else "but", reason, basis)
    reason = f"{arch.vocab_size} rows, filled up to {-(-arch.vocab_size // 64) * 64}"
    yield Finding("vllm", "vocabulary", "yes", reason, f"{VLLM} 0035bdf, vocab_parallel_embedding.py")
    inner = _merged(arch)
    off = [name for name, sizes in inner.items() if any(size % CUTLASS_MULTIPLE for size in sizes)]
    reason = (
        f"not in {CUTLASS_MULTIPLE}s, so the slower Triton kernel runs: {', '.join(off)}" if off else "CUTLASS kernel"
    )
    basis = f"{VLLM}, _custom_ops.py: cutlass_scaled_mm; older versions refuse instead"
    yield Finding("vllm", "int8 W8A8, TP 1", "but" if off else "yes", reason, basis)
    off = [name for name, (out, wide) in inner.items() if out % MARLIN_OUT or wide % MARLIN_IN]
    reason = f"wants outputs in {MARLIN_OUT}s, inputs in {MARLIN_IN}s: {', '.join(off)}" if off else "Marlin kernel"
    yield Finding("vllm", "4-bit Marlin, TP 1", "no" if off else "yes", reason, f"{VLLM}, marlin.py: create_weights")


def _merged(arch: Architecture) -> dict[str, tuple[int, int]]:
    """vLLM's matrices at TP 1, where q, k and v are one and gate and up are one."""
    each = matrices(arch)
    heads, kv_heads = each["q_proj"][0], each["k_proj, v_proj"][0]
    return {
        "qkv_proj": (heads + 2 * kv_heads, arch.hidden_size),
        "o_proj": each["o_proj"],
        "gate_up_proj": (2 * arch.ffn_hidden_size, arch.hidden_size),
        "down_proj": each["down_proj"],
    }


def _vllm_tensor_parallel(heads: int, kv_heads: int, ffn: int, size: int) -> Iterator[str]:
    if heads % size:
        yield f"{heads} heads are no multiple of {size}"
    if kv_heads == heads:
        pass  # said already
    elif (kv_heads % size) if kv_heads >= size else (size % kv_heads):
        yield f"{kv_heads} K/V heads and {size} neither divides the other"
    if ffn % size:
        yield f"ffn {ffn} is no multiple of {size}"


def _kv_note(kv_heads: int, size: int) -> str:
    return "K/V heads on several GPUs each" if kv_heads < size else "heads, K/V heads and ffn divide"


def _llama_cpp(arch: Architecture) -> Iterator[Finding]:
    model_type = export_model_type(arch)
    if model_type == "seed_oss":
        reason = "the converter has no Seed-OSS, which an odd Llama shape with biases is exported as"
        yield Finding("llama.cpp", "class", "no", reason, f"{LLAMA_CPP}, convert_hf_to_gguf.py")
    elif model_type == "qwen2" and arch.hidden_size != arch.num_attention_heads * arch.head_dim:
        wide = arch.num_attention_heads * arch.head_dim
        reason = f"attn_q of a Qwen2 is hidden x hidden ({arch.hidden_size}), not {wide} wide; loading fails"
        yield Finding("llama.cpp", "class", "no", reason, f"{LLAMA_CPP}, src/llama-model.cpp")
    else:
        reason = f"{HF_CLASSES[model_type]}, head_dim {arch.head_dim} apart from hidden"
        yield Finding("llama.cpp", "class", "yes", reason, f"{LLAMA_CPP}; an export was run, docs/deploy.md")
    yield Finding("llama.cpp", "f16, f32", "yes", "any widths", "an export with ffn 63 was run, docs/deploy.md")
    yield _blocks(arch, "q8_0", BLOCK_Q8_0, "become f16 without an error", "convert_hf_to_gguf.py: prepare_tensors")
    narrow = "fall back to 5 or 8 bits in blocks of 32, or f16"
    yield _blocks(arch, "K-quants", BLOCK_K, narrow, "src/llama-quant.cpp: llama_tensor_get_type")
    reason = "a BPE vocabulary of one's own must have its pre-tokenizer named (tools/convert_to_gguf.py does)"
    yield Finding("llama.cpp", "tokenizer", "but", reason, f"{LLAMA_CPP}, get_vocab_base_pre")


def _blocks(arch: Architecture, name: str, block: int, what: str, place: str) -> Finding:
    """Which matrices have rows that are not made of whole blocks, and what share of the weights that is."""
    layers = arch.num_layers
    elements, odd, whole = 0, [], 0
    for kind, (rows, columns) in matrices(arch).items():
        times = (1 if arch.tie_embeddings else 2) if kind == "embedding and head" else layers * (1 + ("," in kind))
        elements += times * rows * columns
        if columns % block:
            odd.append(f"{kind} ({columns})")
        else:
            whole += times * rows * columns
    basis = f"{LLAMA_CPP}, {place}"
    if not odd:
        return Finding("llama.cpp", name, "yes", f"all rows are whole blocks of {block}", basis)
    reason = f"rows want multiples of {block}; {', '.join(odd)} {what}; {whole / elements:.0%} of weights are {name}"
    return Finding("llama.cpp", name, "but", reason, basis)


_RULES: Final[Mapping[str, Callable[[Architecture], Iterator[Finding]]]] = MappingProxyType(
    {"transformers": _transformers, "vllm": _vllm, "llama.cpp": _llama_cpp, "onnx": _onnx}
)
