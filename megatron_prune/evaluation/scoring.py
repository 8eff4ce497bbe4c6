"""Answering multiple-choice questions by likelihood, by the definitions of lm-evaluation-harness, and held-out loss.

A choice's score is the sum of the log-likelihoods of its tokens after the question's. ``acc`` counts the questions
whose right choice has the largest score, ``acc_norm`` those where it has the largest score per character of the choice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from megatron_prune.checkpoint.hf_quiet import quiet_transformers
from megatron_prune.errors import UserError
from megatron_prune.evaluation.cloze import Question

#: For a model whose config does not say how long a sequence it takes.
DEFAULT_MAX_LENGTH: Final = 2048
#: What transformers raises for a directory that is no model, or a damaged one, or one that a missing package wrote.
LOADING_ERRORS: Final = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError),
)


@dataclasses.dataclass(frozen=True)
class ClozeScore:
    """How one task went.

    Attributes:
        acc: share of questions answered rightly, by the sum of log-likelihoods.
        acc_norm: the same by the sum per character.
        num_questions: how many there were.
    """

    acc: float
    acc_norm: float
    num_questions: int

    @property
    def acc_stderr(self) -> float:
        """Standard error of ``acc`` over questions, as lm-eval prints it: that of a sample's mean."""
        return _stderr(self.acc, self.num_questions)

    @property
    def acc_norm_stderr(self) -> float:
        """Standard error of ``acc_norm``."""
        return _stderr(self.acc_norm, self.num_questions)


def load_causal_lm(directory: Path, dtype: torch.dtype | Literal["auto"] = torch.float32) -> tuple[Any, Any]:
    """A model directory's model, ready to evaluate, and its tokenizer, by transformers' own Auto classes.

    Raises:
        UserError: there is no such model or no tokenizer.
    """
    model = load_model(directory, dtype)
    import transformers

    try:
        return model, transformers.AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory} has no tokenizer ({first_line(error)}); give an exported directory") from error


def load_model(directory: Path, dtype: torch.dtype | Literal["auto"] = torch.float32, **options: Any) -> Any:
    """A model directory's model, ready to evaluate, by transformers' own Auto class.

    Args:
        directory: of config and weights.
        dtype: of the weights in memory; ``auto`` is what the directory says.
        options: more of what ``from_pretrained`` takes.

    Raises:
        UserError: there is no such model, or its weights are damaged or not all there.
    """
    import transformers  # takes seconds, which reading questions should not

    quiet_transformers()
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, output_loading_info=True, **options
        )
    except LOADING_ERRORS as error:
        raise UserError(
            f"{directory} cannot be loaded by transformers ({first_line(error)}); give a whole model directory"
        ) from error
    model, found = loaded
    absent = sorted(map(str, found["missing_keys"]))
    if absent:  # transformers would leave them random
        raise UserError(f"{directory} lacks {len(absent)} tensor(s), the first {absent[0]}; give a whole directory")
    return model.eval()


def first_line(error: BaseException) -> str:
    """What an exception of another library says, shortened to a line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def score_questions(
    model: Any, tokenizer: Any, questions: Sequence[Question], batch_size: int = 32, delimiter: str = ""
) -> ClozeScore:
    """Let a model answer questions.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        questions: at least one.
        batch_size: choices at once; changes nothing but rounding.
        delimiter: what stands between question and choice; lm-eval's ``target_delimiter``.

    Returns:
        The two accuracies.
    """
    return accuracies(questions, choice_loglikelihoods(model, tokenizer, questions, batch_size, delimiter))


def accuracies(questions: Sequence[Question], loglikelihoods: Sequence[Sequence[float]]) -> ClozeScore:
    """``acc`` and ``acc_norm`` from every choice's log-likelihood; the first of equals is the answer, as in lm-eval."""
    assert len(questions) == len(loglikelihoods) > 0
    right = right_norm = 0
    for question, scores in zip(questions, loglikelihoods, strict=True):
        per_char = [score / len(choice) for score, choice in zip(scores, question.choices, strict=True)]
        right += scores.index(max(scores)) == question.answer
        right_norm += per_char.index(max(per_char)) == question.answer
    return ClozeScore(right / len(questions), right_norm / len(questions), len(questions))


