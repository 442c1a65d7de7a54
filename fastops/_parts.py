"""What weights of several tensors share: saving, loading, moving, copying."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor


class TensorParts:
    """An object that is its tensors: attributes named in PARTS (None where absent), the first REQUIRED of them always
    there, all of them arguments of the constructor."""

    PARTS: ClassVar[tuple[str, ...]] = ()
    REQUIRED: ClassVar[int] = 2

    @property
    def device(self) -> torch.device:
        first: Tensor = getattr(self, self.PARTS[0])
        return first.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.state_dict().values())

    def to(self, device: Any) -> Self:
        """A copy on `device` (self, if it is there already)."""
        if torch.device(device) == self.device:
            return self
        return type(self).from_state_dict({n: t.to(device) for n, t in self.state_dict().items()})

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        return {n: t for n in self.PARTS if (t := getattr(self, n)) is not None}

    @classmethod
    def from_state_dict(cls, tensors: dict[str, Tensor]) -> Self:
        """The inverse of `state_dict`."""
        for name in tensors:
            if name not in cls.PARTS:
                raise ValueError(f"{cls.__name__}: unknown tensor {name!r}, known: {', '.join(cls.PARTS)}")
        for name in cls.PARTS[: cls.REQUIRED]:
            if name not in tensors:
                raise ValueError(f"{cls.__name__}: {name} is missing")
        return cls(**tensors)

    def __getstate__(self) -> dict[str, Tensor]:
        return self.state_dict()

    def __setstate__(self, state: dict[str, Tensor]) -> None:
        type(self).__init__(self, **state)
