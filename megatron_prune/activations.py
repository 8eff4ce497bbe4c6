"""Memory of one GPU beyond the model itself: what the passes over a micro-batch keep, and what they work with.

Counted for the implementations a GPU gets without further libraries: PyTorch's fused norm and flash attention, our
activation, the loss that never holds all logits. The sums follow the code (:mod:`megatron_prune.model`,
:mod:`~megatron_prune.parallel.linear_loss`), storages counted once; tests hold them to what is really alive.
"""

from __future__ import annotations

import dataclasses

from megatron_prune.architecture import Architecture

FP32_BYTES = 4
#: Of ``parallel/linear_loss.py``, on a GPU. Repeated: it imports torch, which a plan can do without; a test compares.
CHUNK_BYTES, LEAST_CHUNK = 512 << 20, 128
#: A token's id, its row on this rank and whether it is there, in int64, bool and their intermediate values.
LABEL_BYTES = 4 * 8


@dataclasses.dataclass(frozen=True)
class Stage:
    """One pipeline stage on its fullest rank.

    Attributes:
        shard: widths of the rank, see :func:`~megatron_prune.memory.rank_shard`.
        layers: its decoder layers.
        first: it has the embedding.
        last: it has the last norm, the output head and the loss.
        in_flight: micro-batches that have gone forward and not yet back; 1 on the last stage.
        tokens: of one micro-batch.
        stem_tokens: those of them whose hidden state the rank keeps: all, or its part under sequence parallelism.
        element_bytes: of a weight and an activation.
        dead_heads: some rank has a place for a query head and no head in it.
        chunk_bytes: fp32 logits that exist at a time.
    """

    shard: Architecture
    layers: range
    first: bool
    last: bool
    in_flight: int
    tokens: int
    stem_tokens: int
    element_bytes: int
    dead_heads: bool = False
    chunk_bytes: int = CHUNK_BYTES

    @property
    def hidden(self) -> int:
        """Bytes of the hidden state of every token."""
        return self.tokens * self.shard.hidden_size * self.element_bytes

    @property
    def stem(self) -> int:
        """Bytes of the hidden state between blocks."""
        return self.stem_tokens * self.shard.hidden_size * self.element_bytes


def activation_bytes(stage: Stage, recompute: bool) -> int:
    """The most that one stage holds beside the model between the start of a step and its optimizer, in bytes.

    That is, for every micro-batch in flight, what its layers keep, and for one of them the larger of what the loss
    works with and what a layer's backward pass works with. With recomputation a layer keeps its input alone, and the
    layer that goes back is whole.

    Args:
        stage: what is where.
        recompute: keep layer inputs alone.
    """
    layers = [(layer_bytes(stage, layer), backward_bytes(stage, layer)) for layer in stage.layers]
    if recompute:
        kept = len(layers) * stage.stem
        back = max(whole - stage.stem + work for whole, work in layers)
    else:
        kept, back = sum(whole for whole, _ in layers), max(work for _, work in layers)
    if _ties(stage):
        back += stage.element_bytes * stage.shard.vocab_size * stage.shard.hidden_size  # waits for the embedding's
    others = (stage.in_flight - 1) * kept + _pipeline_bytes(stage)
    end = embedding_bytes(stage) if stage.first else 0  # when this micro-batch keeps nothing more
    if not stage.last:
        return others + max(kept + back, end)
    # The last norm's input, until it has gone back; its output, and in DeepSpeed's buffers that of the one before.
    return others + 2 * stage.hidden + max(kept + max(back, stage.stem + loss_bytes(stage)), end)


