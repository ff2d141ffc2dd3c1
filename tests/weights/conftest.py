from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from prism.weights.checksum import CHUNK_BYTES
from prism.weights.client import PackedWeights, pack_here
from tests.weights.support import dummy_source


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PackedWeights]:
    """Some 21 MB: six chunks, the last one short; eleven slabs."""
    source = dummy_source(
        tmp_path_factory.mktemp("weights"), vocab_size=6000, hidden_size=512, intermediate_size=1024
    )
    with pack_here(source) as packed:
        assert 5 * CHUNK_BYTES < packed.total_bytes < 6 * CHUNK_BYTES
        yield packed
        gc.collect()
