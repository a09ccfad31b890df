"""How far cheap fitnesses and true FID put the same candidates into the same order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from flexi_core.metrics import bootstrap_statistic, frechet_distance, kendall_tau, kendall_tau_within, rfid
from flexi_core.schedule.schedule import Schedule

from ..backends.protocol import Backend
from ..space.space import Space

_PAIRED = ("latent MSE", "PSNR", "rFID")  # these need the teacher's samples


@dataclass(frozen=True)
class Ranked:
    """A candidate with its true FID and its cheap fitnesses by (name, samples), all of them lower is better."""

    speedup: float
    schedule: str
    fid: float
    fitness: dict[tuple[str, int], float]


@dataclass(frozen=True)
class Agreement:
    """How far one cheap fitness ranks the candidates as true FID does.

    Args:
        fitness: its name.
        samples: that it was measured on; 0 where it needs none.
        tau, low, high: Kendall's tau-b over all candidates, and its 95 % interval over resampled candidates.
        tau_within, low_within, high_within: the same inside single budgets, the mean over the budgets; nan where each has one
            candidate.
        macs, seconds: of one candidate, the mean.
        teacher_macs: of the teacher's samples, spent once for all candidates.
    """

    fitness: str
    samples: int
    tau: float
    low: float
    high: float
    tau_within: float
    low_within: float
    high_within: float
    macs: float
    seconds: float
    teacher_macs: float


@dataclass(frozen=True)
class Correlation:
    """The result: the candidates, the agreement of every fitness, and what true FID is and costs.

    Args:
        candidates: in the order in which they were drawn.
        agreements: of every fitness at every sample count.
        halves: agreement of the FID of one half of a candidate's images with that of the other, which says how far true FID
            agrees with itself, at half its samples: where that is low, more of them are needed.
        fid_samples, reference_samples: of each candidate, and of real images.
        fid_macs, fid_seconds: of one candidate, the mean.
        features: what Frechet distances were measured on.
    """

    candidates: list[Ranked]
    agreements: list[Agreement]
    halves: Agreement
    fid_samples: int
    reference_samples: int
    fid_macs: float
    fid_seconds: float
    features: str

    def as_dict(self) -> dict:
        """Return plain values, nan as None."""
        candidates = [
            {"speedup": c.speedup, "schedule": c.schedule, "fid": c.fid, **{column(*key): v for key, v in c.fitness.items()}}
            for c in self.candidates
        ]
        plain = {key: value for key, value in asdict(self).items() if key not in ("candidates", "agreements", "halves")}
        agreements = [_no_nan(asdict(a)) for a in self.agreements]
        return {**plain, "candidates": candidates, "agreements": agreements, "halves": _no_nan(asdict(self.halves))}


def column(fitness: str, samples: int) -> str:
    """Return what a fitness is called in the table of candidates."""
    name = fitness.lower().replace(" ", "_")
    return f"{name}_{samples}" if samples else name


def compare(
    backend: Backend,
    drawn: Sequence[tuple[float, Schedule]],
    measured: Sequence[dict[str, torch.Tensor]],
    teacher_features: torch.Tensor,
    reference: torch.Tensor,
    counts: Sequence[int],
    fid_samples: int,
) -> Correlation:
    """Return how the rankings agree.

    Args:
        backend: whose teacher it is.
        drawn: candidates, each with the speed-up of its budget.
        measured: of each candidate, per sample: `fitness.mse`, `fitness.psnr_db`, `fitness.features`, `fid.features`, where
            they can be read `fitness.right`; and of all its samples `macs` and `seconds` of both.
        teacher_features: of the samples that the fitnesses are paired with.
        reference: features of real images [M, D].
        counts: of samples, for the fitnesses.
        fid_samples: each candidate's own, for true FID.
    """

    def fid(values: dict[str, torch.Tensor], part: slice) -> float:
        return frechet_distance(values["fid.features"][:fid_samples][part], reference)

    space = Space(backend.settings.steps, 1, backend.cost)
    halves = [[fid(values, slice(start, None, 2)) for values in measured] for start in (0, 1)]
    candidates = []
    for (speedup, schedule), values in zip(drawn, measured, strict=True):
        fitness = {("cost alone", 0): -space.spent(schedule)}
        for n in counts:
            fitness["latent MSE", n] = float(values["fitness.mse"][:n].mean())
            fitness["PSNR", n] = -float(values["fitness.psnr_db"][:n].mean())
            fitness["rFID", n] = rfid(values["fitness.features"][:n], teacher_features[:n])
            if "fitness.right" in values:
                fitness["caption errors", n] = 1 - float(values["fitness.right"][:n].double().mean())
        candidates.append(Ranked(speedup, str(schedule), fid(values, slice(None)), fitness))
    per_sample = {
        kind: {
            name: float(np.mean([float(v[f"{kind}.{name}"]) / len(v[f"{kind}.features"]) for v in measured]))
            for name in ("macs", "seconds")
        }
        for kind in ("fitness", "fid")
    }
    budgets = [c.speedup for c in candidates]
    truth = [c.fid for c in candidates]
    full_macs = np.mean(
        [float(v["fid.macs"]) / len(v["fid.features"]) / space.spent(s) for (_, s), v in zip(drawn, measured, strict=True)]
    )

    def agreement(name: str, samples: int) -> Agreement:
        taus = _taus([c.fitness[name, samples] for c in candidates], truth, budgets)
        cost = {key: value * samples for key, value in per_sample["fitness"].items()}
        teacher_macs = float(full_macs) * backend.settings.steps * samples if name in _PAIRED else 0.0
        return Agreement(name, samples, *taus, **cost, teacher_macs=teacher_macs)

    names = list(dict.fromkeys(name for name, _ in candidates[0].fitness))
    keys = sorted(candidates[0].fitness, key=lambda key: (names.index(key[0]), key[1]))
    half = fid_samples // 2
    cost = {key: value * half for key, value in per_sample["fid"].items()}
    return Correlation(
        candidates=candidates,
        agreements=[agreement(*key) for key in keys],
        halves=Agreement("FID, other half", half, *_taus(*halves, budgets), **cost, teacher_macs=0.0),
        fid_samples=fid_samples,
        reference_samples=len(reference),
        fid_macs=per_sample["fid"]["macs"] * fid_samples,
        fid_seconds=per_sample["fid"]["seconds"] * fid_samples,
        features=backend.features.name,
    )


def _taus(a: Sequence[float], b: Sequence[float], budgets: Sequence[float]) -> tuple[float, ...]:
    """Return tau with its interval over all candidates, then inside the budgets."""
    a, b, budgets = (np.asarray(values) for values in (a, b, budgets))

    def over_all(picks: np.ndarray) -> float:
        return kendall_tau(a[picks], b[picks])

    def within(picks: np.ndarray) -> float:
        return kendall_tau_within(a[picks], b[picks], budgets[picks])

    every = np.arange(len(a))
    return (
        over_all(every),
        *bootstrap_statistic(over_all, len(a), resamples=500),
        within(every),
        *bootstrap_statistic(within, len(a), groups=budgets, resamples=500),
    )


def _no_nan(values: dict) -> dict:
    return {key: None if isinstance(value, float) and np.isnan(value) else value for key, value in values.items()}
