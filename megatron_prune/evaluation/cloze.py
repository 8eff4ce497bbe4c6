"""Multiple-choice questions made of held-out source code, for models too small for the public benchmarks.

Three tasks, all answered by which choice the model finds most likely:

- ``next_word``: the word that follows in the middle of a line, among words of other documents;
- ``next_name``: the name that follows, among other names of the same few lines;
- ``line_end``: how a line goes on after one of its words, among endings of other documents' lines.

The same documents and seed give the same questions on every machine.
"""

from __future__ import annotations

import dataclasses
import json
import keyword
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

from megatron_prune.errors import UserError

NUM_CHOICES: Final = 4
#: Characters of context: no more than that, and whole lines, so that small models with short sequences see all of it.
CONTEXT_CHARS: Final = 200
MIN_CONTEXT_CHARS: Final = 60
ENDING_CHARS: Final = (12, 48)
#: Choices of one question differ in length by no more than this factor, or length alone would give the answer away.
LENGTH_FACTOR: Final = 1.25
#: Places looked at for each question that is asked for.
_TRIES: Final = 60
_PARTS: Final = 8  # of a document that has no others beside it
_NAME: Final = re.compile(r"[A-Za-z_]\w{2,}")
_WORD: Final = re.compile(r"(?<=\S) [A-Za-z_]\w{2,}")


@dataclasses.dataclass(frozen=True)
class Question:
    """One multiple-choice question.

    Attributes:
        question: the text that every choice continues, character by character: nothing belongs between the two.
        choices: the possible continuations, blanks at their beginning included.
        answer: index of the right one.
    """

    question: str
    choices: tuple[str, ...]
    answer: int


#: Draws one question from a place in a document, or none where the place does not yield one.
_Maker = Callable[["_Corpus", random.Random], Question | None]


@dataclasses.dataclass(frozen=True)
class _Corpus:
    """The documents as lists of lines."""

    documents: tuple[tuple[str, ...], ...]

    def place(self, draw: random.Random, besides: int | None = None) -> tuple[int, int]:
        """A document, not the one that is given, and the number of one of its lines."""
        number = draw.randrange(len(self.documents) - (besides is not None))
        number += besides is not None and number >= besides
        return number, draw.randrange(len(self.documents[number]))

    def text(self, document: int, line: int) -> str:
        """A line, whatever it looks like."""
        return self.documents[document][line]

    def context(self, document: int, line: int) -> str:
        """Whole lines before a line, the line break before it included; empty if they are too few."""
        lines: list[str] = []
        size = 0
        for text in reversed(self.documents[document][:line]):
            if size + len(text) + 1 > CONTEXT_CHARS:
                break
            lines.insert(0, text)
            size += len(text) + 1
        return "".join(text + "\n" for text in lines) if size >= MIN_CONTEXT_CHARS else ""


def make_questions(task: str, documents: Sequence[str], count: int, seed: int) -> list[Question]:
    """Questions of one task.

    Args:
        task: a name from :func:`task_names`.
        documents: texts that the model was not trained on; their order matters. Wrong choices come from others than
            the right one, or from other parts of it where it is the only one.
        count: how many, at least 1.
        seed: which ones.

    Returns:
        ``count`` different questions.

    Raises:
        UserError: an unknown task, or documents too few or too uniform for so many questions.
    """
    if task not in _MAKERS:
        raise UserError(f"unknown cloze task {task!r}; there are {', '.join(task_names())}")
    split = tuple(lines for text in documents if (lines := tuple(line.rstrip() for line in text.splitlines())))
    if len(split) == 1:
        split = _parts(split[0])
    if len(split) < 2:
        raise UserError(f"cloze task {task} needs more text than a line: other parts of it give wrong choices")
    corpus, draw = _Corpus(split), random.Random(f"{task} {seed}")
    found: dict[tuple[str, frozenset[str]], Question] = {}
    for _ in range(count * _TRIES):
        question = _MAKERS[task](corpus, draw)
        if question is not None:
            found.setdefault((question.question, frozenset(question.choices)), question)
        if len(found) == count:
            return list(found.values())
    raise UserError(
        f"cloze task {task}: {len(split)} documents yield {len(found)} of {count} questions; give more text or ask for "
        "fewer"
    )


