"""Likelihood ranking against one question, one choice and one token at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_prune.data.tokenizer import train_bpe
from megatron_prune.errors import UserError
from megatron_prune.evaluation.cloze import Question
from megatron_prune.evaluation.scoring import (
    accuracies,
    choice_loglikelihoods,
    encode_pair,
    load_causal_lm,
    score_questions,
    validation_loss,
)

VOCABULARY = 300
QUESTIONS = [
    Question("def open(path):\n    ", ("return path", "x", "if path is None:"), 0),
    Question("", ("import os", "return"), 1),
    Question("for name in", (" names:", " self", " range(10)", " os"), 2),
    Question("x = " * 40, ("1", "None"), 0),  # longer than the model takes
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Path:
    """A Llama of random weights with a tokenizer of its own, for 32 tokens."""
    directory = tmp_path_factory.mktemp("model")
    train_bpe([(repo_root / "megatron_prune" / "errors.py").read_text() * 2], VOCABULARY, directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,  # so that choices differ clearly
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def loaded(model_dir: Path) -> tuple[Any, Any]:
    """Model and tokenizer."""
    return load_causal_lm(model_dir)


def _slow_score(model: Any, context: list[int], continuation: list[int]) -> float:
    """Token by token, each with all that fits before it."""
    tokens = (context + continuation)[-33:]
    total = 0.0
    for place in range(len(tokens) - len(continuation), len(tokens)):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([tokens[:place]])).logits[0, -1].double()
        total += logits.log_softmax(-1)[tokens[place]].item()
    return total


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_scores_equal_those_of_one_token_at_a_time(loaded: tuple[Any, Any], batch_size: int) -> None:
    model, tokenizer = loaded
    scores = choice_loglikelihoods(model, tokenizer, QUESTIONS, batch_size)
    for question, found in zip(QUESTIONS, scores, strict=True):
        pairs = [encode_pair(tokenizer, question.question, choice) for choice in question.choices]
        expected = [_slow_score(model, *pair) for pair in pairs]
        assert found == pytest.approx(expected, rel=1e-5)


def test_the_delimiter_stands_between(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    bare = [Question("for name in", ("names:", "self"), 0)]
    spaced = [Question("for name in", (" names:", " self"), 0)]
    assert choice_loglikelihoods(model, tokenizer, bare, delimiter=" ") == choice_loglikelihoods(
        model, tokenizer, spaced
    )


def test_blanks_at_the_end_of_the_context_go_with_the_continuation(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    context, continuation = encode_pair(tokenizer, "raise \n    ", "error")
    assert tokenizer.decode(context) == "raise"
    assert tokenizer.decode(continuation) == " \n    error"


def test_an_empty_context_is_the_beginning_of_a_text(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    context, continuation = encode_pair(tokenizer, "", "error")
    assert context == [tokenizer.bos_token_id]
    assert tokenizer.decode(continuation) == "error"


def test_the_continuation_is_what_the_whole_text_has_more(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    first, second = next(piece for piece in sorted(tokenizer.get_vocab()) if len(piece) == 2 and piece.isalpha())
    whole, before = tokenizer(first + second + " x")["input_ids"], tokenizer(first)["input_ids"]
    assert whole[: len(before)] != before, "a token joins the two"
    assert encode_pair(tokenizer, first, second + " x") == (before, whole[len(before) :])


def test_a_choice_that_vanishes_in_the_question_is_told(loaded: tuple[Any, Any]) -> None:
    class Joining:
        eos_token_id = bos_token_id = 0

        def __call__(self, text: str, **settings: bool) -> dict[str, list[int]]:
            return {"input_ids": [1, 2]}

    with pytest.raises(UserError, match="no token of its own"):
        choice_loglikelihoods(loaded[0], Joining(), [Question("a", ("b", "c"), 0)])


def test_accuracy_is_by_sum_and_by_character() -> None:
    questions = [Question("q", ("a", "bbbb"), 0), Question("q", ("a", "bbbb"), 1), Question("q", ("a", "b"), 1)]
    score = accuracies(questions, [[-2.0, -4.0], [-2.0, -4.0], [-1.0, -1.0]])
    assert (score.acc, score.acc_norm, score.num_questions) == (1 / 3, 1 / 3, 3)  # right: first; second; the tie is not
    assert accuracies(questions[:2], [[-2.0, -4.0]] * 2).acc_norm == 0.5
    assert score.acc_stderr == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 2))


def test_score_questions_counts_what_is_most_likely(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    scores = choice_loglikelihoods(model, tokenizer, QUESTIONS)
    best = [Question(q.question, q.choices, s.index(max(s))) for q, s in zip(QUESTIONS, scores, strict=True)]
    assert score_questions(model, tokenizer, best).acc == 1.0


def test_loss_is_the_mean_over_tokens_of_batches_of_any_size(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    tokens = torch.randint(VOCABULARY, (5, 9), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(input_ids=tokens, labels=tokens).loss.item()
    assert validation_loss(model, [tokens[:2], tokens[2:]]) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(UserError, match="no held-out tokens"):
        validation_loss(model, [])


@pytest.fixture
def without(model_dir: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the model without some of its files."""

    def copy(pattern: str) -> Path:
        for file in model_dir.iterdir():
            if not file.match(pattern):
                (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path

    return copy


@pytest.mark.parametrize(
    ("pattern", "what"),
    [("tokenizer*", "has no tokenizer"), ("*.safetensors", "cannot be loaded"), ("*", "cannot be loaded")],
)
def test_what_is_no_model_is_told(without: Callable[[str], Path], pattern: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        load_causal_lm(without(pattern))


def test_a_damaged_file_of_weights_is_told(without: Callable[[str], Path]) -> None:
    directory = without("nothing")
    with (directory / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="cannot be loaded by transformers"):
        load_causal_lm(directory)
