"""What is refused at the worker's door."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prism.errors import DeviceTooSmall
from prism.messages import ResumedChoice
from prism.modelspec import ModelSpec
from prism.worker.cpu_device import TorchBackend
from tests.support.checkpoints import VOCAB, make_model, save
from tests.support.local_worker import LocalWorker


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_model("llama"), tmp_path_factory.mktemp("model") / "m")


@pytest.fixture
def local(path: Path) -> Iterator[LocalWorker]:
    local = LocalWorker({"m": path}, 8)
    yield local
    local.close()


@pytest.mark.parametrize(
    ("field", "value"),
    [("logit_bias", {VOCAB: 1.0}), ("logit_bias", {-1: 1.0}), ("stop_token_ids", (3, VOCAB))],
)
def test_tokens_outside_the_vocabulary(local: LocalWorker, field: str, value: Any) -> None:
    """They are indices into the logits: on a GPU such a one ends the worker."""
    local.submit("r", "m", [1], **{field: value})
    error = local.outbox.rejected["r"].error
    assert (error.status, error.param) == (400, field)
    local.submit("good", "m", [1], max_tokens=2, **{field: {VOCAB - 1: 1.0} if "bias" in field else (3,)})
    local.run()
    assert "good" not in local.outbox.rejected


def test_a_context_that_was_lowered_below_the_resumed_text(local: LocalWorker) -> None:
    """The request waited for room that could not come."""
    local.worker.models["m"].kv_limit = 1
    local.submit("warm", "m", [1], max_tokens=1)
    local.run()
    resumed = [ResumedChoice(choice=0, token_ids=[5] * 10, finished=False)]
    local.submit("r", "m", [1] * 502, max_tokens=60, resumed=resumed, attempt=1, clip_max_tokens=True)
    assert local.outbox.rejected["r"].error.status == 503


def test_a_default_length_is_clipped_with_what_was_resumed(local: LocalWorker) -> None:
    local.outbox.tokens["r", 0] = [5] * 10
    resumed = [ResumedChoice(choice=0, token_ids=[5] * 10, finished=False)]
    local.submit("r", "m", [1] * 500, max_tokens=60, resumed=resumed, attempt=1, clip_max_tokens=True)
    local.run()
    assert len(local.outbox.tokens["r", 0]) == 12


def test_a_model_that_the_device_was_not_laid_out_for(path: Path) -> None:
    """A checkpoint that became readable after the start overran the lanes' tables."""

    class SmallBackend(TorchBackend):
        def check(self, spec: ModelSpec) -> None:
            raise DeviceTooSmall(f"laid out for fewer than {spec.max_position} tokens")

    local = LocalWorker({"m": path}, 8)
    local.device.backend = SmallBackend(local.device.device)
    local.submit("r", "m", [1])
    local.run()
    error = local.outbox.rejected["r"].error
    assert error.status == 503 and "laid out" in error.message
    local.close()
