#!/usr/bin/env python3
"""Prune a language model while pretraining it.

    deepspeed pretrain_prune.py --config examples/smollm_1.7b_to_457m.yaml --data-path ... --save runs/457m

Also starts under ``torchrun``, ``srun python`` and plain ``python`` (one process). ``--help`` explains every flag.
"""

import sys

from megatron_prune.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
