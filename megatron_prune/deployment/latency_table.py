"""Milliseconds of prefill and of a decoded token for several models, as the paper's Table 12 has them.

Batch 1, in stock transformers, as it is or compiled; GGUF files in llama.cpp. A round times every model at every
precision once: rounds are interleaved, so that what else the machine does falls on all of them alike. The median of the
rounds counts and their range is printed.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import torch

from megatron_prune.deployment.comparison import aligned
from megatron_prune.deployment.compiled import CompiledModel
from megatron_prune.deployment.contestants import Contestant
from megatron_prune.deployment.gguf import GgufModel

#: The paper's Table 12, milliseconds a token on 1, 2, 4 and 8 CPUs.
PAPER: Final[Mapping[str, Mapping[int, float]]] = MappingProxyType(
    {
        "EfficientLLM-457M": MappingProxyType({1: 15.93, 2: 9.38, 4: 5.67, 8: 4.07}),
        "Qwen2.5-0.5B": MappingProxyType({1: 54.51, 2: 30.08, 4: 19.87, 8: 13.54}),
    }
)
_WARM_UP: Final = 2  # decoded tokens


@dataclasses.dataclass(frozen=True)
class Workload:
    """What one timing does.

    Attributes:
        prompt: tokens of the prefill, which decoded tokens come after.
        new_tokens: decoded tokens; their median is a round's time.
        rounds: timings of everything.
    """

    prompt: int
    new_tokens: int
    rounds: int


@dataclasses.dataclass(frozen=True)
class Timing:
    """Times of one contestant at a number of threads, in milliseconds, one entry a round.

    Attributes:
        name: of the model.
        precision: fp32, bf16 or int8.
        parameters: of the model.
        threads: of torch.
        decode: a token.
        prefill: the whole prompt.
    """

    name: str
    precision: str
    parameters: int
    threads: int
    decode: tuple[float, ...]
    prefill: tuple[float, ...]


def thread_counts(wanted: Sequence[int]) -> tuple[list[int], list[int]]:
    """Those of the wanted numbers of threads that this machine has cores for, and the others."""
    cores = len(os.sched_getaffinity(0))
    return [count for count in wanted if count <= cores], [count for count in wanted if count > cores]


def time_all(
    entrants: Sequence[Contestant], threads: Sequence[int], work: Workload, on_round: Callable[[int, int], None]
) -> list[Timing]:
    """Time everything.

    Args:
        entrants: who is timed.
        threads: numbers of torch threads.
        work: what is done.
        on_round: called with the number of rounds done and of all.
    """
    before, timings = torch.get_num_threads(), []
    try:
        for turn, count in enumerate(threads):
            torch.set_num_threads(count)
            results: list[list[tuple[float, float]]] = [[] for _ in entrants]
            for number in range(work.rounds + 1):  # the first one warms up
                for entrant, result in zip(entrants, results, strict=True):
                    result.append(time_once(entrant.model, work, count))
                on_round(turn * (work.rounds + 1) + number + 1, len(threads) * (work.rounds + 1))
            for entrant, result in zip(entrants, results, strict=True):
                decode, prefill = zip(*result[1:], strict=True)
                about = entrant.name, entrant.precision, entrant.parameters
                timings.append(Timing(*about, count, decode, prefill))
    finally:
        torch.set_num_threads(before)
    return timings


def time_once(model: Any, work: Workload, threads: int) -> tuple[float, float]:
    """Milliseconds of a decoded token (the median of several) and of the prefill before them.

    Args:
        model: of a :class:`~megatron_prune.deployment.contestants.Contestant`, compiled or not.
        work: what is done.
        threads: of llama.cpp; torch's are what they are.
    """
    feed = _feed(model, threads)
    start = time.perf_counter()
    feed(range(work.prompt))
    prefill, times = time.perf_counter() - start, []
    for token in range(_WARM_UP + work.new_tokens):
        start = time.perf_counter()
        feed([token])
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[_WARM_UP:]), 1e3 * prefill


def _feed(model: Any, threads: int) -> Callable[[Sequence[int]], object]:
    if isinstance(model, GgufModel):
        return _gguf_feed(model, threads)
    return _compiled_feed(model) if isinstance(model, CompiledModel) else _torch_feed(model)


def _compiled_feed(model: CompiledModel) -> Callable[[Sequence[int]], None]:
    feed = model.start()

    def chosen(tokens: Sequence[int]) -> None:
        int(feed(tokens).argmax())

    return chosen


def _torch_feed(model: Any) -> Callable[[Sequence[int]], None]:
    """Takes tokens after those it took before, up to the choice of the next one."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)

    @torch.inference_mode()
    def feed(tokens: Sequence[int]) -> None:
        ids = torch.tensor([list(tokens)]).remainder(model.config.vocab_size)
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        int(logits[0, -1].argmax())

    return feed


