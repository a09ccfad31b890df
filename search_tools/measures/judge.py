"""Judging schedules on seeds that no search has seen, beside what a user would otherwise do at the same cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch

from flexi_core.metrics import bootstrap_interval, data_range, psnr_db, rfid, ssim
from flexi_core.run.cost import predicted_speedup
from flexi_core.schedule.kinds import StepKind
from flexi_core.schedule.presets import all_full, deepcache, even, uniform
from flexi_core.schedule.schedule import Schedule
from flexi_core.tune import Samples

from ..backends.protocol import Backend, Features
from ..backends.teacher import JUDGE_SEEDS
from ..space.space import Space
from .measures import Measure, Measures

_FEW = 8  # samples, of curves and of the run before the first that is timed
_WARM = 2  # steps of that


@dataclass(frozen=True)
class Row:
    """One line of the table: a schedule against the teacher on the judging samples.

    Args:
        name: what it is.
        schedule: its text.
        speedup_macs: the teacher's MACs over its own.
        speedup_time: the teacher's sampling time over its own, both measured in this run.
        psnr_db, psnr_low, psnr_high: mean over the samples and its 95 % bootstrap interval.
        ssim: mean.
        rfid: Frechet distance to the teacher's images from the same noise, on the back end's features.
        caption_accuracy: share of pictures that are what their prompt asks; None where nothing here can read that.
        features: what the Frechet distance was measured on.
        measures: everything else that was asked for, by name, each with its samples and interval.
    """

    name: str
    schedule: str
    speedup_macs: float
    speedup_time: float
    psnr_db: float
    psnr_low: float
    psnr_high: float
    ssim: float
    rfid: float
    caption_accuracy: float | None
    features: str = ""
    measures: dict[str, Measure] = field(default_factory=dict)

    def as_dict(self) -> dict:
        """Return plain values; the teacher's own PSNR, which is infinite, as None; `measures` where there are any."""
        plain = {key: None if value == float("inf") else value for key, value in asdict(self).items() if key != "measures"}
        measures = {name: measure.as_dict() for name, measure in self.measures.items()}
        return {**plain, "measures": measures} if measures else plain


