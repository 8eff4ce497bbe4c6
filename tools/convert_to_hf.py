#!/usr/bin/env python
"""Export a run's newest checkpoint as a Hugging Face model that stock transformers loads.

    python tools/convert_to_hf.py --load runs/457m --save exported/457m

The export is reloaded and compared with the checkpoint, weights bit for bit and logits in fp32, before it is called
done. Tokenizer and token ids come with it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_prune.checkpoint.run_export import DTYPES, export_run
from megatron_prune.errors import EXIT_BAD_INPUT, EXIT_FAILURE, MegatronPruneError, UserError

BYTES_PER_GB = 10**9


def main(argv: Sequence[str] | None = None) -> int:
    """Export; returns the exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=Path, required=True, metavar="RUN", help="run directory (what --save was)")
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help="where the model goes")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the stored weights; default: the run's precision")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="largest weights file in GB (default: 5)")
    options = parser.parse_args(argv)
    try:
        _export(options.load, options.save, options.dtype, int(options.max_shard_gb * BYTES_PER_GB))
    except MegatronPruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_FAILURE
    return 0


def _export(run_dir: Path, directory: Path, dtype: str | None, max_shard_bytes: int) -> None:
    if max_shard_bytes < 1:
        raise UserError("--max-shard-gb must be above 0; the default of 5 suits most hubs")
    done = export_run(run_dir, directory, dtype, max_shard_bytes)
    report, verified, arch = done.report, done.verified, done.architecture
    print(
        f"{directory}: {report.hf_class}, {report.num_parameters:,} parameters in {report.dtype}, "
        f"hidden {arch.hidden_size}, ffn {arch.ffn_hidden_size}, heads {arch.num_attention_heads} (step {done.step})"
    )
    if report.expanded_kv:
        print("K/V heads were repeated, one per query head: stock GQA cannot express groups of different size")
    print(
        f"verified: {verified.num_tensors} tensors equal bit for bit, logits within "
        f"{verified.max_abs_logit_difference:.1e} of transformers'"
    )


if __name__ == "__main__":
    sys.exit(main())
