"""What a device is laid out for."""

from __future__ import annotations

from pathlib import Path

from prism.config import ModelConfig
from prism.worker.needs import LEAST, needs_of
from tests.support.checkpoints import make_model, save


def test_the_greatest_of_all_that_can_be_read(tmp_path: Path) -> None:
    long = save(make_model("llama", max_position_embeddings=50_000), tmp_path / "long")
    models = [ModelConfig(name="long", path=str(long)), ModelConfig(name="gone", path=str(tmp_path / "no"))]
    assert needs_of(models) == (50_000, LEAST.max_vocab)
    clipped = [ModelConfig(name="long", path=str(long), max_model_len=1000)]
    assert needs_of(clipped) == LEAST
