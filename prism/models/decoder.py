"""The dense decoder that Llama, Mistral, Qwen2 and Qwen3 share.

They differ in biases, query and key norms and rotary tables, all of which the spec tells. Weights are views
of one flat buffer; the names are those of weights/layout. A quantised matrix comes with its scales.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from prism.attention.kernels import AttentionPlan, HeadNorms, Kernels, Stream, Weight
from prism.modelspec import ModelSpec


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's tensors; H, K and D are heads, KV heads and head dimension."""

    input_norm: Tensor
    qkv: Weight  # [(H + 2 K) D, hidden]
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Weight  # [hidden, H D]
    o_bias: Tensor | None
    post_norm: Tensor
    gate_up: Weight  # [2 intermediate, hidden]
    down: Weight  # [hidden, intermediate]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], layer: int) -> LayerWeights:
        """Picks `layers.{layer}.*`; tensors that the model does not have are None."""
        prefix = f"layers.{layer}."

        def weight(name: str) -> Weight:
            return Weight(tensors[prefix + name], tensors.get(f"{prefix}{name}_scale"))

        return cls(
            input_norm=tensors[prefix + "input_norm"],
            qkv=weight("qkv"),
            qkv_bias=tensors.get(prefix + "qkv_bias"),
            q_norm=tensors.get(prefix + "q_norm"),
            k_norm=tensors.get(prefix + "k_norm"),
            o=weight("o"),
            o_bias=tensors.get(prefix + "o_bias"),
            post_norm=tensors[prefix + "post_norm"],
            gate_up=weight("gate_up"),
            down=weight("down"),
        )


class Decoder:
    """Runs tokens through all layers."""

    def __init__(self, spec: ModelSpec, tensors: Mapping[str, Tensor], rotary: Tensor) -> None:
        self.spec = spec
        self.embed = tensors["embed"]
        self.weights = [LayerWeights.of(tensors, i) for i in range(spec.num_layers)]
        self.norm = tensors["norm"]
        self.lm_head = Weight(tensors.get("lm_head", self.embed))
        self.rotary = rotary

    def embedded(self, tokens: Tensor) -> Stream:
        """Embeddings of `tokens [tokens]`."""
        return Stream(F.embedding(tokens, self.embed))

    @property
    def num_groups(self) -> int:
        """Groups of weights, as the layout counts them: embedding, each layer, head."""
        return len(self.weights) + 2

    def layers(
        self, kernels: Kernels, plan: AttentionPlan, stream: Stream, rows: Tensor | None = None
    ) -> Generator[int, None, Stream]:
        """All layers over a step's tokens; stores their KV.

        Before each half of a layer it yields how many groups that needs.
        With `rows` the result has only these tokens: the others leave the last layer once their KV is stored.
        """
        eps, last = self.spec.norm_eps, self.spec.num_layers - 1
        for index, layer in enumerate(self.weights):
            yield index + 2
            qkv, stream = kernels.norm_linear(stream, layer.input_norm, eps, layer.qkv, layer.qkv_bias)
            heads = self._attention(kernels, plan, index, qkv)
            if index == last and rows is not None:
                heads, stream = heads[rows], stream.rows(rows)
                if not len(rows):
                    break
            yield index + 2
            stream = kernels.add_linear(stream, heads, layer.o, layer.o_bias)
            stream = kernels.add_mlp(stream, layer.post_norm, eps, layer.gate_up, layer.down)
        return stream

    def logits(self, kernels: Kernels, stream: Stream, out: Tensor | None = None) -> Tensor:
        """`[rows, vocabulary]` in the model's number format, into `out` if that is given."""
        return kernels.norm_linear(stream, self.norm, self.spec.norm_eps, self.lm_head, None, out)[0]

    def _attention(self, kernels: Kernels, plan: AttentionPlan, index: int, qkv: Tensor) -> Tensor:
        layer, dim = self.weights[index], self.spec.head_dim
        norms = None
        if layer.q_norm is not None and layer.k_norm is not None:
            norms = HeadNorms(layer.q_norm, layer.k_norm, self.spec.norm_eps)
        return kernels.attention(plan, index, qkv.view(len(qkv), -1, dim), norms, self.rotary)


def at_once(layers: Generator[int, None, Stream]) -> Stream:
    """Runs `Decoder.layers` to its end."""
    while True:
        try:
            next(layers)
        except StopIteration as stop:
            result: Stream = stop.value
            return result
