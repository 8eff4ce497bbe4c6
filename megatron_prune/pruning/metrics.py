"""The metrics by their names (method table; LLM-Pruner's in brackets).

``taylor`` [``param_first``] is ``|w * g|``: the first-order term of the paper's Eq. 9 with the abs taken per element,
as LLM-Pruner's code does by default. ``magnitude`` is ``|w|``. ``random`` is a hash of the seed and reads no weight.
"""

from __future__ import annotations

from typing import Literal

from megatron_prune.ops.saliency import Kind

Metric = Literal["taylor", "magnitude", "random"]


def element_score(metric: Metric) -> Kind:
    """The element score that a metric sums; every one but ``random`` has one."""
    return {"taylor": Kind.TAYLOR, "magnitude": Kind.MAGNITUDE}[metric]
