"""Tests that need an NVIDIA GPU: none is collected without one, so that no suite reports tests it did not run."""

from __future__ import annotations

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
