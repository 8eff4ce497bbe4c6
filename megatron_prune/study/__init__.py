"""The paper's comparisons in miniature: many small runs of the trainer, their results, and the page made of them."""
