"""What a run will take before it is started: units, tokens, parameters, memory per GPU, GPU-hours.

    python tools/plan.py --config examples/smollm_1.7b_to_457m.yaml
    python tools/plan.py --config examples/smollm_1.7b_to_457m.yaml --target-shape hidden=1195,ffn=3006,heads=19 \\
        --gpus 32 --tokens-per-second 9200
    python tools/plan.py --source-shape hidden=2048,ffn=8192,heads=32,head_dim=64,layers=24,vocab=49152,tied=1 \\
        --target-shape hidden=1195,ffn=3006,heads=19 --prune-ratio 1:9 --batch-tokens 1048576 --json

Every setting of a run is accepted too (--target-params, --export-at, --micro-batch-size, ...: see
`pretrain_prune.py --help`); no model, data or GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_prune.architecture import Architecture
from megatron_prune.config import Config, load_config, parse_source_shape, validate_against_source
from megatron_prune.config.validate import pruning_problems
from megatron_prune.errors import EXIT_BAD_INPUT, ConfigError, UserError
from megatron_prune.plan import format_plan, make_plan, plan_dict


def main(argv: list[str]) -> int:
    """Prints the plan; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--batch-tokens", type=int, help="tokens per step (default: global batch x sequence length)")
    parser.add_argument("--tokens-per-second", type=float, help="throughput of one GPU, for GPU-hours")
    parser.add_argument("--gpus", type=int, default=1, help="data parallel GPUs (default: 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    own, run_flags = parser.parse_known_args(argv)
    try:
        for flag, value in vars(own).items():
            if value is not None and flag != "json" and value <= 0:
                raise UserError(f"--{flag.replace('_', '-')} {value} must be above 0")
        config = load_config(run_flags)
        problems = pruning_problems(config)
        if problems:
            raise ConfigError(problems)
        source = _source(config)
        validate_against_source(config, source)
    except UserError as error:
        print(f"plan.py: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    plan = make_plan(
        config,
        source,
        num_gpus=own.gpus,
        batch_tokens=own.batch_tokens,
        tokens_per_second=own.tokens_per_second,
    )
    print(json.dumps(plan_dict(plan)) if own.json else format_plan(plan))
    return 0


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