def layer_bytes(stage: Stage, layer: int) -> int:
    """What a decoder layer keeps for its backward pass, in bytes.

    Per token, in elements: 4 hidden (inputs and outputs of the two norms), 3 ffn (gate, up, their product), and of
    attention 3 query and 3 KV widths: the joined product of q, k and v, which lives as long as v, q and k after the
    rotation, and the output. KV heads that serve different numbers of queries are copied for each query instead, which
    makes 4 query widths; from the first removal of a head on that is the rule in grouped attention, so the larger of
    both is counted. Where a place for a head is empty its output is blanked, in one query width more. Sequence
    parallelism divides the inputs of the norms alone: their outputs are kept as the blocks multiply them, gathered.
    The rotation's tables and the statistics of norms and softmax (fp32) are small.
    """
    shard = stage.shard
    heads, kv_heads = shard.num_attention_heads, shard.num_kv_heads(layer)
    query, kv = heads * shard.head_dim, kv_heads * shard.head_dim
    attention = max(3 * query + 3 * kv, 4 * query) + (query if stage.dead_heads else 0) + 2 * shard.head_dim
    statistics = heads + 2 + (heads + kv_heads if shard.qk_norm else 0)
    inner = stage.element_bytes * (attention + 3 * shard.ffn_hidden_size) + FP32_BYTES * statistics
    return 2 * stage.stem + 2 * stage.hidden + stage.tokens * inner


def backward_bytes(stage: Stage, layer: int) -> int:
    """What the backward pass of a layer works with beyond what it kept, in bytes.

    The gradient of the hidden state twice, and the largest of three: 2 ffn per token; one gradient of joined weights,
    and in bf16 that of one of them in fp32, as it is added to its sum; in attention the gradients of its output, q, k
    and v (grouped: first one per query of k and v), when what the MLP kept is free again.
    """
    shard, element, added = stage.shard, stage.element_bytes, _added_bytes(stage)
    query, kv = shard.num_attention_heads * shard.head_dim, shard.num_kv_heads(layer) * shard.head_dim
    mlp = 2 * stage.tokens * shard.ffn_hidden_size
    joined = max((2 * element + added) * shard.ffn_hidden_size, element * (query + 2 * kv) + added * query)
    attention = stage.tokens * (2 * query + 2 * kv + (2 * query if kv < query else 0) - 3 * shard.ffn_hidden_size)
    shared = max(element * mlp, joined * shard.hidden_size)
    return 2 * stage.hidden + max(shared, element * attention - stage.hidden - stage.stem)


def embedding_bytes(stage: Stage) -> int:
    """What the end of a backward pass works with, in bytes: the whole gradient of the embedding, as its sum takes it.

    Besides, the gradient of the hidden state, and, where one process has both ends, that of a tied head.
    """
    each = stage.element_bytes * (2 if _ties(stage) else 1) + _added_bytes(stage)
    return stage.hidden + each * stage.shard.vocab_size * stage.shard.hidden_size


def loss_bytes(stage: Stage) -> int:
    """What the output projection and the loss work with, in bytes.

    The gradient of the weight in fp32 and that of the hidden state exist whole, logits a chunk at a time: in fp32 they
    are one buffer; in bf16 the products, and the logits in fp32, or, once they are gradients and back in bf16 in the
    place of the products, one product of the size of the weight.
    """
    shard, element = stage.shard, stage.element_bytes
    matrix = shard.vocab_size * shard.hidden_size
    chunk = min(stage.tokens, max(LEAST_CHUNK, stage.chunk_bytes // (FP32_BYTES * shard.vocab_size)))
    logits = chunk * shard.vocab_size
    wide = element == FP32_BYTES
    work = FP32_BYTES * logits if wide else max((element + FP32_BYTES) * logits, element * (logits + matrix))
    return FP32_BYTES * matrix + stage.hidden + work + element * chunk * shard.hidden_size + LABEL_BYTES * stage.tokens


def _ties(stage: Stage) -> bool:
    return stage.first and stage.last and stage.shard.tie_embeddings


def _added_bytes(stage: Stage) -> int:
    """Of a gradient's element in fp32 while it is added to its sum; in fp32 itself there is no other."""
    return 0 if stage.element_bytes == FP32_BYTES else FP32_BYTES


def _pipeline_bytes(stage: Stage) -> int:
    """Hidden states that lie in DeepSpeed's buffers between stages.

    Of every micro-batch in flight the input as received, beside the clone that the layers keep, and the output; then
    what is being received in either direction, and the gradient to be sent.
    """
    if stage.first and stage.last:
        return 0
    return stage.stem * (stage.in_flight * ((not stage.first) + (not stage.last)) + 3)
