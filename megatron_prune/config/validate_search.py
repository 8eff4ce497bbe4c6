"""Rules about how the shape is searched: budgets, trajectories, replays, grouped-query attention, alignment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megatron_prune.architecture import Architecture
from megatron_prune.config.schema import PRUNE_AXES, Config, PruneConfig
from megatron_prune.config.targets import floor_shape, heads_within_kv_bytes, reachable_heads
from megatron_prune.config.values import nearest, parse_shape
from megatron_prune.errors import UserError

_OWN_LEDGER = "ledger.jsonl"
_ORDER = "an order of attention (heads), ffn (channels) and stem (hidden channels), such as stem,attention,ffn"


def search_problems(config: Config) -> Iterator[str]:
    """What can be known from the settings alone, one line each."""
    prune = config.prune
    if len(prune.targets) > 1:
        given = " and ".join(f"{flag} {value}" for flag, value in prune.targets.items())
        all_of_them = "both" if len(prune.targets) == 2 else "all"
        yield f"{given} are {all_of_them} given: keep the one that should end the pruning"
    yield from _trajectory(config)
    if prune.prune_cost is not None and prune.saliency_norm != "mean":
        yield f"--prune-cost {prune.prune_cost} takes the place of --saliency-norm {prune.saliency_norm}: drop one"
    if prune.target_kv_bytes is not None and "attention" not in prune.prune_axes:
        yield f"--target-kv-bytes {prune.target_kv_bytes} needs attention in --prune-axes {','.join(prune.prune_axes)}"
    if prune.final_align > 1 and prune.replay is None and (prune.target_shape is not None or not prune.targets):
        yield (
            f"--final-align {prune.final_align} is about where a search ends: give --target-params or another budget, "
            "or a --target-shape that is aligned without it"
        )
    if prune.replay is not None:
        yield from _replay(config, prune.replay)
    if prune.saliency_ema is not None:
        yield from _ema(config, prune.saliency_ema)


def search_problems_of(config: Config, arch: Architecture) -> list[str]:
    """What the source makes of the settings, one line each."""
    prune = config.prune
    if not prune.active:
        return []
    problems = [*_gqa(config, arch), *_order(config, arch)]
    try:
        floor_shape(prune, arch)
        if prune.target_kv_bytes is not None and not problems:
            problems += _kv_bytes(config, arch)
    except UserError as error:
        problems.append(str(error))
    return problems


def _trajectory(config: Config) -> Iterator[str]:
    prune = config.prune
    if prune.order is None:
        return
    text = ",".join(prune.order)
    unknown = [axis for axis in prune.order if axis not in PRUNE_AXES]
    twice = [axis for axis in PRUNE_AXES if prune.order.count(axis) > 1]
    if "unified" in prune.order:
        yield (
            f"--trajectory {text} mixes unified, which lets all axes shrink together, with an order: give unified "
            f"alone, or {_ORDER}"
        )
    elif unknown:
        hint = nearest(unknown[0], ("unified", *PRUNE_AXES)) or f": give unified, or {_ORDER}"
        yield f"--trajectory {text} has unknown {unknown[0]!r}{hint}"
    elif twice:
        yield f"--trajectory {text} names {twice[0]} twice, and an axis shrinks in one go: keep one"
    elif not prune.order:
        yield f"--trajectory is empty: give unified, or {_ORDER}"
    elif prune.target_shape is None and prune.replay is None:
        yield f"--trajectory {text} needs to know where each axis ends: give --target-shape, or --replay"


def _replay(config: Config, ledger: str) -> Iterator[str]:
    prune = config.prune
    aligned = prune.final_align if prune.final_align > 1 else None
    default = PruneConfig()
    given = {
        "--prune-cost": prune.prune_cost,
        "--prune-metric": None if prune.prune_metric == default.prune_metric else prune.prune_metric,
        "--prune-hessian": None if prune.prune_hessian == default.prune_hessian else prune.prune_hessian,
        "--saliency-norm": None if prune.saliency_norm == default.saliency_norm else prune.saliency_norm,
        "--saliency-spike": config.guard.saliency_spike,
        "--final-align": aligned,
    }
    for flag, value in given.items():
        if value is not None:
            yield f"{flag} {value} has nothing to choose under --replay {ledger}: drop one of them"
    if set(prune.prune_axes) != set(PRUNE_AXES):
        yield (
            f"--prune-axes {','.join(prune.prune_axes)} says nothing of --replay {ledger}, which removes what it "
            "holds: drop one of them"
        )
    own = None if config.run.directory is None else Path(config.run.directory, _OWN_LEDGER)
    if own is not None and os.path.abspath(own) == os.path.abspath(ledger):
        yield f"--replay {ledger} is the ledger that this run writes: give another --save"


def _ema(config: Config, beta: float) -> Iterator[str]:
    prune = config.prune
    if not 0 < beta < 1:
        yield f"--saliency-ema {beta:g} is the weight of what was measured before: between 0 and 1, such as 0.9"
    others = {
        "--prune-metric random": prune.prune_metric == "random",
        f"--replay {prune.replay}": prune.replay is not None,
        "--few-shot-samples": config.baseline.few_shot_samples is not None,
        "--sheared-iters": config.baseline.sheared_iters is not None,
    }
    for flag, given in others.items():
        if given:
            yield f"--saliency-ema {beta:g} has nothing to average under {flag}: drop it"


def _gqa(config: Config, arch: Architecture) -> Iterator[str]:
    prune = config.prune
    shared = any(size > 1 for groups in arch.kv_groups for size in groups)
    counted = {
        "--target-latency-ms": prune.target_latency_ms,
        "--target-kv-bytes": prune.target_kv_bytes,
        "--prune-cost": prune.prune_cost if prune.prune_cost in ("latency", "kv-bytes") else None,
    }
    if prune.gqa_mode == "balanced":
        if not arch.uniform_kv:
            yield (
                "--gqa-mode balanced needs a source with the same number of query heads under every K/V head, which "
                "this one has not: use cluster"
            )
        elif prune.target_shape is not None and prune.replay is None:
            heads = parse_shape(prune.target_shape).resolve(arch)[2]
            passed = reachable_heads(arch, "balanced")
            if heads <= arch.num_attention_heads and heads not in passed:
                yield (
                    f"--target-shape heads={heads} is never reached by --gqa-mode balanced from "
                    f"{arch.num_attention_heads} heads on {arch.num_query_groups} K/V heads: use one of "
                    + ", ".join(map(str, reversed(passed[:-1])))
                )
    elif shared and "attention" in prune.prune_axes:
        for flag, value in counted.items():
            if value is not None:
                yield (
                    f"{flag} {value} counts the K/V heads of the export, and --gqa-mode cluster repeats those of a "
                    "grouped source in it: give --gqa-mode balanced"
                )


def _order(config: Config, arch: Architecture) -> Iterator[str]:
    prune = config.prune
    if prune.order is None or prune.target_shape is None:
        return
    goal = parse_shape(prune.target_shape).resolve(arch)
    widths = (arch.hidden_size, arch.ffn_hidden_size, arch.num_attention_heads)
    shrinking = {
        axis for axis, least, most in zip(("stem", "ffn", "attention"), goal, widths, strict=True) if least < most
    }
    missing = sorted(shrinking - set(prune.order))
    if missing:
        yield f"--trajectory {','.join(prune.order)} lacks {missing[0]}, which --target-shape shrinks: add it"


def _kv_bytes(config: Config, arch: Architecture) -> Iterator[str]:
    prune = config.prune
    if heads_within_kv_bytes(prune, arch) == arch.num_attention_heads:
        have = f"{arch.kv_bytes_per_token():,} bytes a token"
        yield f"--target-kv-bytes {prune.target_kv_bytes} is not below the source's {have}: ask for less"
