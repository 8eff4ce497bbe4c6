"""GGUF files by llama.cpp's own converter, which ships in the source of llama-cpp-python, and a run of the result.

The converter recognises a BPE tokenizer by the ids of a test text, which no retrained or trimmed vocabulary can match,
and then gives up. How text is split before BPE is in the tokenizer's own file, though, and llama.cpp has names for it.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch

from megatron_prune.checkpoint.files import json_object
from megatron_prune.checkpoint.run_export import check_export
from megatron_prune.errors import MegatronPruneError, UserError
from megatron_prune.evaluation.scoring import first_line, load_causal_lm
from megatron_prune.tool import bars_on_terminals_only, check_output, written_at_once

CONVERTER: Final = "convert_hf_to_gguf"
OUTTYPES: Final = ("f32", "f16", "bf16", "q8_0")
VENDORED: Final = "vendor/llama.cpp"
_THREADS: Final = 1
_FILE_TYPES: Final = MappingProxyType({"0": "f32", "1": "f16", "7": "q8_0", "32": "bf16"})  # llama.h: llama_ftype


@dataclasses.dataclass(frozen=True)
class GreedyReport:
    """How llama.cpp's greedy continuations compare with transformers'.

    Attributes:
        prompt: text that was continued.
        tokens: how many were generated.
        equal: how many of them agree before the first that does not.
        same_prompt: llama.cpp splits the prompt into the same tokens.
    """

    prompt: str
    tokens: int
    equal: int
    same_prompt: bool


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for how a ``tokenizer.json`` splits text before BPE, or None where it is not one of these two:
    ``gpt-2`` (byte level with GPT-2's pattern) and ``smollm`` (single digits first)."""
    pre = tokenizer.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    if not steps or not _is_byte_level(steps[-1]):
        return None
    if len(steps) == 1:
        return "gpt-2"
    digits = len(steps) == 2 and steps[0].get("type") == "Digits" and steps[0].get("individual_digits")
    return "smollm" if digits else None


def convert(model_dir: Path, llama_cpp: Path, output: Path, outtype: str, pre_tokenizer: str | None) -> str:
    """Write a GGUF file, complete or not at all.

    Args:
        model_dir: Hugging Face directory.
        llama_cpp: a llama.cpp source tree, or the unpacked source of llama-cpp-python, which has one inside.
        output: file to write.
        outtype: of :data:`OUTTYPES`.
        pre_tokenizer: llama.cpp's name of it; None finds it in ``tokenizer.json``.

    Returns:
        The pre-tokenizer's name that was written, or ``recognised by the converter``.

    Raises:
        UserError: the model is 8-bit, incomplete or without a readable tokenizer; no converter there, or a package it
            needs is missing; the output cannot be written.
        MegatronPruneError: the converter failed, as it does for a pre-tokenizer that must be named.
    """
    check_output("--output", output)
    check_export(model_dir)  # the converter takes what there is, whether whole or not
    root = next((place for place in (llama_cpp, llama_cpp / VENDORED) if (place / f"{CONVERTER}.py").is_file()), None)
    if root is None:
        raise UserError(f"--llama-cpp {llama_cpp} has no {CONVERTER}.py; give the source tree of llama.cpp")
    named = pre_tokenizer or _named(model_dir)
    with _importable(root), written_at_once(output) as scratch:
        try:
            converter = importlib.import_module(CONVERTER)
        except ImportError as error:
            raise UserError(f"llama.cpp's converter needs a package that is missing ({error}); install it") from error
        recognise = converter.TextModel.get_vocab_base_pre
        try:
            if named is not None:
                converter.TextModel.get_vocab_base_pre = lambda model, tokenizer: named
            sys.argv = [CONVERTER, str(model_dir), "--outfile", str(scratch / output.name), "--outtype", outtype]
            converter.main()
        except (SystemExit, Exception) as error:  # another program's main(): it may raise anything
            raise MegatronPruneError(
                f"llama.cpp's converter gave up on {model_dir} ({type(error).__name__}: {first_line(error)}); for a "
                "tokenizer it does not know give --pre-tokenizer"
            ) from error
        finally:
            converter.TextModel.get_vocab_base_pre = recognise
        if not (scratch / output.name).is_file():
            raise MegatronPruneError(
                f"llama.cpp's converter has written no {output.name}; is {root} a whole source tree?"
            )
    return named or "recognised by the converter"


def require_llama_cpp(what: str) -> Any:
    """The package llama-cpp-python, imported.

    Args:
        what: needs it: a flag or a file.

    Raises:
        UserError: it is not installed, or its library cannot be loaded.
    """
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:  # the last where its library does not load
        why = first_line(error)
        raise UserError(f"{what} needs llama-cpp-python ({why}); see docs/deploy.md for building it") from error
    return llama_cpp


