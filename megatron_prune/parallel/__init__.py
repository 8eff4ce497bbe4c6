"""Where tensors live: process groups, collectives and the partition of every logical unit."""
