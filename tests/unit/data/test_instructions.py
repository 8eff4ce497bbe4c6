"""Instructions as samples: what counts in the loss, token by token, and the order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_prune.data.instructions import Instruction, InstructionSamples, read_instructions, steps_of, tokenise
from megatron_prune.data.tokenizer import Tokenizer
from megatron_prune.errors import UserError

END = 0
PROMPT = "### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n"


class Characters(Tokenizer):
    """One token a character: borders between tokens can be counted by hand."""

    def __init__(self) -> None:
        super().__init__("characters", 128, END, b"")

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: object) -> str:
        raise NotImplementedError


EXAMPLE = Instruction("Add", "1 2", "3!")


def samples(
    examples: list[Instruction], seq_length: int = 64, seed: int = 1, vocab_size: int = 128
) -> InstructionSamples:
    return InstructionSamples(examples, Characters(), seq_length, seed, vocab_size)


def test_the_prompt() -> None:
    assert EXAMPLE.prompt == PROMPT
    assert Instruction("Add").prompt == "### Instruction:\nAdd\n\n### Response:\n"


def test_the_loss_counts_the_response_and_its_end_token_by_token() -> None:
    made = samples([EXAMPLE])
    (tokens,), (counted,) = made.batch(0, 1).tolist(), made.counted(0, 1).tolist()
    text = PROMPT + "3!"
    assert tokens == [ord(character) for character in text] + [END] * (65 - len(text))
    targets = tokens[1:]
    expected = [False] * (len(PROMPT) - 1) + [True, True, True] + [False] * (64 - len(PROMPT) - 2)
    assert counted == expected
    assert [target for target, counts in zip(targets, counted, strict=True) if counts] == [ord("3"), ord("!"), END]


@pytest.mark.parametrize(
    ("longest", "kept", "whole"), [(len(PROMPT) + 3, 3, True), (len(PROMPT) + 2, 2, False), (len(PROMPT) + 1, 1, False)]
)
def test_a_long_response_loses_its_end(longest: int, kept: int, whole: bool) -> None:
    made = samples([EXAMPLE], seq_length=longest - 1)
    assert int(made.counted(0, 1).sum()) == kept
    assert made.shortened == (not whole)
    found = tokenise(EXAMPLE, Characters(), longest)
    assert found is not None
    assert (found.tokens[-1] == END) is whole


def test_a_prompt_that_fills_a_sample_is_left_out() -> None:
    made = samples([EXAMPLE, Instruction("x" * 80, "", "y")])
    assert (len(made), made.dropped) == (1, 1)
    with pytest.raises(UserError, match="--seq-length 8: the prompt alone fills it in all 1 examples"):
        samples([EXAMPLE], seq_length=8)


def test_every_epoch_is_another_permutation_of_all_examples() -> None:
    made = samples([Instruction("Say", "", chr(65 + number)) for number in range(11)])
    response = len(Instruction("Say").prompt)
    epochs = [[int(row[response]) for row in made.batch(11 * epoch, 11)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(65, 76)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert made.batch(4, 3).equal(made.batch(0, 11)[4:7])
    assert made.counted(4, 3).equal(made.counted(0, 11)[4:7])


def test_the_fingerprint_knows_content_and_order() -> None:
    prints = {
        samples([EXAMPLE]).fingerprint(),
        samples([EXAMPLE], seed=2).fingerprint(),
        samples([EXAMPLE], seq_length=63).fingerprint(),
        samples([Instruction("Add", "1 2", "4!")]).fingerprint(),
    }
    assert len(prints) == 4
    assert samples([EXAMPLE]).fingerprint() in prints


def test_a_token_outside_the_vocabulary() -> None:
    with pytest.raises(UserError, match="gives token 117, but the model's vocabulary has 100; give .* as --tokenizer"):
        samples([EXAMPLE], vocab_size=100)


@pytest.mark.parametrize(
    ("examples", "epochs", "batch", "expected"), [(52000, 3, 128, 1219), (5, 3, 128, 1), (8, 2, 4, 4)]
)
def test_steps(examples: int, epochs: float, batch: int, expected: int) -> None:
    assert steps_of(examples, epochs, batch) == expected


def test_reading(tmp_path: Path) -> None:
    entries = [{"instruction": "Add", "input": "1 2", "output": "3!"}, {"instruction": "Say", "output": "A", "more": 1}]
    expected = [EXAMPLE, Instruction("Say", "", "A")]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(entries))
    assert read_instructions(path) == expected
    path.write_text("\n".join(map(json.dumps, entries)) + "\n")
    assert read_instructions(path) == expected
    path.write_text("\ufeff" + "\r\n".join(map(json.dumps, entries)))
    assert read_instructions(path) == expected
    path.write_text('{"instruction": "A\u2028B", "input": null, "output": "C"}', encoding="utf-8")
    assert read_instructions(path) == [Instruction("A\u2028B", "", "C")]
    path.write_text('[{"instruction": "Say"}]')
    assert read_instructions(path, with_output=False) == [Instruction("Say")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds no instruction"),
        ("", "holds no instruction"),
        ("[1]", "entry 1 has no text under 'instruction'"),
        (
            '[{"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}]',
            "entry 2 has no text under 'output'",
        ),
        ("nonsense", "is no file of instructions"),
        ("[" * 100_000, "nested too deeply"),
        ('{"instruction": "a", "output": ' + "[" * 100_000, "line 1: nested too deeply"),
        ('[{"instruction": "\\ud800", "output": "b"}]', "entry 1 has half a surrogate pair under 'instruction'"),
        ('[{"instruction": "a", "output": "\\udc00"}]', "entry 1 has half a surrogate pair under 'output'"),
        (
            '[{"instruction": "a", "input": 5, "output": "b"}]',
            "entry 1 has a value of type int under 'input'; give a text",
        ),
        (
            '[{"instruction": "a", "input": [], "output": "b"}]',
            "entry 1 has a value of type list under 'input'; give a text",
        ),
        ('[{"instruction": "a", "output": 5}]', "entry 1 has no text under 'output'"),
        (
            '{"instruction": "a", "output": "b\u2028\x85c"}\n\n{"instruction": 1}',
            "line 3 has no text under 'instruction'",
        ),
        ('{"instruction": "a\u2028", "output": "b"}\n{"instruction"', "line 2, column 15: "),
    ],
)
def test_reading_what_is_wrong(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_instructions(path)


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no file of instructions"):
        read_instructions(tmp_path / "nothing.json")
