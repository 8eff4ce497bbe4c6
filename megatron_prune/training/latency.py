"""Milliseconds to decode a token in stock transformers, and the table of them that a latency budget goes by.

What is timed is what a user of the export will run: the family's own class in transformers, greedy decoding at batch
1, after so many tokens of context. A table is measured once, by the first process, and kept in the run directory: a
run that resumes decides by the same numbers.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from megatron_prune.architecture import Architecture
from megatron_prune.checkpoint.hf_config import hf_config_from_architecture
from megatron_prune.checkpoint.hf_quiet import quiet_transformers
from megatron_prune.config import Config, floor_shape, shape_between
from megatron_prune.config.targets import reachable_heads
from megatron_prune.errors import UserError
from megatron_prune.parallel.collectives import from_main
from megatron_prune.parallel.mesh import Mesh
from megatron_prune.pruning.cost import LatencyTable, knots_between

LATENCY_FILE: Final = "latency.json"
_POINTS: Final = 4  # along hidden and ffn, between which a time is bent more than a product: caches
_HEAD_POINTS: Final = 3
_ROUNDS: Final = 3  # over the grid: what disturbs one is hardly there in all
_WARM_UP: Final = 3  # tokens
_LEAST, _MOST, _SECONDS = 10, 60, 0.5  # tokens timed for one number

#: Milliseconds a token of a shape.
Timer = Callable[[Architecture], float]


def latency_table(config: Config, source: Architecture, mesh: Mesh, saved: Path | None) -> LatencyTable:
    """The table of a run: from its directory, else from the one it goes on from, else measured and written.

    Args:
        config: checked settings.
        source: the model that is pruned.
        mesh: of all processes; the first one reads or measures, the others get its table.
        saved: run directory of the checkpoint that the run goes on from, or None.
    """
    table: LatencyTable | None = None
    if mesh.is_main:
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        table = saved_table(config, source, saved)
        if table is None:
            table = measured_table(
                config, source, lambda arch: decode_ms(arch, config.data.seq_length, dtype, mesh.device)
            )
        write_table(_homes(config, saved)[0], table)
    shared: LatencyTable = from_main(table, mesh)
    return shared


def saved_table(config: Config, source: Architecture, saved: Path | None) -> LatencyTable | None:
    """The table that a run need not measure, from its directory or from the one it goes on from; None if there is none.

    Args:
        config: checked settings.
        source: the model that is pruned.
        saved: run directory of the checkpoint that the run goes on from, or None.

    Raises:
        UserError: there is one and it cannot be read.
    """
    about = about_table(config, source)
    found = map(read_table, _homes(config, saved))
    return next((table for table in found if table is not None and table.about == about), None)


def _homes(config: Config, saved: Path | None) -> list[Path]:
    return [Path(home) for home in (config.run.directory, saved) if home is not None]


def about_table(config: Config, source: Architecture) -> dict[str, Any]:
    """What a table depends on besides the machine: with any of it changed it is measured anew. JSON-ready."""
    about = {
        "source": source.to_dict(),
        "floor": floor_shape(config.prune, source),
        "gqa_mode": config.prune.gqa_mode,
        "context": config.data.seq_length,
        "precision": config.train.precision,
    }
    plain: dict[str, Any] = json.loads(json.dumps(about))
    return plain


def read_table(run_dir: Path) -> LatencyTable | None:
    """The table of a run directory, or None when it has none.

    Raises:
        UserError: there is one and it cannot be read.
    """
    path = run_dir / LATENCY_FILE
    if not path.exists():
        return None
    try:
        return LatencyTable.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no latency table ({error}); delete it to measure again") from error


def write_table(run_dir: Path, table: LatencyTable) -> None:
    """Keep a table in a run directory, whole or not at all."""
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = run_dir / f"{LATENCY_FILE}.tmp"
    temporary.write_text(json.dumps(table.to_dict(), indent=1))
    temporary.replace(run_dir / LATENCY_FILE)


def measured_table(config: Config, source: Architecture, timer: Timer) -> LatencyTable:
    """Time a grid of shapes between the source and the floor of its pruning, several times; the least counts."""
    floor, mode = floor_shape(config.prune, source), config.prune.gqa_mode
    counts = [count for count in reachable_heads(source, mode) if count >= floor[2]]
    wanted = knots_between(floor[2], source.num_attention_heads, _HEAD_POINTS)
    nearest = {min(counts, key=lambda count: abs(count - heads)) for heads in wanted}
    # Where K/V heads begin to go, the slope along the heads changes.
    bend = {source.num_query_groups} if mode == "balanced" and floor[2] < source.num_query_groups else set()
    knots = (
        knots_between(floor[0], source.hidden_size, _POINTS),
        knots_between(floor[1], source.ffn_hidden_size, _POINTS),
        tuple(sorted(nearest | bend)),
    )
    shapes = [shape_between(source, *widths, mode) for widths in itertools.product(*knots)]
    rounds = f"{len(shapes)} shapes, {_ROUNDS} times each"
    print(f"timing {rounds}: what else the machine does now ends up in {LATENCY_FILE}", flush=True)
    times = np.min([[timer(shape) for shape in shapes] for _ in range(_ROUNDS)], axis=0)
    return LatencyTable.of(knots, times.reshape([len(axis) for axis in knots]), about_table(config, source))


def decode_ms(arch: Architecture, context: int, dtype: torch.dtype, device: torch.device) -> float:
    """Milliseconds a token of a model of random weights.

    Args:
        arch: its shape.
        context: tokens before the one that is decoded.
        dtype: of the weights.
        device: to run on.
    """
    from transformers import AutoConfig, AutoModelForCausalLM  # seconds to import

    quiet_transformers()
    config = AutoConfig.for_model(**hf_config_from_architecture(arch, torch_dtype=str(dtype)[6:], extra={}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its table is no parameter
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 1e-3)
    return time_decoding(model, context)


@torch.inference_mode()
def time_decoding(model: Any, context: int) -> float:
    """Milliseconds in which a transformers model decodes one token at batch 1.

    The median of a few dozen tokens, as ``tools/benchmark_latency.py`` has it.

    Args:
        model: any causal language model of transformers, in evaluation or training mode.
        context: tokens of random keys and values in the cache before each.
    """
    from transformers import DynamicCache

    model.eval()
    config, device = model.config, model.device
    cache, token = DynamicCache(config=config), torch.zeros(1, 1, dtype=torch.long, device=device)
    shape = (1, config.num_key_value_heads, context, config.head_dim)
    for layer in range(config.num_hidden_layers):
        keys = torch.randn(shape, dtype=model.dtype, device=device)
        cache.update(keys, torch.randn_like(keys), layer)
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < _WARM_UP + _LEAST or (len(times) < _WARM_UP + _MOST and time.perf_counter() - start < _SECONDS):
        before = time.perf_counter()
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        int(logits[0, -1].argmax())  # waits for the device, as a decoder must
        times.append(time.perf_counter() - before)
        cache.crop(-1)
    return 1e3 * statistics.median(times[_WARM_UP:])
