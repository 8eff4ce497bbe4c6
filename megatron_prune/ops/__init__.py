"""The model's hot operations, each in several implementations chosen once per run.

``dispatch`` picks; the other modules hold one operation each. Nothing here knows of layers or processes.
"""

from __future__ import annotations

from megatron_prune.ops.dispatch import OpChoice, Ops, build_ops, format_choices, parse_forced, torch_ops

__all__ = ["OpChoice", "Ops", "build_ops", "format_choices", "parse_forced", "torch_ops"]
