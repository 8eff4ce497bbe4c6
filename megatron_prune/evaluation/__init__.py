"""How good a model is: cloze questions from held-out text, and the likelihoods that answer them."""