def _parts(lines: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """A document cut into a few of equal length."""
    size = -(-len(lines) // _PARTS)
    return tuple(lines[start : start + size] for start in range(0, len(lines), size))


def task_names() -> tuple[str, ...]:
    """The tasks there are."""
    return tuple(_MAKERS)


def write_questions(path: Path, questions: Sequence[Question]) -> None:
    """Write questions as JSON lines ``{"question": str, "choices": [str], "answer": int}``, what lm-eval reads too."""
    lines = (json.dumps(dataclasses.asdict(question), ensure_ascii=False) for question in questions)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def read_questions(path: Path) -> list[Question]:
    """Read what :func:`write_questions` has written, or anything of that form.

    Raises:
        UserError: the file is missing, empty, or a line is no such question.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # a question may hold any other line separator
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"questions {path} cannot be read ({error}); give a file of JSON lines") from error
    questions = [_parsed(f"{path} line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise UserError(f"questions {path} is empty; one JSON object per line is expected")
    return questions


def _parsed(place: str, line: str) -> Question:
    wanted = '{"question": text, "choices": [text, ...], "answer": index} is expected'
    try:
        record = json.loads(line)
        question, choices, answer = record["question"], record["choices"], record["answer"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{place} is no question ({type(error).__name__}: {error}); {wanted}") from error
    texts = isinstance(question, str) and isinstance(choices, list) and all(isinstance(text, str) for text in choices)
    index = isinstance(answer, int) and not isinstance(answer, bool)
    if not (texts and index and len(choices) > 1 and 0 <= answer < len(choices) and all(choices)):
        raise UserError(f"{place} is no question (wrong types, an empty choice or an answer out of range); {wanted}")
    return Question(question, tuple(choices), answer)


def _line_end(corpus: _Corpus, draw: random.Random) -> Question | None:
    document, line = corpus.place(draw)
    text, before = corpus.text(document, line), corpus.context(document, line)
    truth = _ending(text, draw)
    if truth is None or not before:
        return None

    def other() -> str | None:
        return _ending(corpus.text(*corpus.place(draw, besides=document)), draw)

    return _assembled(before + text.removesuffix(truth), truth, _distractors(other, truth), draw)


def _ending(text: str, draw: random.Random) -> str | None:
    """A line from one of its words on, if that is long enough."""
    low, high = ENDING_CHARS
    places = [match.start() for match in _WORD.finditer(text) if low <= len(text) - match.start() <= high]
    return text[draw.choice(places) :] if places else None


def _next_word(corpus: _Corpus, draw: random.Random) -> Question | None:
    """The words follow a blank, which belongs to the choices: it is where most tokenizers part them."""
    document, line = corpus.place(draw)
    text, before = corpus.text(document, line), corpus.context(document, line)
    words = list(_WORD.finditer(text))
    if not words or not before:
        return None
    place = draw.choice(words)
    truth = place.group()

    def other() -> str | None:
        found = _WORD.findall(corpus.text(*corpus.place(draw, besides=document)))
        return draw.choice(found) if found else None

    return _assembled(before + text[: place.start()], truth, _distractors(other, truth), draw)


def _indentation(text: str) -> int:
    return len(text) - len(text.lstrip())


def _next_name(corpus: _Corpus, draw: random.Random) -> Question | None:
    """The context ends in the middle of a line, where a name begins that the lines before have."""
    document, line = corpus.place(draw)
    text, before = corpus.text(document, line), corpus.context(document, line)
    if not before:
        return None
    places = [match for match in _NAME.finditer(text) if match.start() > _indentation(text) and _is_name(match.group())]
    known = sorted({name for name in _NAME.findall(before) if _is_name(name)})
    places = [match for match in places if match.group() in known]
    if not places:
        return None
    place = draw.choice(places)
    truth = place.group()
    others = _different(draw.sample(known, len(known)), truth)
    return _assembled(before + text[: place.start()], truth, others, draw)


def _is_name(word: str) -> bool:
    return not keyword.iskeyword(word)


def _distractors(find: Callable[[], str | None], truth: str) -> list[str]:
    """Different texts of about the truth's length, none the beginning of another; fewer if they are hard to find."""
    found = [truth]
    for _ in range(_TRIES * NUM_CHOICES):
        text = find()
        if text is None or any(_begins(text, other) for other in found):
            continue
        if max(len(text), len(truth)) <= LENGTH_FACTOR * min(len(text), len(truth)):
            found.append(text)
        if len(found) == NUM_CHOICES:
            break
    return found[1:]


def _different(texts: Iterable[str], truth: str) -> list[str]:
    """The first of some texts such that neither of two, or of one and the truth, begins the other."""
    found = [truth]
    for text in texts:
        if len(found) < NUM_CHOICES and not any(_begins(text, other) for other in found):
            found.append(text)
    return found[1:]


def _begins(text: str, other: str) -> bool:
    return text.startswith(other) or other.startswith(text)


def _assembled(context: str, truth: str, distractors: Sequence[str], draw: random.Random) -> Question | None:
    if len(distractors) < NUM_CHOICES - 1:
        return None
    answer = draw.randrange(NUM_CHOICES)
    choices = list(distractors)
    choices.insert(answer, truth)
    return Question(context, tuple(choices), answer)


def _tasks() -> Iterator[tuple[str, _Maker]]:
    yield "next_word", _next_word
    yield "next_name", _next_name
    yield "line_end", _line_end


_MAKERS: Final[Mapping[str, _Maker]] = MappingProxyType(dict(_tasks()))
