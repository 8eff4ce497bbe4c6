#!/usr/bin/env python
"""The main job in small, from text to a pruned model in stock transformers: what `make demo` runs.

Prepares the text, prunes the source while training it, exports, trains the same shape from random weights on the same
tokens, and compares the three on held-out text. Every command is printed before it runs; finished stages are skipped
when the demo is run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prune.checkpoint.hf import read_architecture
from megatron_prune.checkpoint.hf_quiet import quiet_transformers
from megatron_prune.config.cli import load_config
from megatron_prune.config.schema import Config
from megatron_prune.data.blend import TokenBlend, parse_data_path
from megatron_prune.errors import EXIT_BAD_INPUT, UserError

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = Path("examples/demo")
RUNS = Path("runs/demo")
PROMPT = "def read_lines(path):\n    "
NEW_TOKENS = 60
TOP_K = 20
TEMPERATURE = 0.7


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the final table."""

    model: str
    parameters: int
    shape: str
    tokens: int
    loss: float


class Stages:
    """Numbers and times the stages and runs their commands as a user would type them, from the repository's root."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._number = 0
        self._began = time.monotonic()

    def begin(self, title: str) -> None:
        """Head a stage with its number and the time since the start."""
        self._number += 1
        elapsed = time.monotonic() - self._began
        print(f"\n[{self._number}/{self._total}] {title}  ({elapsed // 60:.0f}m{elapsed % 60:02.0f}s)", flush=True)

    def run(self, *command: str | Path) -> None:
        """Run ``python COMMAND`` and end the demo with its exit code if it fails."""
        words = [str(word) for word in command]
        print("$ python " + " ".join(words), flush=True)
        # Nothing here needs the network; libraries that look for updates would only wait for it. Threads that sleep
        # instead of spinning at OpenMP barriers cost little alone and save minutes on a machine that does other work.
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "OMP_WAIT_POLICY": "PASSIVE"}
        environment = {**quiet, **os.environ}
        code = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment).returncode
        if code != 0:
            print(f"the demo stops: the command above ended with exit code {code}", file=sys.stderr)
            sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all stages.

    Returns:
        The exit code: 0, or 2 for bad input; a failing command ends the demo with its own.
    """
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    ).parse_args(argv)
    os.chdir(ROOT)
    try:
        _demo(Stages(total=7))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def _demo(stages: Stages) -> None:
    source, exported, direct = EXAMPLES / "source", RUNS / "export", RUNS / "direct-export"
    settings = load_config(["--config", str(EXAMPLES / "prune.yaml")])
    prefix = settings.data.data_path[0]

    stages.begin("Text: the standard library of this Python, tokenised with the source's tokenizer")
    stages.run("tools/preprocess_data.py", "--stdlib", "--tokenizer", source, "--output-prefix", prefix)
    stages.begin("Prune while training, then continue training")
    stages.run("pretrain_prune.py", "--config", EXAMPLES / "prune.yaml")
    stages.begin("Export for Hugging Face transformers")
    stages.run("tools/convert_to_hf.py", "--load", RUNS / "prune", "--save", exported)
    stages.begin("The baseline: the same shape from random weights, for the same tokens")
    _without_weights(exported, RUNS / "direct-source")
    stages.run("pretrain_prune.py", "--config", EXAMPLES / "direct.yaml")
    stages.run("tools/convert_to_hf.py", "--load", RUNS / "direct", "--save", direct)
    stages.begin("Reload the export with stock transformers and let it write")
    print(_generate(exported, settings.train.seed))
    stages.begin("Compare on held-out text, each model loaded with stock transformers")
    made = load_config(["--config", str(EXAMPLES / "source.yaml")])
    rows = [
        _measure("source", source, made.train.train_iters * made.batch_tokens, settings),
        _measure("pruned", exported, _tokens_trained(RUNS / "prune"), settings),
        _measure("same shape, from scratch", direct, _tokens_trained(RUNS / "direct"), settings),
    ]
    print("\n".join(_table(rows)))
    stages.begin("Plots of the pruning run")
    stages.run("tools/plot_run.py", RUNS / "prune")
    print(f"\nThe picture of the run, as the paper's Figure 5: {RUNS / 'prune' / 'plots' / 'saliency.png'}")


def _without_weights(model: Path, directory: Path) -> None:
    """Copy a Hugging Face directory's small files: a source without weights is trained from random ones."""
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(model, directory, ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json"))


def _tokens_trained(run_dir: Path) -> int:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return max(int(record["tokens"]) for record in map(json.loads, lines) if "tokens" in record)


def _load(model_dir: Path) -> Any:  # what transformers' own Auto classes promise
    from transformers import AutoModelForCausalLM  # here and below: slow imports that the stages before do not need

    quiet_transformers()
    return AutoModelForCausalLM.from_pretrained(model_dir).float().eval()


def _generate(model_dir: Path, seed: int) -> str:
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = _load(model_dir)
    torch.manual_seed(seed)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=NEW_TOKENS,
        do_sample=True,
        top_k=TOP_K,
        temperature=TEMPERATURE,
        pad_token_id=tokenizer.eos_token_id,
    )
    text = str(tokenizer.decode(output[0], skip_special_tokens=True))
    return f"prompt: {PROMPT.strip()!r}\n" + "\n".join("    | " + line for line in text.splitlines())


def _measure(name: str, model_dir: Path, tokens: int, settings: Config) -> Row:
    """Validation loss in nats per token, of the same held-out samples for every model."""
    import torch

    architecture, model = read_architecture(model_dir), _load(model_dir)
    losses = []
    with torch.inference_mode():
        for batch in _held_out(settings, architecture.vocab_size):
            logits = model(input_ids=batch[:, :-1]).logits
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item())
    shape = f"{architecture.hidden_size} / {architecture.ffn_hidden_size} / {architecture.num_attention_heads}"
    return Row(name, architecture.num_parameters(), shape, tokens, sum(losses) / len(losses))


def _held_out(settings: Config, vocab_size: int) -> Iterator[Tensor]:
    data, size = settings.data, settings.train.global_batch_size
    sources = parse_data_path(data.data_path)
    blend = TokenBlend(sources, data.seq_length, settings.train.seed, data.split, "valid", vocab_size)
    for index in range(settings.run.eval_iters):
        yield blend.batch(index * size, size)


def _table(rows: Sequence[Row]) -> list[str]:
    """The rows under a heading, columns aligned: words to the left, numbers to the right."""
    heading = ("model", "parameters", "hidden / ffn / heads", "tokens trained", "validation loss")
    cells = [(r.model, f"{r.parameters:,}", r.shape, f"{r.tokens:,}", f"{r.loss:.3f}") for r in rows]
    widths = [max(len(line[column]) for line in [heading, *cells]) for column in range(len(heading))]
    lines = []
    for line in [heading, tuple("-" * width for width in widths), *cells]:
        first, *rest = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *rest]))
    lines.append("The pruned model's tokens come on top of its source's. One run, one seed: no claim beyond this text.")
    return lines


if __name__ == "__main__":
    sys.exit(main())
