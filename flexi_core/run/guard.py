"""Whether a run's numbers stay finite, and near those of its own computed steps."""

from __future__ import annotations

import torch

# Times the size of a computed step's prediction. On the embedded model every second and every fourth step computed stays at 1.0
# times under four samplers; a line drawn over 48 steps reaches 3 times under dpmpp_2m, 8 under euler_ancestral.
FAR = 8.0
_MOST_GROWTH = 2.0  # from one computed step to the next: steps that drift off together do not excuse each other


class Guard:
    """Watches the predictions of a run's steps, in the plan's basis; once they are lost they stay lost.

    `lost` says in words from which step on; empty while all is well. A device that the processor runs ahead of is not waited
    for: there a computed prediction is judged when the next one comes.
    """

    def __init__(self) -> None:
        self.lost = ""
        self._size: float | None = None  # of computed predictions
        self._waiting: tuple[int, torch.Tensor, bool] | None = None

    def is_well(self, index: int, prediction: torch.Tensor, computed: bool, sure: bool | None = None) -> bool:
        """Return whether a prediction [B, ...] is what may follow the computed ones so far.

        Args:
            index: of its step.
            prediction: of a full step, or one that is judged by these.
            computed: it is a full step's.
            sure: of an extrapolated one, whether its weights alone keep it within bounds; None for others.
        """
        if self._waiting is not None:
            (before, size, was_computed), self._waiting = self._waiting, None
            self._judge(before, float(size), was_computed)
        if self.lost or sure:
            return not self.lost
        size = _size(prediction)
        if sure is None and prediction.device.type != "cpu":
            self._waiting = index, size, computed
        else:
            self._judge(index, float(size), computed)
        return not self.lost

    def _judge(self, index: int, size: float, computed: bool) -> None:
        if not size < float("inf"):  # and so not NaN
            self.lost = f"from step {index + 1} on the run's numbers were not finite"
        elif self._size is not None and size > FAR * self._size:
            self.lost = f"from step {index + 1} on the run's numbers were far beyond those of its steps before"
        elif computed:
            self._size = size if self._size is None else max(self._size, min(size, _MOST_GROWTH * self._size))


def _size(prediction: torch.Tensor) -> torch.Tensor:
    """Return the root mean square of the row that is largest by it; NaN where any number is."""
    rows = prediction.reshape(len(prediction), -1)
    norms = torch.linalg.vector_norm(rows.detach(), dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))
    return norms.max() / max(rows.shape[1], 1) ** 0.5
