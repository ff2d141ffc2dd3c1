"""The way into a device, which all its loads share: the one that is due first has it to itself."""

from __future__ import annotations

from dataclasses import dataclass

from prism.sim.model import SimModel
from prism.sim.ticks import NEVER, to_ticks


@dataclass(slots=True, eq=False)
class Load:
    """A model on its way in."""

    model: SimModel
    left: int
    """Ticks that its copy still takes with the link to itself."""
    fixed: int
    """Ticks from the end of the copy to the first step."""
    due: int
    number: int
    ready: int | None = None
    """When it is there, once all has been copied."""


class Link:
    """Loads under way."""

    def __init__(self) -> None:
        self._loads: dict[SimModel, Load] = {}
        self._clock = 0
        self._num_loads = 0

    def start(self, model: SimModel, due: int, now: int) -> None:
        """Begin a load whose first token is due then."""
        self.advance(now)
        costs = model.served.costs
        copy = to_ticks(costs.shape.weight_bytes / costs.loads.bandwidth)
        self._num_loads += 1
        self._loads[model] = Load(model, copy, to_ticks(costs.loads.fixed), due, self._num_loads)

    def hurry(self, model: SimModel, due: int, now: int) -> None:
        """Somebody waits for a load that has begun without."""
        self.advance(now)
        self._loads[model].due = min(self._loads[model].due, due)

    def cancel(self, model: SimModel) -> None:
        """Nobody wants it any more."""
        del self._loads[model]

    def _copying(self) -> list[Load]:
        """In the order in which they have the link."""
        loads = [load for load in self._loads.values() if load.ready is None]
        return sorted(loads, key=lambda load: (load.due, load.number))

    def advance(self, now: int) -> None:
        """Copy until `now`."""
        if self._loads:
            for load in self._copying():
                taken = min(load.left, now - self._clock)
                load.left -= taken
                self._clock += taken
                if load.left:
                    break
                load.ready = self._clock + load.fixed
        self._clock = now

    def arrived(self, now: int) -> list[SimModel]:
        """Take out what has been loaded by `now`."""
        if not self._loads:
            return []
        self.advance(now)
        ready = [load for load in self._loads.values() if load.ready is not None and load.ready <= now]
        for load in ready:
            del self._loads[load.model]
        return [load.model for load in sorted(ready, key=lambda load: load.number)]

    def ready_at(self, model: SimModel) -> int:
        """When a load will be there if no other comes, as of the last `advance`."""
        load = self._loads[model]
        if load.ready is not None:
            return load.ready
        clock = self._clock
        for other in self._copying():
            clock += other.left
            if other is load:
                break
        return clock + load.fixed

    def next_event(self) -> int:
        """When the next load will be there."""
        if not self._loads:
            return NEVER
        return min(self.ready_at(model) for model in self._loads)

    @property
    def is_busy(self) -> bool:
        """Something is on its way."""
        return bool(self._loads)