def compare_greedy(model_dir: Path, gguf: Path, prompts: Sequence[str], count: int) -> Iterator[GreedyReport]:
    """Let llama.cpp and transformers (fp32) continue prompts greedily, and compare token by token.

    Args:
        model_dir: Hugging Face directory that the file was made from.
        gguf: the file.
        prompts: texts.
        count: tokens to generate for each.

    Raises:
        UserError: llama-cpp-python is not installed, or the model cannot be loaded.
    """
    llama_cpp = require_llama_cpp("--check")
    model, tokenizer = load_causal_lm(model_dir, torch.float32)
    for prompt in prompts:
        tokens = tokenizer(prompt)["input_ids"]
        theirs: Any = llama_cpp.Llama(
            str(gguf), n_ctx=len(tokens) + count + 1, n_threads=_THREADS, n_threads_batch=_THREADS, verbose=False
        )
        found: list[int] = []
        for token in theirs.generate(tokens, top_k=1, temp=0.0, repeat_penalty=1.0):
            found.append(int(token))
            if len(found) == count:
                break
        plain = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        same_prompt = theirs.tokenize(prompt.encode(), add_bos=False, special=False) == plain
        theirs.close()
        expected = _greedy(model, tokens, count)
        pairs = list(zip(found, expected, strict=True))
        equal = next((place for place, (ours, other) in enumerate(pairs) if ours != other), count)
        yield GreedyReport(prompt, count, equal, same_prompt)


class GgufModel:
    """A GGUF file in llama.cpp, to be timed.

    Args:
        file: the file.
        context: tokens that a timing will take.

    Attributes:
        precision: of its weights, e.g. ``gguf f16``.
        parameters: as llama.cpp counts them, a tied matrix once.

    Raises:
        UserError: llama-cpp-python is not installed, or the file is no GGUF.
    """

    def __init__(self, file: Path, context: int) -> None:
        llama_cpp = require_llama_cpp(str(file))
        try:
            self._model: Any = llama_cpp.Llama(
                str(file), n_ctx=context, n_threads=_THREADS, n_threads_batch=_THREADS, verbose=False
            )
        except ValueError as error:
            raise UserError(f"{file} cannot be loaded by llama.cpp ({error}); give a GGUF file") from error
        self._set_threads: Any = llama_cpp.llama_set_n_threads
        kind = self._model.metadata.get("general.file_type", "?")
        self.precision = f"gguf {_FILE_TYPES.get(kind, kind)}"
        self.parameters = int(llama_cpp.llama_model_n_params(self._model.model))

    def feed(self, tokens: Sequence[int], threads: int) -> None:
        """Take tokens after those that were fed before, as one batch."""
        self._set_threads(self._model.ctx, threads, threads)
        self._model.eval(list(tokens))

    def reset(self) -> None:
        """Forget what was fed."""
        self._model.reset()


@torch.inference_mode()
def _greedy(model: Any, tokens: Sequence[int], count: int) -> list[int]:
    """Without an end: a token that ends texts is a token like others here."""
    found, cache, ids = [], None, torch.tensor([list(tokens)])
    for _ in range(count):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
        found.append(int(ids))
    return found


def _named(model_dir: Path) -> str | None:
    """llama.cpp's name of a directory's pre-tokenizer, if it has one; a sentencepiece model needs none.

    Raises:
        UserError: no tokenizer, or none that can be read.
    """
    file = model_dir / "tokenizer.json"
    if not file.is_file():
        if not (model_dir / "tokenizer.model").is_file():
            raise UserError(f"{model_dir} has no tokenizer.json, which a GGUF file holds; give a whole export")
        return None
    try:
        return pre_tokenizer_name(json_object(file.read_bytes()))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{file} is no tokenizer ({first_line(error)}); give a whole export") from error


def _is_byte_level(step: Mapping[str, Any]) -> bool:
    return step.get("type") == "ByteLevel" and bool(step.get("use_regex", True)) and not step.get("add_prefix_space")


@contextmanager
def _importable(root: Path) -> Iterator[None]:
    """The converter and the gguf package beside it, which is newer than the one of the package index.

    It is a program, which sets up logging for itself and reports every tensor.
    """
    log = logging.getLogger()
    path, arguments, handlers, level = list(sys.path), list(sys.argv), list(log.handlers), log.level
    sys.path[:0] = [str(root), str(root / "gguf-py")]
    logging.disable(logging.WARNING)
    try:
        with bars_on_terminals_only():
            yield
    finally:
        sys.path, sys.argv = path, arguments
        log.handlers[:] = handlers
        log.setLevel(level)
        logging.disable(logging.NOTSET)
