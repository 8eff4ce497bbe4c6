"""The settings of a run: one frozen dataclass per topic, each field with the sentence that ``--help`` prints.

A field is a flag (``global_batch_size`` -> ``--global-batch-size``) and a YAML key of the same name; the names are
Megatron's where Megatron has the thing. This module holds no rule about the values: see ``validate``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Final, Literal

from tyro.constructors import PrimitiveConstructorSpec

#: The pruning axes in the order in which ties between them are settled.
PRUNE_AXES = ("attention", "ffn", "stem")

#: Names of metrics, those of LLM-Pruner and of the paper's tables among them.
PruneMetric = Literal[
    "taylor",
    "taylor-mixed",
    "diag-hessian",
    "vectorize",
    "wanda",
    "obc",
    "magnitude",
    "random",
    "param_first",
    "param_second",
    "param_mix",
    "diag-hess",
]

#: Other names of the same metrics.
METRIC_ALIASES: Final[Mapping[str, PruneMetric]] = MappingProxyType(
    {
        "param_first": "taylor",
        "param_second": "diag-hessian",
        "param_mix": "taylor-mixed",
        "diag-hess": "diag-hessian",
    }
)

#: What grouped-query attention makes of the query heads that go together.
GqaMode = Literal["cluster", "balanced"]

#: The word of ``--export-at`` for where pruning ends.
TARGET_MARK: Final = "target"

#: What a removal can save.
PruneCost = Literal["params", "flops", "latency", "kv-bytes"]


def split_commas(text: str) -> tuple[str, ...]:
    """Items of a comma separated list, blanks around them removed, empty ones dropped."""
    return tuple(item.strip() for item in text.split(",") if item.strip())


#: A tuple written as one comma separated word, on the command line and in YAML.
CommaList = Annotated[
    tuple[str, ...],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="A,B,...",
        instance_from_str=lambda args: split_commas(args[0]),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(value)],
    ),
]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What to start from."""

    source: str | None = None
    """Source model: a Hugging Face directory (config.json and safetensors) or a hub id. With a config.json and no
    weights the model starts from random weights, which is direct pretraining."""

    tokenizer: str | None = None
    """Tokenizer that goes with exports: a directory, tokenizer.json, sentencepiece model or hub id. Default: the
    source's. Data that is already tokenised does not need one."""

    source_shape: str | None = None
    """Shape of the source, for planning when it is not on this machine:
    hidden=2048,ffn=8192,heads=32,kv_heads=32,head_dim=64,layers=24,vocab=49152,tied=1. Checked against the source
    when the run starts."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    data_path: tuple[str, ...] = ()
    """Tokenised data, as prefixes of .bin/.idx pairs, each with a weight before it or none with one:
    220 data/fineweb 28 data/cosmopedia. Without weights, proportional to their tokens."""

    instruction_data: str | None = None
    """Instruction tuning in place of --data-path: a JSON file in Alpaca's format (instruction, input, output), one
    example a sample, loss on the response only. tools/finetune.py sets it and what goes with it."""

    split: str = "969,30,1"
    """Shares of every source for training, validation and test, in any unit."""

    seq_length: int = 2048
    """Tokens per sample."""


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate. Weight decay applies to tensors of two or more dimensions."""

    lr: float = 5e-4
    """Peak learning rate."""

    min_lr: float = 0.0
    """Learning rate at the end of the decay."""

    lr_decay_style: Literal["constant", "cosine", "WSD"] = "cosine"
    """Schedule after the warm-up; WSD stays at the peak and falls over the last --lr-wsd-decay-iters steps."""

    lr_warmup_iters: int = 500
    """Steps over which the learning rate rises linearly to its peak."""

    lr_wsd_decay_iters: int | None = None
    """Steps of the final decay; needed by WSD and meaningless elsewhere."""

    weight_decay: float = 0.1
    """Decoupled weight decay."""

    clip_grad: float = 1.0
    """Largest global gradient norm; 0 does not clip."""

    adam_beta1: float = 0.9
    """Decay of the first moment."""

    adam_beta2: float = 0.95
    """Decay of the second moment."""

    adam_eps: float = 1e-8
    """Term added to the denominator."""

    continue_lr: float | None = None
    """Peak learning rate of the second stage, the continued pretraining that follows once the target is met.
    Default: --lr."""

    continue_lr_warmup_iters: int | None = None
    """Warm-up steps of the second stage. Default: --lr-warmup-iters."""

    @property
    def continued_lr(self) -> float:
        """Peak learning rate of the second stage."""
        return self.lr if self.continue_lr is None else self.continue_lr

    @property
    def continued_warmup_iters(self) -> int:
        """Warm-up steps of the second stage."""
        return self.lr_warmup_iters if self.continue_lr_warmup_iters is None else self.continue_lr_warmup_iters


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, how large and in which arithmetic."""

    train_iters: int = 0
    """Optimizer steps of the run, both stages together."""

    micro_batch_size: int = 1
    """Samples per forward pass and process."""

    global_batch_size: int = 512
    """Samples per optimizer step over all processes."""

    seed: int = 1234
    """Seed of the data order and of random weights."""

    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of forward and backward; masters, moments and gradient sums are fp32 either way."""

    recompute: bool = False
    """Keep only each layer's input and recompute the rest in the backward pass: less memory, a third more work."""

    compile: bool = False
    """Compile the decoder layers with torch.compile. Every physical compaction compiles again: raise --prune-align so
    that there are few. Heads do not wait for it: without tensor parallelism every removal of a head compiles again."""

    grow_micro_batch: bool = False
    """Let --micro-batch-size grow as the model shrinks, at the same global batch: at every compaction to the largest
    multiple that divides a copy's samples and whose activations need no more memory than the source's did."""

    op_impl: tuple[str, ...] = ()
    """Force implementations, as OP=IMPLEMENTATION (rms_norm=torch); `python -m megatron_prune.ops` lists them."""


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How the processes share the model. What they do not split, they copy: processes / (tensor x pipeline) data
    parallel copies, with the optimizer's state divided over them (ZeRO-1). The layout changes the speed and the
    memory, never the result."""

    tensor_model_parallel_size: int = 1
    """Processes that split every layer's heads, FFN channels and the vocabulary; keep them inside one node. Any
    number goes with any number of heads."""

    pipeline_model_parallel_size: int = 1
    """Stages the layers are cut into, one after the other."""

    sequence_parallel: bool = False
    """Split the sequence over the tensor parallel processes wherever the hidden state is whole: less activation
    memory at the same traffic. --seq-length must be a multiple of --tensor-model-parallel-size."""

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model that ``world_size`` processes make."""
        return world_size // self.model_parallel_size


