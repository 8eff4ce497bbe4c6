"""One self-contained HTML page about a run: what ``tools/plot_run.py --html`` writes."""
