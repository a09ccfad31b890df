"""Whether a cheap fitness ranks schedules as true FID does: Kendall's tau over random schedules at several budgets.

True FID is the Frechet distance between a schedule's own images and many fresh real ones. No search can afford it; what a
search uses instead should put schedules into the same order.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from flexi_core.errors import FlexiError
from flexi_core.files import replace_file
from flexi_core.metrics import data_range, latent_mse, psnr_db
from flexi_core.schedule.schedule import Schedule
from flexi_core.tensor_files import save_tensors

from ..backends.protocol import Backend
from ..backends.teacher import SEARCH_SEEDS
from ..space.sampler_space import space_under
from ..space.space import Space
from .agreement import Correlation, compare

FID_SEEDS = 30_000_000  # neither the search nor the judge ever samples from here
_CHUNK = 64  # samples between two writings of a candidate's file
_CANDIDATES = "candidates.json"


@dataclass(frozen=True)
class CorrelateSettings:
    """What is compared.

    Args:
        speedups: budgets that candidates are drawn at.
        each: candidates at each budget.
        counts: of samples, for the cheap fitnesses.
        fid_samples: each candidate's own, for true FID.
        seed: of the drawing.
    """

    speedups: tuple[float, ...] = (2, 3, 4, 5, 6, 7, 8)
    each: int = 6
    counts: tuple[int, ...] = (16, 32, 64, 128, 256)
    fid_samples: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", tuple(sorted(set(self.counts))))
        if not self.counts or self.counts[0] < 2:
            raise FlexiError(f"the sample counts are {self.counts}; give numbers of at least 2")
        if self.fid_samples < 4:
            raise FlexiError(f"{self.fid_samples} samples for the true FID; give at least 4")
        if not self.speedups or self.each < 1 or len(self.speedups) * self.each < 3:
            raise FlexiError(
                f"{len(self.speedups)} budgets of {self.each} candidates; a rank correlation needs at least 3 candidates in all"
            )


def correlate(
    backend: Backend,
    reference: torch.Tensor,
    settings: CorrelateSettings,
    folder: Path,
    on_progress: Callable[[str, float, float], None] = lambda name, done, total: None,
) -> Correlation:
    """Measure candidates and compare the rankings; an interrupted run goes on, and a later one may ask for more samples.

    Args:
        backend: samples and features.
        reference: features of real images [M, D], for true FID.
        settings: of the comparison.
        folder: keeps each candidate's measurements in a file of its own.
        on_progress: called with what is measured, the work done and the work in all, in full steps of one sample.

    Raises:
        FlexiError: the folder was made with other candidates.
    """
    drawn = _candidates(backend, settings, folder)
    largest = settings.counts[-1]
    costs = [Space(backend.settings.steps, 1, backend.cost).spent(schedule) for _, schedule in drawn]
    total = largest * backend.settings.steps + sum(costs) * (largest + settings.fid_samples)
    done = 0.0

    def on_teacher(samples: int, of: int) -> None:
        on_progress("teacher", samples / of * largest * backend.settings.steps, total)

    teacher = backend.teacher(SEARCH_SEEDS, largest, on_teacher)
    done += largest * backend.settings.steps
    teacher_features = backend.features(teacher)
    measured = []
    for number, ((_, schedule), cost) in enumerate(zip(drawn, costs, strict=True), 1):
        kept = _Measurements(folder / "candidates", backend, schedule, teacher)
        name = f"candidate {number} of {len(drawn)}"
        on_progress(name, done, total)
        for extend, count in ((kept.extend_fitness, largest), (kept.extend_fid, settings.fid_samples)):
            for have in extend(count):
                on_progress(name, done + cost * have, total)
            done += cost * count
        measured.append(kept.values)
    return compare(backend, drawn, measured, teacher_features, reference, settings.counts, settings.fid_samples)


class _Measurements:
    """What was measured of one schedule, in one file that is written whole; samples are only ever added."""

    def __init__(self, folder: Path, backend: Backend, schedule: Schedule, teacher: torch.Tensor) -> None:
        self._backend, self._schedule, self._teacher = backend, schedule, teacher
        self._range = data_range(teacher)
        text = json.dumps([_identity(backend), backend.features.name, str(schedule)], sort_keys=True)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
        self.values: dict[str, torch.Tensor] = {}
        if self._file.is_file():
            try:
                self.values = load_file(self._file)
            except (OSError, SafetensorError) as error:
                raise FlexiError(
                    f"{self._file}: cannot be read ({error}); delete it and its candidate is made again"
                ) from error

    def extend_fitness(self, count: int):
        """Measure up to `count` samples of the search's seeds, and yield how many there are after each writing."""
        for have, samples in self._extend("fitness", SEARCH_SEEDS, count):
            began = time.perf_counter()
            paired = self._teacher[have : have + len(samples.latents)]
            read = self._backend.caption_accuracy(samples.latents, SEARCH_SEEDS + have)
            found = {
                "mse": latent_mse(samples.latents, paired),
                "psnr_db": psnr_db(samples.latents, paired, self._range),
                "features": self._backend.features(samples.latents),
                **({} if read is None else {"right": read}),
            }
            yield self._add("fitness", found, samples, time.perf_counter() - began)

    def extend_fid(self, count: int):
        """Measure up to `count` samples of seeds that nobody else uses, and yield how many there are after each writing."""
        for _, samples in self._extend("fid", FID_SEEDS, count):
            began = time.perf_counter()
            features = self._backend.features(samples.latents)
            yield self._add("fid", {"features": features}, samples, time.perf_counter() - began)

    def _extend(self, kind: str, seed: int, count: int):
        while (have := len(self.values.get(f"{kind}.features", ()))) < count:
            yield have, self._backend.sample(self._schedule, seed + have, min(_CHUNK, count - have))

    def _add(self, kind: str, found: dict[str, torch.Tensor], samples, seconds: float) -> int:
        spent = {"seconds": samples.seconds + seconds, "macs": samples.macs}
        for name, value in found.items():
            key = f"{kind}.{name}"
            self.values[key] = torch.cat([self.values[key], value]) if key in self.values else value
        for name, value in spent.items():
            key = f"{kind}.{name}"
            self.values[key] = self.values.get(key, torch.zeros((), dtype=torch.float64)) + value
        save_tensors(self.values, self._file)
        return len(self.values[f"{kind}.features"])


