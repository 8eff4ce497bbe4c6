#!/usr/bin/env python
"""Instruction tuning on Alpaca's JSON format, with the trainer that prunes, from a run directory or a model directory.

    python tools/finetune.py runs/457m --data alpaca.json --save runs/457m-tuned
    torchrun --nproc-per-node 8 tools/finetune.py exported/457m --data alpaca.json --save runs/457m-tuned
    python tools/finetune.py exported/457m --data alpaca.json --save runs/457m-tuned \\
        --generate answers.json --prompts alpaca_eval.json

The loss is taken on the responses only. The tuned model is written to SAVE/export, for stock transformers. The same
command with the same --save goes on where it stopped. Every other flag of pretrain_prune.py may be given as well.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_prune.checkpoint.hf import read_architecture
from megatron_prune.checkpoint.run_export import export_run, is_run_directory, model_directory
from megatron_prune.checkpoint.store import CHECKPOINTS
from megatron_prune.config import load_config
from megatron_prune.data.instructions import Instruction, InstructionSamples, read_instructions
from megatron_prune.errors import EXIT_BAD_INPUT, EXIT_FAILURE, MegatronPruneError, UserError
from megatron_prune.lora import ADAPTER_DIR, LoraSettings, train_adapters
from megatron_prune.parallel.mesh import map_launcher_environment
from megatron_prune.tool import EXIT_INTERRUPTED, check_output, files_of
from megatron_prune.tuning import (
    EXPORT_DIR,
    Tuning,
    check,
    check_same,
    check_target,
    samples_of,
    steps,
    trainer_flags,
    whole_model,
)

#: Adapters are few and start at zero: they bear, and need, larger steps.
LORA_LR = 2e-4
FULL_LR = 2e-5


def main(argv: Sequence[str] | None = None) -> int:
    """Tune, export, and answer if asked to.

    Returns:
        The exit code: 0, 2 for bad input, 75 stopped with a complete checkpoint, 130 on Ctrl-C before or after the
        training, 1 anything else.
    """
    options, flags = _parser().parse_known_args(argv)
    if options.lora_rank is None:  # else variables of a launcher would have other libraries make process groups
        map_launcher_environment(os.environ)
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        if options.prompts is not None and options.generate is None:
            raise UserError(f"--prompts {options.prompts} is of no use without --generate; give both")
        if options.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens {options.max_new_tokens} must be 1 or more")
        tuning = _tuning(options)
        check(tuning, flags)
        asked = _asked(options, tuning.source) if is_main and options.generate is not None else None
        if options.lora_rank is not None:
            _adapt(tuning, options, flags)
        else:
            code, is_dry_run = _train(tuning, flags, is_main)
            if code or is_dry_run:
                return code
        if asked is not None:
            _generate(tuning, options.generate, asked, options.max_new_tokens)
    except MegatronPruneError as error:
        if is_main:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_FAILURE
    except KeyboardInterrupt:  # the trainer saves first: this is before or after it, or adapters
        if is_main:
            print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="run directory, or Hugging Face model directory")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="JSON: instruction, input, output")
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help="run directory of the tuning")
    parser.add_argument("--epochs", type=float, default=Tuning.epochs, help="times around the data (default: 3)")
    parser.add_argument("--seq-length", type=int, default=Tuning.seq_length, help="longest example (default: 512)")
    parser.add_argument(
        "--global-batch-size", type=int, default=Tuning.global_batch_size, help="examples per step (default: 128)"
    )
    parser.add_argument("--lr", type=float, help=f"peak learning rate (default: {FULL_LR:g}; with LoRA {LORA_LR:g})")
    parser.add_argument("--tokenizer", metavar="NAME", help="in place of the model's own: directory, file or hub id")
    parser.add_argument("--lora-rank", type=int, metavar="R", help="train adapters by peft instead, in one process")
    parser.add_argument("--generate", type=Path, metavar="FILE", help="then write responses in AlpacaEval's format")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="instructions to respond to (default: --data's)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest response (default: 256)")
    return parser


def _asked(options: argparse.Namespace, source: Path) -> list[Instruction]:
    """What --generate shall respond to, read before training starts; the file to write is none that is read."""
    inputs = [path for path in (options.data, options.prompts, *files_of(source)) if path is not None]
    check_output("--generate", options.generate, inputs)
    return read_instructions(options.prompts or options.data, with_output=False)


def _tuning(options: argparse.Namespace) -> Tuning:
    default = FULL_LR if options.lora_rank is None else LORA_LR
    return Tuning(
        model=options.model,
        data=options.data,
        save=options.save,
        epochs=options.epochs,
        seq_length=options.seq_length,
        global_batch_size=options.global_batch_size,
        lr=default if options.lr is None else options.lr,
        tokenizer=options.tokenizer,
    )


def _train(tuning: Tuning, flags: Sequence[str], is_main: bool) -> tuple[int, bool]:
    """All parameters, by the trainer, on as many processes as there are.

    Returns:
        The exit code, and whether --dry-run was given, which makes no model.
    """
    from megatron_prune import pretrain

    check_target(tuning.save, CHECKPOINTS)
    arch = read_architecture(tuning.source) if is_run_directory(tuning.model) else whole_model(tuning.model)
    seed = load_config(trainer_flags(tuning, 1, 1, flags)).train.seed
    samples = samples_of(tuning, arch.vocab_size, seed)
    train_iters = steps(tuning, samples)
    settings = load_config(trainer_flags(tuning, train_iters, 1, flags))
    check_same(settings, samples.fingerprint())
    if is_main:
        _describe(tuning, samples, train_iters)
    copies = max(1, int(os.environ["WORLD_SIZE"]) // settings.parallel.model_parallel_size)
    code = pretrain.main(trainer_flags(tuning, train_iters, copies, flags))
    if code == 0 and is_main and not settings.run.dry_run:
        done = export_run(tuning.save, tuning.save / EXPORT_DIR)
        print(f"{done.report.directory}: {done.report.hf_class}, verified, ready for transformers", flush=True)
    return code, settings.run.dry_run


def _adapt(tuning: Tuning, options: argparse.Namespace, flags: Sequence[str]) -> None:
    if flags:
        raise UserError(f"{flags[0]} goes to the trainer, which --lora-rank does not use; drop it")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--lora-rank works in one process; start it with plain python")
    check_target(tuning.save, ADAPTER_DIR)
    model = model_directory(tuning.model)
    samples = samples_of(tuning, whole_model(model).vocab_size)
    train_iters = steps(tuning, samples)
    _describe(tuning, samples, train_iters)
    settings = LoraSettings(options.lora_rank, tuning.lr, train_iters, tuning.global_batch_size, seed=0)
    merged = train_adapters(model, samples, settings, tuning.save, tuning.tokenizer)
    print(f"{merged}: adapters of rank {options.lora_rank} merged, ready for transformers", flush=True)


def _describe(tuning: Tuning, samples: InstructionSamples, train_iters: int) -> None:
    notes = f", {samples.shortened} responses cut off" if samples.shortened else ""
    notes += f", {samples.dropped} left out: no room for a response" if samples.dropped else ""
    print(
        f"{len(samples)} examples of at most {tuning.seq_length} tokens{notes}; {tuning.epochs:g} epochs in "
        f"{train_iters} steps of {tuning.global_batch_size}",
        flush=True,
    )


def _generate(tuning: Tuning, target: Path, asked: Sequence[Instruction], max_new_tokens: int) -> None:
    from megatron_prune.generation import printer, respond, write_alpaca_eval

    responses = respond(tuning.save / EXPORT_DIR, asked, max_new_tokens, progress=printer("responses"))
    write_alpaca_eval(target, asked, responses, tuning.save.name)
    print(f"{target}: {len(responses)} responses", flush=True)


if __name__ == "__main__":
    sys.exit(main())
