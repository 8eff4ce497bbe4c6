#!/usr/bin/env python
"""Make the demo's source model: a tokenizer and a small Llama trained on the standard library (`make demo-source`).

Writes a Hugging Face directory in fp32. Takes a quarter of an hour or so on two cores; an interrupted run continues.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_prune.architecture import Architecture, uniform_kv_groups
from megatron_prune.checkpoint.hf_config import hf_config_from_architecture
from megatron_prune.config.cli import load_config
from megatron_prune.data.documents import plan_shards, read_documents, stdlib_files
from megatron_prune.data.tokenizer import train_bpe
from megatron_prune.errors import EXIT_BAD_INPUT, UserError

ROOT = Path(__file__).resolve().parents[1]
CONFIG = Path("examples/demo/source.yaml")
NUM_LAYERS = 4
NUM_HEADS = 4
VOCAB_SIZE = 2048
MAX_BYTES = 8 * 1024 * 1024  # what the repository is willing to carry


def architecture(vocab_size: int) -> Architecture:
    """The source's shape: every axis wide enough to prune, and still trained in minutes on a CPU."""
    return Architecture(
        family="llama",
        num_layers=NUM_LAYERS,
        hidden_size=128,
        ffn_hidden_size=352,
        num_attention_heads=NUM_HEADS,
        kv_groups=uniform_kv_groups(NUM_LAYERS, NUM_HEADS, NUM_HEADS),
        head_dim=32,
        vocab_size=vocab_size,
        tie_embeddings=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Make the tokenizer, prepare the text, train, export.

    Returns:
        The exit code: 0, 2 for bad input, or that of the command that failed.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--save", type=Path, default=Path("examples/demo/source"), metavar="DIR", help="%(default)s")
    options = parser.parse_args(argv)
    os.chdir(ROOT)
    try:
        return _make(options.save)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def _make(save: Path) -> int:
    settings = load_config(["--config", str(CONFIG)])
    assert settings.model.source is not None, f"{CONFIG} must name a source"
    assert settings.run.save is not None, f"{CONFIG} must name a run directory"
    initial = Path(settings.model.source)
    if not (initial / "config.json").exists():  # the last file written, so an interrupted start begins again
        print(f"[1/4] Tokenizer: a byte-level BPE of {VOCAB_SIZE} pieces -> {initial}", flush=True)
        _write_initial(initial)
    commands = {
        "[2/4] Text": ("tools/preprocess_data.py", "--stdlib", "--tokenizer", str(initial))
        + ("--output-prefix", settings.data.data_path[0]),
        "[3/4] Training": ("pretrain_prune.py", "--config", str(CONFIG)),
        "[4/4] Export": ("tools/convert_to_hf.py", "--load", settings.run.save, "--save", str(save)),
    }
    for title, command in commands.items():
        print(f"{title}\n$ python {' '.join(command)}", flush=True)
        code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
        if code != 0:
            return code
    size = sum(path.stat().st_size for path in save.rglob("*") if path.is_file())
    print(f"{save}: {size / 1024**2:.1f} MiB")
    if size > MAX_BYTES:
        raise UserError(f"{save} is {size:,} bytes, more than the {MAX_BYTES:,} a demo may weigh; make it smaller")
    return 0


def _write_initial(directory: Path) -> None:
    """A Hugging Face directory without weights."""
    tokenizer = train_bpe(_stdlib_texts(), VOCAB_SIZE, directory)
    token_ids = {"bos_token_id": tokenizer.eod_id, "eos_token_id": tokenizer.eod_id}
    config = hf_config_from_architecture(architecture(tokenizer.vocab_size), torch_dtype="float32", extra=token_ids)
    temporary = directory / "config.json.tmp"
    temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    temporary.replace(directory / "config.json")


def _stdlib_texts() -> Iterator[str]:
    for shard in plan_shards(stdlib_files()):
        yield from read_documents(shard, json_key="text")


if __name__ == "__main__":
    sys.exit(main())
