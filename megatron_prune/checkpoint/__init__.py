"""Weights on disk: Hugging Face directories in and out, and the run's own sharded checkpoints."""