def _candidates(backend: Backend, settings: CorrelateSettings, folder: Path) -> list[tuple[float, Schedule]]:
    """Return the folder's candidates, drawn and written where there are none: they must not change while it is added to."""
    wanted = {
        "teacher": _identity(backend),
        "speedups": list(map(float, settings.speedups)),
        "each": settings.each,
        "seed": settings.seed,
    }
    file = folder / _CANDIDATES
    if file.is_file():
        try:
            known = dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise FlexiError(f"{file}: cannot be read ({error}); give another --folder") from error
        if changed := [key for key, value in wanted.items() if known.get(key) != value]:
            raise FlexiError(f"{folder} was made with another {', '.join(changed)}; give another --folder")
        return [(speedup, Schedule.parse(text)) for speedup, text in known["candidates"]]
    drawn: dict[str, float] = {}
    rng = np.random.default_rng(settings.seed)
    for speedup in settings.speedups:
        space = Space(backend.settings.steps, speedup, backend.cost, **space_under(backend.traits))
        found = 0
        for _ in range(100 * settings.each):
            text = str(space.random(rng))
            if text not in drawn and found < settings.each:
                drawn[text] = float(speedup)
                found += 1
        if found < settings.each:
            raise FlexiError(f"at {speedup:g}x there are only {found} different schedules; ask for fewer candidates")
    pairs = [(speedup, text) for text, speedup in drawn.items()]
    with replace_file(file) as temporary:
        temporary.write_text(json.dumps({**wanted, "candidates": pairs}, indent=1) + "\n", encoding="utf-8")
    return [(speedup, Schedule.parse(text)) for speedup, text in pairs]


def _identity(backend: Backend) -> dict:
    return {key: value for key, value in backend.identity.items() if key != "sigmas"}
