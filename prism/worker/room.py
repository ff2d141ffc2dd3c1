"""The room that pinned models leave: one for which it is too little cannot come, however long it waits."""

from __future__ import annotations

from collections.abc import Mapping

from prism.errors import DeviceTooSmall, NoRoom
from prism.worker.models import Model
from prism.worker.reclaimer import slabs_to_activate


class Room:
    """Of one device."""

    def __init__(self, models: Mapping[str, Model], num_slabs: int) -> None:
        self._models = models
        self._num_slabs = num_slabs

    def check(self, model: Model) -> None:
        """Raises `DeviceTooSmall` or `NoRoom` if a model cannot be loaded though all give what they must."""
        wanted = slabs_to_activate(model)
        if wanted > self._num_slabs:
            raise DeviceTooSmall(
                f"weights and the least KV take {wanted} slabs; the device has {self._num_slabs}"
            )
        staying = self._staying_beside(model)
        room = self._beside(staying)
        if wanted > room:
            names = ", ".join(other.name for other in staying)
            raise NoRoom(
                f"weights and the least KV take {wanted} slabs, and pinned models ({names}) leave "
                f"{max(0, room)} of {self._num_slabs}"
            )

    def lacking(self, model: Model) -> DeviceTooSmall | NoRoom | None:
        """Why a model cannot be loaded; None if there is room for it, or if it was not read yet."""
        if model.profile is None:
            return None
        try:
            self.check(model)
        except (DeviceTooSmall, NoRoom) as error:
            return error
        return None

    def capacity_tokens(self, model: Model) -> int:
        """Tokens of one sequence that the model could hold if all others gave what they must."""
        profile = model.profile
        assert profile is not None
        slabs = self._beside(self._staying_beside(model)) - profile.weight_slabs
        if model.kv_limit is not None:
            slabs = min(slabs, model.kv_limit)
        return max(0, slabs) * profile.kv.blocks_per_slab * profile.kv.tokens_per_block

    def crowded_out_by(self, model: Model) -> list[str]:
        """The models for which a pinned one, beside others that are pinned, leaves no room."""
        if not _stays(model):
            return []
        others = (other for other in self._models.values() if other is not model)
        return [other.name for other in others if isinstance(self.lacking(other), NoRoom)]

    def _staying_beside(self, model: Model) -> list[Model]:
        """Who gives a model nothing. Asked in each round for whoever waits: most are not pinned."""
        pinned = [other for other in self._models.values() if other.pinned]
        return [other for other in pinned if other is not model and _stays(other)]

    def _beside(self, staying: list[Model]) -> int:
        return self._num_slabs - sum(_kept(other) for other in staying)


def _stays(model: Model) -> bool:
    """Pinned, and neither sent away by an administrator nor unable to come.

    So of pinned models that do not fit beside each other the one stays that another found in its way.
    """
    return model.pinned and model.profile is not None and not model.is_sent_away and not model.num_failures


def _kept(model: Model) -> int:
    """Slabs that nobody takes from a pinned model."""
    return 0 if model.profile is None else model.profile.weight_slabs + model.kv_floor