def _gguf_feed(model: GgufModel, threads: int) -> Callable[[Sequence[int]], None]:
    model.reset()
    return lambda tokens: model.feed(tokens, threads)


def compiled(entrants: Sequence[Contestant], length: int, say: Callable[[str], None]) -> list[Contestant]:
    """The same models to be compiled as they are first run; GGUF files stay as they are.

    Args:
        entrants: loaded.
        length: tokens of a prefill and all that is decoded after it.
        say: called with a line before each compilation.
    """
    return [
        entrant
        if isinstance(entrant.model, GgufModel)
        else dataclasses.replace(entrant, model=CompiledModel(entrant.model, length, _announced(entrant, say)))
        for entrant in entrants
    ]


def _announced(entrant: Contestant, say: Callable[[str], None]) -> Callable[[int, int], None]:
    return lambda tokens, threads: say(
        f"compiling {entrant.name} {entrant.precision}: {tokens} token(s) on {threads} thread(s)"
    )


def latency_table(timings: Sequence[Timing]) -> list[str]:
    """A line per model, precision and threads, with how much faster each is than the first model at the same two."""
    heading = (
        "model",
        "precision",
        "threads",
        "parameters",
        "decode ms",
        "range",
        "speed",
        "prefill ms",
        "range",
        "speed",
    )
    cells = []
    for timing in timings:
        base = first_of(timings, timing)
        cells.append(
            (
                timing.name,
                timing.precision,
                str(timing.threads),
                f"{timing.parameters:,}",
                *_shown(timing.decode, base.decode),
                *_shown(timing.prefill, base.prefill),
            )
        )
    return aligned([heading, *cells])


def first_of(timings: Sequence[Timing], timing: Timing) -> Timing:
    """The first model's line at a line's precision and threads; its first line where it was not timed like that."""
    own = [other for other in timings if other.name == timings[0].name]
    alike = (other for other in own if (other.precision, other.threads) == (timing.precision, timing.threads))
    return next(alike, next((other for other in own if other.threads == timing.threads), timings[0]))


def paper_lines(timings: Sequence[Timing]) -> list[str]:
    """Our ratio of the two models of Table 12 beside the paper's, for every precision and number of threads timed."""
    ours, other = "EfficientLLM-457M", "Qwen2.5-0.5B"
    lines = []
    for first, second in itertools.product(timings, timings):
        alike = (first.precision, first.threads) == (second.precision, second.threads)
        if alike and (first.name, second.name) == (ours, other):
            reported = (
                PAPER[other][first.threads] / PAPER[ours][first.threads] if first.threads in PAPER[ours] else None
            )
            measured = statistics.median(second.decode) / statistics.median(first.decode)
            paper = "not in the paper" if reported is None else f"{reported:.2f} in the paper's Table 12"
            lines.append(
                f"{other} / {ours}, {first.precision}, {first.threads} threads: {measured:.2f} here, {paper} "
                f"(parameters: {second.parameters / first.parameters:.2f})"
            )
    return lines


def _shown(times: Sequence[float], base: Sequence[float]) -> tuple[str, str, str]:
    middle = statistics.median(times)
    return f"{middle:.2f}", f"{min(times):.2f}-{max(times):.2f}", f"{statistics.median(base) / middle:.2f}x"
