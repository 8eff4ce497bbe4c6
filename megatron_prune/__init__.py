"""megatron-prune: prune a language model while pretraining it (EfficientLLM, ACL 2026)."""

__version__ = "0.1.0"