@dataclasses.dataclass(frozen=True)
class PruneConfig:
    """What to prune towards, and how. Without a target nothing is pruned: plain or continued pretraining."""

    target_params: str | None = None
    """Parameters to prune down to, embeddings included: 457M. The shape is searched."""

    target_shape: str | None = None
    """Shape to prune down to: hidden=1195,ffn=3006,heads=19. An axis left out keeps the source's width."""

    target_latency_ms: float | None = None
    """Milliseconds a decoded token to prune down to, at batch 1 after --seq-length tokens of context: what stock
    transformers takes for the export on the first process's device, measured on a grid of shapes when the run starts
    and kept in the run directory. The shape is searched."""

    target_kv_bytes: str | None = None
    """Bytes of KV cache per token of context to prune down to, in bf16: 20480, 40K. Only heads shrink."""

    prune_metric: PruneMetric = "taylor"
    """Saliency of a weight w with gradient g. taylor: abs(w*g). taylor-mixed: abs(-w*g + w*w*H/2). diag-hessian:
    w*w*H/2. vectorize: abs of the sum of w*g over a group. wanda: abs(w) times the norm of its input. obc:
    w*w / [inv(X X^T)]_jj with the layer's inputs X, a head by its block. magnitude: abs(w). random: a draw.
    LLM-Pruner's param_first, param_second and param_mix are taylor, diag-hessian and taylor-mixed; the paper's
    diag-hess is diag-hessian."""

    prune_hessian: Literal["fisher", "adam"] = "fisher"
    """The diagonal H of taylor-mixed and diag-hessian. fisher: mean square of the gradients of the step's
    micro-batches, for 4 bytes a parameter of o_proj and down_proj. adam: Adam's second moment before the step, free."""

    second_order: bool = False
    """Change the weights that stay as a group goes, so that each layer's outputs change least (optimal brain surgeon):
    layer by layer, with H = X X^T of the inputs of the step that decides. A tied head stays as it is."""

    prune_ratio: str = "1:9"
    """Pruned units : optimizer steps. A unit is one FFN channel; a head is head_dim units, a stem channel two."""

    prune_start_iter: int | None = None
    """Step after which pruning begins. Default: --lr-warmup-iters."""

    prune_axes: CommaList = PRUNE_AXES
    """Which axes may shrink, comma separated: attention (heads), ffn (channels), stem (hidden channels)."""

    saliency_norm: Literal["mean", "sum", "params", "flops"] = "mean"
    """How groups of different size are compared: mean per measured element, plain sum, or sum per parameter or per
    FLOP (of a training token) freed."""

    saliency_ema: float | None = None
    """Decide by an exponential mean of the saliency of the steps that prune, in which the earlier ones weigh so much:
    0.9. Without it every decision is of one batch."""

    prune_cost: PruneCost | None = None
    """Compare groups by their sum per unit of this cost freed, in place of --saliency-norm: params, flops, latency
    (measured as for --target-latency-ms) or kv-bytes (a query head counts for its share of its K/V head). What frees
    none goes only when nothing else may."""

    gqa_mode: GqaMode = "cluster"
    """Grouped-query attention. cluster: every layer gives its least salient query head, and a K/V head goes with its
    last query; exports repeat the K/V heads that serve several. balanced: one query head of every K/V head at once, or
    a whole K/V head when they have one query each; exports are as they are."""

    trajectory: CommaList = ("unified",)
    """unified lets all axes shrink together. An order, such as stem,attention,ffn, prunes each axis to --target-shape
    before the next begins."""

    replay: str | None = None
    """Ledger of another run whose removals to repeat, whatever the layout, the ratio or the --trajectory. Pruning ends
    with the ledger, or before it at a target."""

    final_align: int = 1
    """Let the search end only where hidden, ffn and heads x head_dim are multiples of this: once the target is met,
    each axis that is not goes on to the next multiple below and stops. 1 ends at the target."""

    prune_align: int = 64
    """Quantum of physical compaction: tensors are cut when a live width of the stem, or of one tensor parallel rank's
    share of the ffn, reaches a multiple of it, and whatever it is when the fullest rank has a head less (without tensor
    parallelism, at every removal of a head). 1 cuts at every event, 0 never. Also the least width of ffn and stem
    unless the target shape says lower."""

    export_at: CommaList = ()
    """Budgets at which to write a Hugging Face snapshot on the way down: 1.1B,800M. The word target is where pruning
    ends, whatever the target is."""

    def __post_init__(self) -> None:  # the rest of the program knows one name
        object.__setattr__(self, "prune_metric", METRIC_ALIASES.get(self.prune_metric, self.prune_metric))

    @property
    def active(self) -> bool:
        """True when the run prunes."""
        return self.replay is not None or bool(self.targets)

    @property
    def targets(self) -> dict[str, str]:
        """The targets that are set, as flag and value; at most one in a checked config."""
        names = ("target_params", "target_shape", "target_latency_ms", "target_kv_bytes")
        given = {f"--{name.replace('_', '-')}": getattr(self, name) for name in names}
        return {flag: str(value) for flag, value in given.items() if value is not None}

    @property
    def export_budgets(self) -> tuple[str, ...]:
        """The numbers of parameters among ``export_at``, as they were given."""
        return tuple(mark for mark in self.export_at if mark != TARGET_MARK)

    @property
    def order(self) -> tuple[str, ...] | None:
        """The forced order of the axes, or None when they shrink together."""
        return None if self.trajectory == ("unified",) else self.trajectory

    @property
    def needs_latency(self) -> bool:
        """True when something has to be timed."""
        return self.target_latency_ms is not None or self.prune_cost == "latency"


