"""From an export to where it runs: 8-bit weights, latency, other runtimes and what each of them accepts."""
