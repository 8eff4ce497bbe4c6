"""Responses of a model to instructions, by stock transformers, in AlpacaEval's format."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from megatron_prune.data.instructions import Instruction
from megatron_prune.data.tokenizer import Tokenizer, load_tokenizer
from megatron_prune.evaluation.scoring import load_causal_lm
from megatron_prune.training.speed import Eta, format_eta

REPORT_SECONDS: Final = 10.0


def respond(
    directory: Path,
    instructions: Sequence[Instruction],
    max_new_tokens: int,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Greedy responses of a Hugging Face model directory.

    Args:
        directory: of the model and its tokenizer.
        instructions: what to respond to.
        max_new_tokens: where a response ends if the model does not end it.
        batch_size: responses at once.
        progress: told after each batch how many are done, of how many.

    Returns:
        The responses in order, without the end-of-text token.

    Raises:
        UserError: there is no model or no tokenizer.
    """
    model, _ = load_causal_lm(directory)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(str(directory))
    prompts = [tokenizer.encode(instruction.prompt) for instruction in instructions]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # little padding in a batch
    responses = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        found = _generate(model, tokenizer, [prompts[index] for index in chosen], max_new_tokens)
        for index, response in zip(chosen, found, strict=True):
            responses[index] = response
        if progress is not None:
            progress(start + len(chosen), len(order))
    return responses


def write_alpaca_eval(
    path: Path, instructions: Sequence[Instruction], responses: Sequence[str], generator: str
) -> None:
    """Write a JSON array of ``{"instruction", "output", "generator"}``, with ``"input"`` where there was one."""
    entries = [
        {"instruction": asked.instruction}
        | ({"input": asked.input} if asked.input else {})
        | {"output": response, "generator": generator}
        for asked, response in zip(instructions, responses, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def printer(what: str) -> Callable[[int, int], None]:
    """A ``progress`` that says on stderr every few seconds how far it is and how long the rest takes."""
    eta, last = Eta(), time.monotonic()
    eta.update(0)

    def report(done: int, total: int) -> None:
        nonlocal last
        eta.update(done)
        left = eta.seconds(total - done)
        if left is not None and time.monotonic() - last >= REPORT_SECONDS:
            last = time.monotonic()
            print(f"{what}: {done} of {total}, ETA {format_eta(left)}", file=sys.stderr, flush=True)

    return report


@torch.inference_mode()
def _generate(model: Any, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[str]:
    """Padded on the left, where the mask hides it; responses begin at the same place."""
    width = max(map(len, prompts))
    tokens = torch.full((len(prompts), width), tokenizer.eod_id)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    made = model.generate(
        tokens.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eod_id,
        pad_token_id=tokenizer.eod_id,
    )
    rows: list[list[int]] = made[:, width:].tolist()
    ends = (row.index(tokenizer.eod_id) if tokenizer.eod_id in row else len(row) for row in rows)
    return iter([tokenizer.decode(row[:end]) for row, end in zip(rows, ends, strict=True)])
