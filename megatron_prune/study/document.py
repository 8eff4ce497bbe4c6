"""The page: docs/study.md and its figures, as a function of the results alone."""

from __future__ import annotations

import textwrap
from pathlib import Path

from megatron_prune.study.claims import first_paragraph, second_paragraph
from megatron_prune.study.figures import write_figures
from megatron_prune.study.results import Results
from megatron_prune.study.tables import (
    has_metrics,
    has_orders,
    has_ratios,
    metric_row,
    metrics_table,
    orders_table,
    same_as_taylor,
    schemes_table,
    shapes_table,
)
from megatron_prune.training.run_dir import replace_text

PAGE = "study.md"
LINE_LENGTH = 120
MARK = "<!-- Written by tools/study.py from results; change that, not this. -->"


def write_page(results: Results, docs: Path) -> Path:
    """Write the page and its figures; returns the path of the page."""
    write_figures(results, docs)
    path = docs / PAGE
    replace_text(path, page(results))
    return path


def page(results: Results) -> str:
    """The page's text."""
    parts = [MARK, "# Study: the paper's comparisons in miniature", first_paragraph(results), second_paragraph(results)]
    parts += [_setting(results), _schemes(results)]
    main = results.sources()[0]
    if has_metrics(results, main):
        parts += [_metrics(results, main)]
    if has_orders(results, main):
        parts += [_orders(results, main)]
    if has_ratios(results, main):
        parts += [_shapes(results, main)]
    return "\n\n".join(_wrapped(part) for part in [*parts, _saliency(results, main), _limits(results)]) + "\n"


def _wrapped(part: str) -> str:
    """Numbers make lines of any length; paragraphs are filled again, tables, lists and code stay as they are."""
    kept = ("```", "|", "#", "-", "!", "<", " ")
    blocks = part.split("\n\n")
    return "\n\n".join(block if block.startswith(kept) else textwrap.fill(block, LINE_LENGTH) for block in blocks)


def _setting(results: Results) -> str:
    settings, facts = results.facts["settings"], results.facts
    batch = settings["global_batch_size"] * settings["seq_length"]
    sources = "; ".join(
        f"`{name}` {results.of(name, None)[0]['models']['final']['parameters']:,} parameters after "
        f"{results.of(name, None)[0]['tokens']:,} tokens, {fact['made']}, pruned to {fact['budget']}"
        for name, fact in facts["sources"].items()
    )
    return f"""## What was run

```
make study        # examples/study/study.yaml; an interrupted study continues, a finished one writes this page
```

The text is the standard library of the Python that runs it. Sources: {sources}. Every row of a table was run with
{len(facts["seeds"])} seeds, which change the order of the text and any random weights; the source is the same for all.
A step has {batch:,} tokens, and a whole row {settings["train_iters"]} of them, both stages together. The source's own
tokens come on top for all rows but direct pretraining. Numbers are mean ± sample standard deviation over the seeds.

Held-out loss is in nats per token on {facts["evaluation"]["samples"]} samples of {settings["seq_length"]} tokens of the
last part of the text (split {facts["split"]}), measured on the export by stock transformers. The three cloze tasks have
{facts["evaluation"]["questions"]} questions each of the same held-out documents, in per cent of right answers (`acc` of
lm-evaluation-harness; four choices, chance is 25; one question is {100 / facts["evaluation"]["questions"]:.1f} points):
the word that follows, the name that follows among names nearby, how a line ends. Every run has one thread and comes
out the same again on the same machine."""


def _schemes(results: Results) -> str:
    parts = [
        """## Table 1: schemes at equal tokens

Direct pretraining starts from random weights at three times the learning rate. "Pruning" is the tokens after which
the last group went. Few-shot pruning's samples count as tokens of its row, which has as many optimizer steps less."""
    ]
    for source in results.sources():
        parts += [f"Source `{source}`:", schemes_table(results, source)]
    return "\n\n".join(parts)


def _metrics(results: Results, source: str) -> str:
    same = " and ".join(f"`{metric}`" for metric in same_as_taylor(results, source))
    agreement = (
        f" Every seed of {same} has the loss of `taylor` to the last digit: the same groups went." if same else ""
    )
    rate = results.facts["settings"]["lr"]
    return f"""## Table 2: metrics, alone and while training

Source `{source}`. Alone: all groups go at once, decided by
{results.facts["rows"].get("few-shot", {}).get("few_shot_samples", 128)} samples, and nothing is trained. Pruning-aware:
{results.facts["pruning"]["prune_ratio"]} pruned units to optimizer steps, and training to the same number of tokens in
every row, {results.of(source, metric_row("taylor", aware=True)[0])[0]["tokens"]:,}, at the constant rate {rate:g}. A
hidden channel counts two units and frees many parameters, so metrics that choose those are done pruning sooner, as the
last column says in tokens, and train the small model for longer.{agreement}

{metrics_table(results, source)}

![loss by metric](study_metrics.png)"""


def _orders(results: Results, source: str) -> str:
    return f"""## Table 6: trajectories

Source `{source}`. The forced orders prune to the shape that the unified search found with the same seed. No training
after the last removal.

{orders_table(results, source)}"""


def _shapes(results: Results, source: str) -> str:
    return f"""## Table 9 and Figure 3: shapes and tokens of pruning

Source `{source}`, budget {results.facts["sources"][source]["budget"]}. The loss is that of the pruned model, without
training after the last removal.

{shapes_table(results, source)}

![loss over the tokens of the pruning stage](study_tokens.png)"""


def _saliency(results: Results, source: str) -> str:
    seed = results.facts["seeds"][0]
    return f"""## Figure 5: saliency and shape while pruning

Source `{source}`, row `unified`, seed {seed}.

![saliency of the three candidates](study_saliency.png)

![shape over training](study_shape.png)"""


def _limits(results: Results) -> str:
    settings = results.facts["settings"]
    row = settings["train_iters"] * settings["global_batch_size"] * settings["seq_length"]
    shares = [f"{row / results.of(name, None)[0]['tokens']:.1%} of those of `{name}`" for name in results.sources()]
    return f"""## What this does not show

Models of this size on text of one kind say nothing about the same methods at a thousand times the size. The tokens of
a row are few, {" and ".join(shares)}: training from random weights has no time to catch up. Seeds vary the order of
the text, not the source, so the spread is that of the pruning and the training after it. The learning rates were not
tuned for each row. A given source may have seen other versions of the standard library."""
