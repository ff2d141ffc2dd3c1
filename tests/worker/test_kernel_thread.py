"""Kernels are loaded ahead: whose, in which order, and until when."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prism.config import ModelConfig
from prism.modelspec import ModelSpec
from prism.worker.kernel_thread import KernelThread
from tests.support.checkpoints import make_model, save


class Backend:
    """Prepares in three pieces; `pieces` tells whose."""

    def __init__(self, fails_for: str = "") -> None:
        self.pieces: list[str] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.has_begun = threading.Event()
        self._fails_for = fails_for

    def prepare_ahead(self, spec: ModelSpec) -> Iterator[None]:
        for _ in range(3):
            self.pieces.append(spec.family)
            if spec.family == self._fails_for:
                raise RuntimeError("no such kernel")
            self.has_begun.set()
            self.may_go_on.wait(10)
            yield


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: save(make_model(family), folder / family) for family in ("llama", "qwen2", "qwen3")}


def config(path: Path, name: str = "m", **options: Any) -> ModelConfig:
    return ModelConfig(name=name, path=str(path), **options)


def run_through(backend: Any, models: list[ModelConfig]) -> None:
    thread = KernelThread(backend, models)
    thread._thread.join(10)
    assert not thread._thread.is_alive()
    thread.close()


def test_each_kind_of_model_is_prepared_once_likely_ones_first(paths: dict[str, Path]) -> None:
    backend = Backend()
    models = [
        config(paths["llama"], "a"),
        config(paths["llama"], "b"),
        config(paths["qwen2"], "c", preload=True),
        config(paths["qwen3"], "d"),
    ]
    run_through(backend, models)
    assert backend.pieces == [family for family in ("qwen2", "llama", "qwen3") for _ in range(3)]


def test_other_options_are_another_model(paths: dict[str, Path]) -> None:
    backend = Backend()
    run_through(backend, [config(paths["llama"]), config(paths["llama"], quantization="fp8")])
    assert len(backend.pieces) == 6


def test_what_fails_does_not_keep_others_from_it(
    paths: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    backend = Backend(fails_for="llama")
    run_through(backend, [config(paths["llama"]), config(Path("/nowhere")), config(paths["qwen2"])])
    assert backend.pieces == ["llama", "qwen2", "qwen2", "qwen2"]
    assert "kernels of a llama model" in caplog.text and "no such kernel" in caplog.text
    assert "nowhere" not in caplog.text, "that is told when somebody asks for the model"


def test_closing_ends_it_behind_a_piece_or_does_not_wait_for_that(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prism.worker.kernel_thread.CLOSING_SECONDS", 0.1)
    backend: Any = Backend()
    backend.may_go_on.clear()
    thread = KernelThread(backend, [config(paths["llama"]), config(paths["qwen2"])])
    assert backend.has_begun.wait(10)
    begin = time.monotonic()
    thread.close()
    assert time.monotonic() - begin < 5
    backend.may_go_on.set()
    thread._thread.join(10)
    assert backend.pieces == ["llama"]
