"""Watches the admin endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx

from prism.demo.samples import Sample, read_sample

WATCH_SECONDS = 0.2


class Watcher:
    """Keeps every state of the device that it sees, and shows each."""

    def __init__(self, admin_url: str, show: Callable[[Sample], None]) -> None:
        self.samples: list[Sample] = []
        self._url = f"{admin_url}/admin/models"
        self._show = show

    async def run(self) -> None:
        """Until cancelled. A poll that fails is left out: the answers tell what is wrong."""
        async with httpx.AsyncClient(trust_env=False) as client:
            while True:
                await self.look(client)
                await asyncio.sleep(WATCH_SECONDS)

    async def look(self, client: httpx.AsyncClient) -> None:
        """Take one sample."""
        try:
            answer = await client.get(self._url)
        except httpx.TransportError:
            return
        sample = read_sample(answer.json()) if answer.status_code == 200 else None
        if sample is None:
            return
        if not self.samples or sample != self.samples[-1]:
            self.samples.append(sample)
        self._show(sample)
