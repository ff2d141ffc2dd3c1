from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from prism.models.rotary import rotary_table
from prism.modelspec import RopeScaling
from tests.support.checkpoints import LLAMA3_ROPE


@pytest.mark.parametrize(
    ("parameters", "rope"),
    [
        ({"rope_type": "default", "rope_theta": 1e6}, RopeScaling(1e6)),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, RopeScaling(1e4, "linear", 4.0)),
        (LLAMA3_ROPE, RopeScaling(1e4, "llama3", 8.0, 1.0, 4.0, 64)),
    ],
)
def test_tables_equal_those_of_transformers(parameters: dict[str, Any], rope: RopeScaling) -> None:
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=512, rope_parameters=parameters
    )
    positions = torch.arange(512)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, 1), positions)
    table = rotary_table(rope, 32, 512)
    torch.testing.assert_close(table, torch.cat((cos[0, :, :16], sin[0, :, :16]), dim=-1))
