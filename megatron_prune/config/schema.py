"""The settings of a run: one frozen dataclass per topic, each field with the sentence that ``--help`` prints.

A field is a flag (``global_batch_size`` -> ``--global-batch-size``) and a YAML key of the same name; the names are
Megatron's where Megatron has the thing. This module holds no rule about the values: see ``validate``.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from tyro.constructors import PrimitiveConstructorSpec

#: The pruning axes in the order in which ties between them are settled.
PRUNE_AXES = ("attention", "ffn", "stem")


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

    prune_metric: Literal["taylor", "param_first", "magnitude", "random"] = "taylor"
    """Saliency of a weight: taylor is abs(w*g); param_first is LLM-Pruner's name for it."""

    prune_ratio: str = "1:9"
    """Pruned units : optimizer steps. A unit is one FFN channel; a head is head_dim units, a stem channel two."""

    prune_start_iter: int | None = None
    """Step after which pruning begins. Default: --lr-warmup-iters."""

    prune_axes: CommaList = PRUNE_AXES
    """Which axes may shrink, comma separated: attention (heads), ffn (channels), stem (hidden channels)."""

    saliency_norm: Literal["mean", "sum", "params"] = "mean"
    """How groups of different size are compared: mean per measured element, plain sum, or sum per parameter freed."""

    prune_align: int = 64
    """Quantum of physical compaction: tensors are cut when a live width of the stem, or of one tensor parallel rank's
    share of the ffn, reaches a multiple of it, and whatever it is when the fullest rank has a head less (without tensor
    parallelism, at every removal of a head). 1 cuts at every event, 0 never. Also the least width of ffn and stem
    unless the target shape says lower."""

    export_at: CommaList = ()
    """Budgets at which to write a Hugging Face snapshot on the way down: 1.1B,800M."""

    def __post_init__(self) -> None:
        if self.prune_metric == "param_first":  # an alias: the rest of the program knows one name
            object.__setattr__(self, "prune_metric", "taylor")

    @property
    def active(self) -> bool:
        """True when the run prunes."""
        return self.target_params is not None or self.target_shape is not None


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
    guard: GuardConfig = GuardConfig()
    run: RunConfig = RunConfig()

    @property
    def batch_tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.train.global_batch_size * self.data.seq_length

    @property
    def prune_start_iter(self) -> int:
        """Step after which pruning begins."""
        start = self.prune.prune_start_iter
        return self.optim.lr_warmup_iters if start is None else start
