"""The method of section 3, brute force: full autograd in float64, Python loops, rows and columns really deleted.

Written from the paper and sharing no code with the package, so that the two can only agree by being right. It is
slow on purpose: every sum the paper writes is a loop one can read beside the paper. A model is a dictionary of
float64 tensors under their Hugging Face names, ``[out, in]``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Event = dict[str, Any]


class Reference:
    """A tiny Llama that is pruned one mini-group at a time.

    Biases and per-head q/k norms are used where ``weights`` has them.

    Args:
        weights: every tensor by Hugging Face name, float64; a tied head is absent. Copied.
        num_layers: decoder layers.
        num_heads: query heads of every layer.
        kv_groups: for every layer, how many consecutive query heads read each KV head.
        head_dim: width of a head.
        eps: of every RMSNorm.
        rope_theta: base of the rotary wavelengths.
        tied: the output head is the embedding.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        num_layers: int,
        num_heads: int,
        kv_groups: Sequence[Sequence[int]],
        head_dim: int,
        eps: float,
        rope_theta: float,
        tied: bool,
    ) -> None:
        self.weights = {name: value.detach().to(torch.float64).clone() for name, value in weights.items()}
        self.num_layers = num_layers
        self.kv_groups = [list(groups) for groups in kv_groups]
        self.head_dim = head_dim
        self.eps = eps
        self.rope_theta = rope_theta
        self.tied = tied
        ffn = self.weights["model.layers.0.mlp.down_proj.weight"].shape[1]
        hidden = self.weights["model.embed_tokens.weight"].shape[1]
        # What is still there, as indices into the source model.
        self.alive_heads = [list(range(num_heads)) for _ in range(num_layers)]
        self.alive_ffn = [list(range(ffn)) for _ in range(num_layers)]
        self.alive_stem = list(range(hidden))
        self._sums: tuple[list[list[float]], list[list[float]], list[float]] | None = None

    # -- the model ---------------------------------------------------------------------------------------------

    def logits(self, tokens: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        """``[B, S]`` int64 to ``[B, S, V]`` float64."""
        w = self.weights if weights is None else weights
        x = w["model.embed_tokens.weight"][tokens]
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            x = x + self._attention(self._norm(x, w[prefix + "input_layernorm.weight"]), w, layer)
            x = x + self._mlp(self._norm(x, w[prefix + "post_attention_layernorm.weight"]), w, prefix)
        x = self._norm(x, w["model.norm.weight"])
        head = w["model.embed_tokens.weight"] if self.tied else w["lm_head.weight"]
        return x @ head.T

    def loss(self, tokens: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        """Mean next-token cross-entropy over all tokens of ``[B, S + 1]`` int64; a float64 scalar."""
        logits = self.logits(tokens[:, :-1], weights)
        log_normaliser = torch.logsumexp(logits, dim=-1)
        right = torch.gather(logits, 2, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)
        return (log_normaliser - right).mean()

    def gradients(self, tokens: Tensor) -> dict[str, Tensor]:
        """Gradient of :meth:`loss` for every tensor."""
        leaves = {name: value.clone().requires_grad_() for name, value in self.weights.items()}
        grads = torch.autograd.grad(self.loss(tokens, leaves), list(leaves.values()))
        return dict(zip(leaves, grads, strict=True))

    def _norm(self, x: Tensor, gain: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + self.eps) * gain

    def _project(self, x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
        y = x @ w[name + ".weight"].T
        return y + w[name + ".bias"] if name + ".bias" in w else y

    def _attention(self, x: Tensor, w: dict[str, Tensor], layer: int) -> Tensor:
        prefix, hd = f"model.layers.{layer}.self_attn.", self.head_dim
        q, k, v = (self._project(x, w, prefix + name) for name in ("q_proj", "k_proj", "v_proj"))
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        outputs, head = [], 0
        for kv, size in enumerate(self.kv_groups[layer]):
            k_head, v_head = k[..., kv * hd : (kv + 1) * hd], v[..., kv * hd : (kv + 1) * hd]
            if prefix + "k_norm.weight" in w:
                k_head = self._norm(k_head, w[prefix + "k_norm.weight"])
            k_head = self._rotate(k_head)
            for _ in range(size):
                q_head = q[..., head * hd : (head + 1) * hd]
                if prefix + "q_norm.weight" in w:
                    q_head = self._norm(q_head, w[prefix + "q_norm.weight"])
                scores = self._rotate(q_head) @ k_head.transpose(1, 2) / math.sqrt(hd)
                outputs.append(scores.masked_fill(~causal, -math.inf).softmax(dim=-1) @ v_head)
                head += 1
        return self._project(torch.cat(outputs, dim=-1), w, prefix + "o_proj")

    def _mlp(self, x: Tensor, w: dict[str, Tensor], prefix: str) -> Tensor:
        gate, up = self._project(x, w, prefix + "mlp.gate_proj"), self._project(x, w, prefix + "mlp.up_proj")
        return self._project(gate * torch.sigmoid(gate) * up, w, prefix + "mlp.down_proj")

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotary embedding: elements i and i + hd/2 are a complex number, turned by position * theta^(-2i/hd).

        The rates are rounded to fp32, as the published models define them.
        """
        half = self.head_dim // 2
        positions = torch.arange(x.shape[1], dtype=torch.float64)
        rates = torch.tensor([self.rope_theta ** (-2.0 * i / self.head_dim) for i in range(half)], dtype=torch.float32)
        turns = torch.exp(1j * positions[:, None] * rates[None, :].double())
        turned = torch.complex(x[..., :half], x[..., half:]) * turns
        return torch.cat([turned.real, turned.imag], dim=-1)

    # -- shape -------------------------------------------------------------------------------------------------

    @property
    def num_heads(self) -> int:
        """Query heads left in every layer."""
        return len(self.alive_heads[0])

    @property
    def ffn_hidden_size(self) -> int:
        """FFN channels left in every layer."""
        return len(self.alive_ffn[0])

    @property
    def hidden_size(self) -> int:
        """Stem channels left."""
        return len(self.alive_stem)

    def num_parameters(self) -> int:
        """Elements of all tensors there are."""
        return sum(value.numel() for value in self.weights.values())

    # -- the method --------------------------------------------------------------------------------------------

    def saliency(self, tokens: Tensor) -> tuple[list[list[float]], list[list[float]], list[float]]:
        """Sums of abs(w * g) over o_proj and down_proj: ``heads [L][H], ffn [L][F], stem [D]``.

        Indices count what is left. The sums are kept for :meth:`decide` until the next call.

        Args:
            tokens: the whole global batch, ``[B, S + 1]`` int64.
        """
        grads = self.gradients(tokens)
        heads: list[list[float]] = []
        ffn: list[list[float]] = []
        stem = [0.0] * self.hidden_size
        for layer in range(self.num_layers):
            o_name = f"model.layers.{layer}.self_attn.o_proj.weight"
            down_name = f"model.layers.{layer}.mlp.down_proj.weight"
            o_score = (self.weights[o_name] * grads[o_name]).abs().tolist()
            down_score = (self.weights[down_name] * grads[down_name]).abs().tolist()
            head_sums, channel_sums = [0.0] * self.num_heads, [0.0] * self.ffn_hidden_size
            for row in range(self.hidden_size):
                for column, score in enumerate(o_score[row]):
                    head_sums[column // self.head_dim] += score
                    stem[row] += score
                for column, score in enumerate(down_score[row]):
                    channel_sums[column] += score
                    stem[row] += score
            heads.append(head_sums)
            ffn.append(channel_sums)
        self._sums = (heads, ffn, stem)
        return [list(row) for row in heads], [list(row) for row in ffn], list(stem)

    def decide(
        self,
        target_parameters: int | None = None,
        floors: tuple[int, int, int] = (1, 1, 1),
    ) -> Event | None:
        """The mini-group of least mean saliency among those that may go, from the last :meth:`saliency`.

        Args:
            target_parameters: pruning ends at the first shape at or under it; None never ends by count.
            floors: smallest heads, FFN channels and stem channels (a target shape is given as floors).

        Returns:
            The event with ``shape`` and ``parameters`` as they will be after it, or None when nothing may go.
        """
        assert self._sums is not None, "saliency() first"
        count = self.num_parameters()
        if target_parameters is not None and count <= target_parameters:
            return None
        choices = self._choices(*self._sums)
        sizes = {"attention": self.num_heads, "ffn": self.ffn_hidden_size, "stem": self.hidden_size}
        open_types = [kind for kind, floor in zip(sizes, floors, strict=True) if sizes[kind] > floor]
        costs = {kind: self._cost(kind, choices[kind][1]) for kind in open_types}
        if target_parameters is not None and open_types:
            # How far each removal would land below the target; the smallest removal sets what is allowed.
            below = {kind: max(0, target_parameters - (count - costs[kind])) for kind in open_types}
            smallest = min(open_types, key=lambda kind: costs[kind])
            open_types = [kind for kind in open_types if below[kind] <= below[smallest]]
        best = None
        for kind in open_types:  # in the order of ties
            if best is None or choices[kind][0] < choices[best][0]:
                best = kind
        if best is None:
            return None
        sizes[best] -= 1
        positions = choices[best][1]
        return {
            "type": best,
            "removed": self._source_indices(best, positions),
            "scores": {kind: score for kind, (score, _) in choices.items()},
            "shape": {
                "hidden_size": sizes["stem"],
                "ffn_hidden_size": sizes["ffn"],
                "num_attention_heads": sizes["attention"],
            },
            "parameters": count - costs[best],
        }

    def remove(self, event: Event, also: Iterable[dict[str, Tensor]] = ()) -> None:
        """Delete a mini-group from every tensor, and strike its sums out of the last saliency.

        Args:
            event: what :meth:`decide` returned; only ``type`` and ``removed`` (source coordinates) are read.
            also: dictionaries shaped as the weights (Adam's moments, say), cut in place in the same way.
        """
        kind, removed = event["type"], event["removed"]
        tables = [self.weights, *also]
        if kind == "stem":
            position = self.alive_stem.index(removed)
            self._cut_stem(tables, position)
            del self.alive_stem[position]
            if self._sums is not None:
                del self._sums[2][position]
            return
        for layer in range(self.num_layers):
            alive = (self.alive_heads if kind == "attention" else self.alive_ffn)[layer]
            position = alive.index(removed[layer])
            if kind == "attention":
                self._cut_head(tables, layer, position)
            else:
                self._cut_channel(tables, layer, position)
            del alive[position]
            if self._sums is not None:
                heads, ffn, _ = self._sums
                del (heads if kind == "attention" else ffn)[layer][position]

    def _choices(
        self, heads: list[list[float]], ffn: list[list[float]], stem: list[float]
    ) -> dict[str, tuple[float, list[int]]]:
        """For each type its score (A, F, S) and the positions it would remove, ties to the lowest."""
        d, h, ff, hd, layers = self.hidden_size, self.num_heads, self.ffn_hidden_size, self.head_dim, self.num_layers
        least_heads = [_argmin(row) for row in heads]
        least_channels = [_argmin(row) for row in ffn]
        least_stem = _argmin(stem)
        attention = sum(heads[layer][least_heads[layer]] / (d * hd) for layer in range(layers)) / layers
        channel = sum(ffn[layer][least_channels[layer]] / d for layer in range(layers)) / layers
        return {
            "attention": (attention, least_heads),
            "ffn": (channel, least_channels),
            "stem": (stem[least_stem] / (layers * (h * hd + ff)), [least_stem]),
        }

    def _source_indices(self, kind: str, positions: list[int]) -> int | list[int]:
        if kind == "stem":
            return self.alive_stem[positions[0]]
        alive = self.alive_heads if kind == "attention" else self.alive_ffn
        return [alive[layer][position] for layer, position in enumerate(positions)]

    def _cost(self, kind: str, positions: list[int]) -> int:
        """Parameters that go with a mini-group, found by removing it from a copy."""
        trial = object.__new__(Reference)
        trial.__dict__.update(self.__dict__)
        trial.weights = dict(self.weights)
        trial.kv_groups = [list(groups) for groups in self.kv_groups]
        tables = [trial.weights]
        if kind == "stem":
            trial._cut_stem(tables, positions[0])
        for layer in range(self.num_layers):
            if kind == "attention":
                trial._cut_head(tables, layer, positions[layer])
            elif kind == "ffn":
                trial._cut_channel(tables, layer, positions[layer])
        return self.num_parameters() - trial.num_parameters()

    # -- deletion: Equations 4, 5 and 6 ------------------------------------------------------------------------

    def _cut_head(self, tables: list[dict[str, Tensor]], layer: int, position: int) -> None:
        prefix, hd = f"model.layers.{layer}.self_attn.", self.head_dim
        rows = range(position * hd, (position + 1) * hd)
        group, before = 0, 0
        while before + self.kv_groups[layer][group] <= position:
            before += self.kv_groups[layer][group]
            group += 1
        last_query = self.kv_groups[layer][group] == 1
        for table in tables:
            _delete(table, prefix + "q_proj.weight", 0, rows)
            _delete(table, prefix + "q_proj.bias", 0, rows)
            _delete(table, prefix + "o_proj.weight", 1, rows)
            for name in ("k_proj", "v_proj") if last_query else ():
                kv_rows = range(group * hd, (group + 1) * hd)
                _delete(table, prefix + name + ".weight", 0, kv_rows)
                _delete(table, prefix + name + ".bias", 0, kv_rows)
        self.kv_groups[layer][group] -= 1
        if last_query:
            del self.kv_groups[layer][group]

    def _cut_channel(self, tables: list[dict[str, Tensor]], layer: int, position: int) -> None:
        prefix, rows = f"model.layers.{layer}.mlp.", range(position, position + 1)
        for table in tables:
            for name in ("gate_proj", "up_proj"):
                _delete(table, prefix + name + ".weight", 0, rows)
                _delete(table, prefix + name + ".bias", 0, rows)
            _delete(table, prefix + "down_proj.weight", 1, rows)

    def _cut_stem(self, tables: list[dict[str, Tensor]], position: int) -> None:
        which = range(position, position + 1)
        for table in tables:
            _delete(table, "model.embed_tokens.weight", 1, which)
            _delete(table, "lm_head.weight", 1, which)
            _delete(table, "model.norm.weight", 0, which)
            for layer in range(self.num_layers):
                prefix = f"model.layers.{layer}."
                _delete(table, prefix + "input_layernorm.weight", 0, which)
                _delete(table, prefix + "post_attention_layernorm.weight", 0, which)
                inputs = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
                for name in inputs:
                    _delete(table, prefix + name + ".weight", 1, which)
                for name in ("self_attn.o_proj", "mlp.down_proj"):
                    _delete(table, prefix + name + ".weight", 0, which)
                    _delete(table, prefix + name + ".bias", 0, which)


def _argmin(values: list[float]) -> int:
    best = 0
    for index, value in enumerate(values):
        if value < values[best]:
            best = index
    return best


def _delete(table: dict[str, Tensor], name: str, dim: int, which: range) -> None:
    """Drop the given rows or columns; tensors a family does not have are left alone."""
    if name not in table:
        return
    tensor = table[name]
    before, after = tensor.narrow(dim, 0, which.start), tensor.narrow(dim, which.stop, tensor.shape[dim] - which.stop)
    table[name] = torch.cat([before, after], dim=dim)
