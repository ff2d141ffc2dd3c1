"""Blocks of prefix caches: whoever else writes to their memory is found out."""

from __future__ import annotations

import torch

from prism.engine.kv_slab import BlockKey
from prism.types import BlockId, ModelId
from tests.support.local_worker import LocalWorker


class CachedBlocks:
    """Sums of all published blocks' bytes, which never change while the block stays where it is."""

    def __init__(self, local: LocalWorker, every: int = 1) -> None:
        """Looks at each so many calls."""
        self._local = local
        self._every = every
        self._num_calls = 0
        self._sums: dict[tuple[ModelId, BlockKey, BlockId], int] = {}
        self.num_checked = 0

    def look(self) -> None:
        """Compare those that were there the last time; on a GPU on a stream that is behind all lanes'."""
        self._num_calls += 1
        if self._num_calls % self._every:
            return
        before, self._sums = self._sums, {}
        for name, model in self._local.worker.models.items():
            if model.kv is None or model.engine is None:
                continue
            records = {k: r for k, r in model.kv._published.items() if not r.home.is_gone}
            places = [record.place for record in records.values()]
            sums = sums_of(model.engine.runner.kv.pages, places)
            for (key, record), found in zip(records.items(), sums, strict=True):
                block = (name, key, record.place)
                self._sums[block] = found
                if block in before:
                    assert found == before[block], f"block {record.place} of {name} was written while cached"
                    self.num_checked += 1


def sums_of(pages: torch.Tensor, places: list[BlockId]) -> list[int]:
    """Of each page's bits, those of another place with another weight."""
    if not places:
        return []
    picked = pages.index_select(0, torch.tensor(places, device=pages.device))
    words = picked.reshape(len(places), -1).view(torch.int16).long()
    found: list[int] = (words * torch.arange(1, words.shape[1] + 1, device=words.device)).sum(1).tolist()
    return found