@dataclasses.dataclass(frozen=True)
class BaselineConfig:
    """What pruning while pretraining is compared with, run by the same trainer: at most one of the two, with a target.
    Both prune all at once; continued pretraining follows."""

    few_shot_samples: int | None = None
    """Prune before training: the gradient of so many samples, taken at the source's weights, decides every removal
    until the target is met. They are the first of the training order and count as consumed. --prune-ratio has no
    effect."""

    sheared_iters: int | None = None
    """Learn masks of heads, FFN and hidden channels for so many steps while training (ShearedLlama), with Lagrangian
    constraints that lead to --target-shape; over the last fifth of them the masks go to 0 and 1, then the tensors are
    cut."""

    sheared_lr: float = 0.3
    """Learning rate of the masks and, upwards, of the multipliers."""

    @property
    def prunes_at_once(self) -> bool:
        """True when all groups are removed in one go."""
        return self.few_shot_samples is not None or self.sheared_iters is not None


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Learn from the source while shrinking it: the frozen source runs beside the model on the same layout."""

    distill_weight: float = 0.0
    """Share W of the source's predictions in the loss, (1-W) * cross-entropy + W * T^2 * KL(source || model), in both
    stages. 0 needs no teacher. Validation reports the cross-entropy alone."""

    distill_temperature: float = 1.0
    """T: both models' logits are divided by it in the KL divergence."""


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """When a run doubts what it sees, and what it does then. A step whose gradient is not finite is always skipped and
    decides nothing."""

    max_skipped_steps: int = 10
    """Stop, with the last checkpoint as it is, after so many skipped steps in a row."""

    saliency_spike: float | None = None
    """Put a decision off for one step if the group to be removed scores above so many times the median of its type
    over the last removals: one bad batch says little about what is least salient. 10, say; the paper has none."""

    rollback_loss_jump: float | None = None
    """Go back to the last checkpoint, and on with the samples that come next, if the loss is so many nats above its
    running median while groups are being removed. After three times the run stops. 1.0, say."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Where results go and how often."""

    save: str | None = None
    """Run directory: config, metrics, ledger, checkpoints, exports. Starting again with the same one resumes."""

    load: str | None = None
    """Run directory to resume from when --save holds no checkpoint of its own yet. Alone, it is --save too."""

    finetune: bool = False
    """Start from the weights of --load alone, in the shape they are pruned to: no optimizer state, counters, data
    position or ledger. Pruning may go on from there. Needs another --save."""

    save_interval: int = 1000
    """Steps between checkpoints; 0 saves only at the end and on a signal."""

    keep_last: int = 2
    """Checkpoints kept, 2 or more, so that one is always whole."""

    async_save: bool = False
    """Write checkpoints behind the next steps, from a copy in host memory (12 bytes per parameter a process's optimizer
    owns). Those at the end and on a signal are waited for."""

    on_save_failure: Literal["continue", "stop"] = "continue"
    """When a checkpoint cannot be written, a full disk say: continue, keeping the older ones and trying again at the
    next interval, or stop with exit code 1. At the end and on a signal it always fails the run."""

    log_interval: int = 10
    """Steps between lines of metrics."""

    eval_interval: int = 1000
    """Steps between validations; 0 never validates."""

    eval_iters: int = 10
    """Global batches per validation."""

    exit_duration_in_mins: float | None = None
    """Save, then stop with exit code 75 (requeue me) after so many minutes."""

    wandb_project: str | None = None
    """Log to this Weights & Biases project too."""

    tensorboard: bool = False
    """Log to TensorBoard too, under the run directory."""

    dry_run: bool = False
    """Check everything, print the plan, start nothing."""

    @property
    def directory(self) -> str | None:
        """The run directory: --save, or --load when only that is given."""
        return self.save if self.save is not None else self.load


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    prune: PruneConfig = PruneConfig()
    baseline: BaselineConfig = BaselineConfig()
    distill: DistillConfig = DistillConfig()
    guard: GuardConfig = GuardConfig()
    run: RunConfig = RunConfig()

    @property
    def batch_tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.train.global_batch_size * self.data.seq_length

    @property
    def prune_start_iter(self) -> int:
        """Step after which pruning begins; that of a baseline that prunes at once."""
        if self.baseline.prunes_at_once:
            return self.baseline.sheared_iters or 0
        start = self.prune.prune_start_iter
        return self.optim.lr_warmup_iters if start is None else start
