"""What a run will take before it is started: units, tokens, parameters, memory per GPU, GPU-hours, and what fits.

    python tools/plan.py --config examples/smollm_1.7b_to_457m.yaml
    python tools/plan.py --config examples/smollm_1.7b_to_457m.yaml --target-shape hidden=1195,ffn=3006,heads=19 \\
        --gpus 32 --tokens-per-second 9200
    python tools/plan.py --config examples/llama2_7b.yaml --gpus 32 --gpu-memory 40 --layouts
    python tools/plan.py --source-shape hidden=2048,ffn=8192,heads=32,head_dim=64,layers=24,vocab=49152,tied=1 \\
        --target-shape hidden=1195,ffn=3006,heads=19 --prune-ratio 1:9 --batch-tokens 1048576 --json
    python tools/plan.py --source /models/SmolLM-1.7B --target-shape hidden=1195,ffn=3006,heads=19 \\
        --write-config runs/shapes

The last one also writes what to train from random weights beside such a pruned model: DIR/hidden_only, DIR/uniform and,
of a target shape, DIR/searched, each a --source without weights.
Every setting of a run is accepted too (--target-params, --export-at, --tensor-model-parallel-size, ...: see
`pretrain_prune.py --help`); no model, data or GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from megatron_prune.architecture import Architecture
from megatron_prune.config import (
    Config,
    load_config,
    parse_count,
    parse_shape,
    parse_source_shape,
    shape_between,
    validate_against_source,
)
from megatron_prune.config.validate import setting_problems
from megatron_prune.errors import EXIT_BAD_INPUT, ConfigError, UserError
from megatron_prune.layouts import all_layouts, fit_sentence, format_layouts, layout_dict, layouts_dict, make_layout
from megatron_prune.memory import GIB
from megatron_prune.plan import format_plan, make_plan, plan_dict


def main(argv: list[str]) -> int:
    """Prints the plan; returns the exit code."""
    own, run_flags = _arguments().parse_known_args(argv)
    try:
        _check_numbers(own)
        config = load_config(run_flags)
        problems = setting_problems(config, own.gpus or config.parallel.model_parallel_size)
        if problems:
            raise ConfigError(problems)
        source = _source(config)
        validate_against_source(config, source)
        print(_report(own, config, source))
        if own.write_config is not None:
            print(_write_baselines(Path(own.write_config), config, source))
    except UserError as error:
        print(f"plan.py: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--batch-tokens", type=int, help="tokens per step (default: global batch x sequence length)")
    parser.add_argument("--tokens-per-second", type=float, help="throughput of one GPU, for GPU-hours")
    parser.add_argument(
        "--gpus", type=int, help="all GPUs of the run (default: as many as one copy of the model takes)"
    )
    parser.add_argument(
        "--gpu-memory", type=float, default=80.0, help="GiB of one GPU (default: 80); a tenth is kept free"
    )
    parser.add_argument("--layouts", action="store_true", help="print every layout of these GPUs and what fits")
    parser.add_argument(
        "--write-config", metavar="DIR", help="write shapes of the target's size for direct pretraining there"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def _check_numbers(own: argparse.Namespace) -> None:
    for name in ("batch_tokens", "tokens_per_second", "gpus", "gpu_memory"):
        value = getattr(own, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"--{name.replace('_', '-')} {value} must be above 0")


def _report(own: argparse.Namespace, config: Config, source: Architecture) -> str:
    """What to print.

    Raises:
        UserError: the layout does not go with the GPUs or the model.
    """
    gpus, gpu_bytes = own.gpus or config.parallel.model_parallel_size, own.gpu_memory * GIB
    if own.layouts and not own.json:
        return format_layouts(all_layouts(config, source, gpus), gpu_bytes)
    plan = make_plan(
        config,
        source,
        num_gpus=gpus,
        batch_tokens=own.batch_tokens,
        tokens_per_second=own.tokens_per_second,
    )
    verdict = fit_sentence(config, source, gpus, gpu_bytes)
    if not own.json:
        return f"{format_plan(plan)}\n{verdict}"
    layout = make_layout(config, source, gpus)
    found = plan_dict(plan) | {
        "layout": layout_dict(layout),
        "gpu_memory": int(gpu_bytes),
        "fits": layout.fits(gpu_bytes, config.train.recompute),
        "verdict": verdict,
    }
    if own.layouts:
        found["layouts"] = layouts_dict(all_layouts(config, source, gpus), gpu_bytes)
    return json.dumps(found)


def _write_baselines(directory: Path, config: Config, source: Architecture) -> str:
    """Write the shapes of direct pretraining; returns a line about each.

    Raises:
        UserError: there is no target, or no such shape.
    """
    from megatron_prune.baselines import baseline_shapes, write_config  # imports torch, as above
    from megatron_prune.checkpoint.hf import copy_companions, read_config

    target, params, mode = config.prune.target_shape, config.prune.target_params, config.prune.gqa_mode
    searched = None if target is None else parse_shape(target).resolve(source)
    if params is None and searched is None:
        raise UserError("--write-config needs the size of the models: give --target-params or --target-shape")
    budget = shape_between(source, *searched, mode).num_parameters() if searched else parse_count(params or "")
    home = Path(config.model.source or "")
    is_here = (home / "config.json").is_file()
    lines = []
    for name, arch in baseline_shapes(source, budget, searched, mode).items():
        write_config(directory / name, arch, read_config(home) if is_here else {})
        if is_here:
            copy_companions(home, directory / name, config.model.tokenizer)
        widths = f"hidden {arch.hidden_size}, ffn {arch.ffn_hidden_size}, heads {arch.num_attention_heads}"
        lines.append(f"{directory / name}: {widths}, {arch.num_query_groups} KV, {arch.num_parameters():,} parameters")
    return "\n".join(lines)


def _source(config: Config) -> Architecture:
    """The source's shape: from the model where it is on this machine, else from ``--source-shape``."""
    source = config.model.source
    if source is not None and Path(source).is_dir():
        from megatron_prune.checkpoint.hf import read_architecture  # imports torch, which a plan can do without

        return read_architecture(Path(source))
    if config.model.source_shape is not None:
        return parse_source_shape(config.model.source_shape)
    where = "no --source is given" if source is None else f"{source} is no directory here"
    raise UserError(
        f"{where}: give --source-shape hidden=...,ffn=...,heads=...,layers=...,vocab=... to plan without it"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
