"""The dense decoder that Llama, Mistral, Qwen2 and Qwen3 share.

They differ in biases, query and key norms and rotary tables, all of which the spec tells. Weights are views
of one flat buffer; the names are those of weights/layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prism.attention.kernels import AttentionPlan, Kernels
from prism.modelspec import ModelSpec


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's tensors; H, K and D are heads, KV heads and head dimension."""

    input_norm: Tensor
    qkv: Tensor  # [(H + 2 K) D, hidden]
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor  # [hidden, H D]
    o_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor  # [2 intermediate, hidden]
    down: Tensor  # [hidden, intermediate]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], layer: int) -> LayerWeights:
        """Picks `layers.{layer}.*`; tensors that the model does not have are None."""
        names = cls.__dataclass_fields__
        return cls(**{name: tensors.get(f"layers.{layer}.{name}") for name in names})  # type: ignore[arg-type]


class Decoder:
    """Runs tokens through all layers."""

    def __init__(self, spec: ModelSpec, tensors: Mapping[str, Tensor], rotary: Tensor) -> None:
        self.spec = spec
        self.embed = tensors["embed"]
        self.layers = [LayerWeights.of(tensors, i) for i in range(spec.num_layers)]
        self.norm = tensors["norm"]
        self.lm_head = tensors.get("lm_head", self.embed)
        self.rotary = rotary

    def hidden(self, kernels: Kernels, plan: AttentionPlan, tokens: Tensor, positions: Tensor) -> Tensor:
        """Final hidden states `[tokens, hidden]`, normed."""
        residual = F.embedding(tokens, self.embed)
        eps = self.spec.norm_eps
        x = kernels.rms_norm(residual, self.layers[0].input_norm, eps)
        for index, layer in enumerate(self.layers):
            x = self._attention(kernels, plan, index, layer, x, positions)
            x, residual = kernels.add_rms_norm(x, residual, layer.post_norm, eps)
            x = kernels.linear(kernels.silu_mul(kernels.linear(x, layer.gate_up)), layer.down)
            following = self.layers[index + 1].input_norm if index + 1 < len(self.layers) else self.norm
            x, residual = kernels.add_rms_norm(x, residual, following, eps)
        return x

    def logits(self, kernels: Kernels, hidden: Tensor) -> Tensor:
        """`[rows, vocabulary]` in fp32."""
        return kernels.linear(hidden, self.lm_head).float()

    def _attention(
        self,
        kernels: Kernels,
        plan: AttentionPlan,
        index: int,
        layer: LayerWeights,
        x: Tensor,
        positions: Tensor,
    ) -> Tensor:
        heads, kv_heads, dim = self.spec.num_heads, self.spec.num_kv_heads, self.spec.head_dim
        qkv = kernels.linear(x, layer.qkv, layer.qkv_bias).view(-1, heads + 2 * kv_heads, dim)
        v = qkv[:, heads + kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            q = kernels.rms_norm(qkv[:, :heads], layer.q_norm, self.spec.norm_eps)
            k = kernels.rms_norm(qkv[:, heads : heads + kv_heads], layer.k_norm, self.spec.norm_eps)
            qk = torch.cat((q, k), dim=1)
        else:
            qk = qkv[:, : heads + kv_heads]
        q, k = torch.split(kernels.rope(qk, positions, self.rotary), [heads, kv_heads], dim=1)
        out = kernels.attention(plan, index, q, k, v)
        return kernels.linear(out.reshape(-1, heads * dim), layer.o, layer.o_bias)