def choice_loglikelihoods(
    model: Any, tokenizer: Any, questions: Sequence[Question], batch_size: int = 32, delimiter: str = ""
) -> list[list[float]]:
    """Log-likelihood in nats of every choice of every question, given the question.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        questions: what to answer.
        batch_size: choices at once.
        delimiter: what stands between question and choice.
    """
    assert batch_size > 0
    pairs = [
        encode_pair(tokenizer, question.question, delimiter + choice)
        for question in questions
        for choice in question.choices
    ]
    limit = getattr(model.config, "max_position_embeddings", None) or DEFAULT_MAX_LENGTH
    # Longest first: a batch is padded to its longest, and a lack of memory shows at once.
    order = sorted(range(len(pairs)), key=lambda index: -sum(map(len, pairs[index])))
    scores = [0.0] * len(pairs)
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for index, score in zip(chosen, _batch_scores(model, [pairs[i] for i in chosen], limit), strict=True):
                scores[index] = score
    flat = iter(scores)
    return [[next(flat) for _ in question.choices] for question in questions]


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a context and of what continues it, by lm-eval's rule.

    Both are tokenised together and the context alone; the continuation is what the first has more, by number, also
    where a token joins the end of one and the beginning of the other. Blanks and line breaks that end the context
    belong to the continuation, as tokenizers join them with what follows. An empty context becomes the token that
    begins (or else ends) texts.
    """
    if not context:
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        tokens = list(tokenizer(continuation, add_special_tokens=False)["input_ids"])
        return ([start], tokens[1:] if tokens[:1] == [start] else tokens)
    stripped = context.rstrip()
    whole, before = _ids(tokenizer, context + continuation), _ids(tokenizer, stripped)
    return before, whole[len(before) :]


def validation_loss(model: Any, batches: Iterable[Tensor]) -> float:
    """Mean cross-entropy in nats per token.

    Args:
        model: a causal language model of transformers.
        batches: int64 tokens ``[samples, length + 1]``, of any one shape each: inputs and, one later, targets.

    Raises:
        UserError: there is no batch.
    """
    total, count = 0.0, 0
    with torch.inference_mode():
        for batch in batches:
            batch = batch.to(model.device)
            logits = model(input_ids=batch[:, :-1]).logits.float()
            targets = batch[:, 1:].flatten()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
            total, count = total + loss.double().item(), count + targets.numel()
    if not count:
        raise UserError("no held-out tokens to measure a loss on; give more text")
    return total / count


def _batch_scores(model: Any, pairs: Sequence[tuple[list[int], list[int]]], limit: int) -> list[float]:
    """Padded on the right, where a causal model's earlier positions do not see it."""
    rows = [(context + continuation)[-(limit + 1) :] for context, continuation in pairs]
    width = max(len(row) for row in rows) - 1
    inputs = torch.zeros(len(rows), width, dtype=torch.long)
    for row, tokens in zip(inputs, rows, strict=True):
        row[: len(tokens) - 1] = torch.tensor(tokens[:-1])
    logits = model(input_ids=inputs.to(model.device)).logits
    scores = []
    for index, (tokens, (_, continuation)) in enumerate(zip(rows, pairs, strict=True)):
        count = min(len(continuation), len(tokens) - 1)
        if not count:
            raise UserError("a choice has no token of its own: the tokenizer joins all of it with the question")
        end = len(tokens) - 1
        log_probs = logits[index, end - count : end].float().log_softmax(-1)
        targets = torch.tensor(tokens[len(tokens) - count :], device=log_probs.device)
        scores.append(log_probs.gather(-1, targets[:, None]).double().sum().item())
    return scores


def _ids(tokenizer: Any, text: str) -> list[int]:
    """As lm-eval by default: with whatever the tokenizer itself puts around a text."""
    return list(tokenizer(text)["input_ids"])


def _stderr(share: float, count: int) -> float:
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else math.nan
