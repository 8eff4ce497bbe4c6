"""The metrics by their names (method table; LLM-Pruner's in brackets), and what each has to know of a step.

==============================  ============================================  =================================
name                            element score                                 needs
==============================  ============================================  =================================
``taylor`` [``param_first``]    ``|w g|``                                     the step's gradient
``taylor-mixed`` [``param_mix``]  ``|-w g + w^2 H / 2|`` (Eq. 9)              gradient and Hessian diagonal
``diag-hessian`` [``param_second``]  ``w^2 H / 2``                            Hessian diagonal
``vectorize``                   abs of the sum of ``w g`` over the group      the step's gradient
``wanda``                       ``|w_ij| * ||X_j||``                          norms of the layer's inputs
``obc``                         ``w_ij^2 / [H^-1]_jj``, a head by its block   ``H = X X^T`` of the layer's inputs
``magnitude``                   ``|w|``                                       nothing
``random``                      hash of the seed                              nothing
==============================  ============================================  =================================

``taylor`` takes the abs per element, as LLM-Pruner's code does by default.
"""

from __future__ import annotations

from typing import Literal

from megatron_prune.ops.saliency import Kind

Metric = Literal["taylor", "taylor-mixed", "diag-hessian", "vectorize", "wanda", "obc", "magnitude", "random"]
#: Where the diagonal of the Hessian comes from: squared gradients of micro-batches, or Adam's second moment.
Diagonal = Literal["fisher", "adam"]


def element_score(metric: Metric) -> Kind:
    """The element score that the kernels sum for a metric; ``wanda``, ``obc`` and ``random`` have none of these."""
    return {
        "taylor": Kind.TAYLOR,
        "taylor-mixed": Kind.TAYLOR_MIXED,
        "diag-hessian": Kind.DIAG_HESSIAN,
        "vectorize": Kind.SIGNED,
        "magnitude": Kind.MAGNITUDE,
    }[metric]


def uses_hessian_diagonal(metric: Metric) -> bool:
    """True if fragments need their ``hessian``."""
    return metric in ("taylor-mixed", "diag-hessian")
