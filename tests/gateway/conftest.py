from pathlib import Path

import pytest

from prism.config import Config
from tests.gateway.fakes import make_config, write_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def config(model_dir: Path) -> Config:
    return make_config(model_dir)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
