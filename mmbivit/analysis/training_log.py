"""What a training run logged, as one history."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmbivit.checks import UserError, did_you_mean
from mmbivit.engine.sign_flips_hook import PREFIX

__all__ = ["Series", "TrainingLog"]


@dataclass(frozen=True)
class Series:
    """One logged quantity.

    Args:
        steps: iterations after which it was logged, rising, ``(n,)``.
        values: what was logged, perhaps not finite, ``(n,)``.
    """

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class TrainingLog:
    """All that the runs in a work dir logged, one series a key.

    Args:
        work_dir: the folder.
        train: losses, learning rate, times and so on.
        validation: metrics; one whose name is also in ``train`` begins with ``val/``.
        flips: ``sign_flips`` and ``sign_flips/<layer>`` of :class:`mmbivit.SignFlipsHook`, from 0 to 1.
        epoch_length: iterations of an epoch; ``None`` where the log does not tell, as that of a run by iterations.
        switch: iterations of training stage 1; ``None`` where training has no stages.
    """

    work_dir: Path
    train: dict[str, Series]
    validation: dict[str, Series]
    flips: dict[str, Series]
    epoch_length: int | None
    switch: int | None

    @property
    def last_step(self) -> int:
        """The last iteration of which anything was logged."""
        return max(
            int(series.steps[-1]) for part in (self.train, self.validation, self.flips) for series in part.values()
        )

    def series(self, key: str) -> Series:
        """Return what was logged under a key.

        Raises:
            ValueError: if there is no such key; the message lists those that there are.
        """
        known = {**self.train, **self.validation, **self.flips}
        if key not in known:
            keys = ", ".join(name for name in known if not name.startswith(f"{PREFIX}/"))
            raise UserError(f"the log in {self.work_dir} has no {key!r}{did_you_mean(key, known)}; it has {keys}")
        return known[key]