class Judge:
    """The teacher's samples on fresh seeds, and the comparison of any schedule with them.

    Args:
        backend: samples and features.
        samples: how many; compare Frechet distances of equal counts only.
        seed: of the first, from `JUDGE_SEEDS` up.
        progress: called with a name, the work done and the work in all.
        features: what Frechet distances are measured on; the back end's own by default.
        measure: makes what measures everything else, from the teacher's latents.
    """

    def __init__(
        self,
        backend: Backend,
        samples: int,
        seed: int = JUDGE_SEEDS,
        progress: Callable[[str, int, int], None] = lambda name, done, total: None,
        *,
        features: Features | None = None,
        measure: Callable[[torch.Tensor], Measures] | None = None,
    ) -> None:
        self.backend, self.samples, self.seed, self._progress = backend, samples, seed, progress
        self._read = features or backend.features
        teacher = all_full(backend.settings.steps)
        # Sampled afresh, not from the store, and not cold: its time is the yardstick of every row's.
        backend.sample(all_full(_WARM), seed, min(samples, _FEW), steps=_WARM)
        self.teacher = self._sample("teacher", teacher)
        self._features = self._read(self.teacher.latents)
        self.measures = None if measure is None else measure(self.teacher.latents)
        self.teacher_pictures = backend.pictures(self.teacher.latents)
        self._range = data_range(self.teacher_pictures)
        self.teacher_row = self._row("teacher", str(teacher), self.teacher, 1.0)

    def judge(self, name: str, schedule: Schedule) -> tuple[Row, torch.Tensor]:
        """Return the row of a schedule for the teacher's run, and its pictures."""
        samples = self._sample(name, schedule)
        row = self._row(name, str(schedule), samples, predicted_speedup(schedule, self.backend.cost))
        return row, self.backend.pictures(samples.latents)

    def judge_fewer_steps(self, steps: int) -> Row:
        """Return the row of the same solver with fewer steps on the scheduler's own grid, all full."""
        name = f"{self.backend.settings.sampler}, {steps} steps"
        samples = self._sample(name, all_full(steps), steps)
        return self._row(name, str(all_full(steps)), samples, self.backend.settings.steps / steps)

    def curves(self, speedups: Sequence[float]) -> dict[str, list[tuple[float, float]]]:
        """Return (speed-up in MACs, PSNR in dB) of plain choices over a range of speed-ups, on the first few samples."""
        samples, steps = _of_curves(self.samples), self.backend.settings.steps
        counts = sorted({max(1, round(steps / speedup)) for speedup in speedups})
        curves = {f"{self.backend.settings.sampler}, fewer steps": [], "even steps, extrapolated": []}
        for done, count in enumerate(counts):
            self._progress("curves", done, len(counts))
            fewer = self.backend.sample(all_full(count), self.seed, samples, steps=count)
            spaced = self.backend.sample(even(steps, count), self.seed, samples)
            for points, found in zip(curves.values(), (fewer, spaced), strict=True):
                pictures = self.backend.pictures(found.latents)
                psnr = psnr_db(pictures, self.teacher_pictures[:samples], self._range)
                points.append((steps / count, float(psnr.mean())))
        return curves

    def _sample(self, name: str, schedule: Schedule, steps: int | None = None) -> Samples:
        return self.backend.sample(
            schedule, self.seed, self.samples, steps=steps, progress=lambda done, total: self._progress(name, done, total)
        )

    def _row(self, name: str, text: str, samples: Samples, speedup_macs: float) -> Row:
        pictures = self.backend.pictures(samples.latents)
        psnr = psnr_db(pictures, self.teacher_pictures, self._range)
        read = self.backend.caption_accuracy(samples.latents, self.seed)
        low, high = bootstrap_interval(psnr) if torch.isfinite(psnr).all() else (float("inf"), float("inf"))
        return Row(
            name=name,
            schedule=text,
            speedup_macs=speedup_macs,
            speedup_time=self.teacher.seconds / samples.seconds,
            psnr_db=float(psnr.mean()),
            psnr_low=low,
            psnr_high=high,
            ssim=float(ssim(pictures, self.teacher_pictures, self._range).mean()),
            rfid=rfid(self._read(samples.latents), self._features),
            caption_accuracy=None if read is None else float(read.float().mean()),
            features=self._read.name,
            measures={} if self.measures is None else self.measures(samples.latents, self.seed),
        )


def judging_runs(samples: int, steps: int, cost: float, curves: Sequence[float] = ()) -> float:
    """Return what a judge and its rows take, in full runs of one sample.

    Args:
        samples: that are judged on.
        steps: of the teacher.
        cost: of a sample of every row, in full runs of it.
        curves: their speed-ups.
    """
    points = 2 * sum(1 / speedup for speedup in curves)
    return samples * (1 + cost) + min(samples, _FEW) * _WARM / steps + _of_curves(samples) * points


def _of_curves(samples: int) -> int:
    """Return how many of the samples curves are drawn of."""
    return min(_FEW, max(1, samples // 2))


def baselines(space: Space) -> list[tuple[str, Schedule]]:
    """Return what a user would otherwise run at the cost of a space's budget: uniform steps, and DeepCache where it fits.

    DeepCache is given its best chance: at every depth the densest interval that the budget allows; where no interval is cheap
    enough, it has no row.
    """
    steps, full = space.steps, space.full_steps
    rows = [
        (f"{full} of {steps}, removed", uniform(steps, full, StepKind.NULL)),
        (f"{full} of {steps}, extrapolated", uniform(steps, full)),
    ]
    for depth in space.depths:
        fitting = (n for n in range(2, steps + 1) if space.spent(deepcache(steps, n, depth)) <= space.budget)
        interval = next(fitting, None)
        if interval is not None:
            rows.append((f"DeepCache N={interval}, depth {depth}", deepcache(steps, interval, depth)))
    return rows
