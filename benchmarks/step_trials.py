"""Runs under rules that the product does not have, beside those that it has: the trials of benchmarks/step_kinds.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from flexi_core import Schedule
from flexi_core.metrics import latent_mse, psnr_db
from flexi_core.networks.unet import NetworkCall, UNetSteps, partial_pass
from flexi_core.run.null_steps.basis import DERIVATIVE
from flexi_core.run.null_steps.extrapolation import Observer, PredictionHistory
from flexi_core.run.plan import Plan, make_plan
from flexi_core.run.replay import PredictionStore, Replay, digest
from flexi_core.runtime.sampling import SAMPLERS, make_noise, sample
from flexi_core.schedule.presets import all_full
from flexi_core.tune.fit import BlendFit, Equations, TrajectoryRecorder, linear_response, response_at
from search_tools.backends.embedded import EmbeddedBackend
from search_tools.backends.teacher import JUDGE_SEEDS, SEARCH_SEEDS, TeacherSettings

FIT, JUDGED = 8, 24  # samples
CUTOFF = 0.05  # cycles a pixel


@dataclass(frozen=True)
class Rule:
    """How steps are predicted in a run of `Bench.explore`.

    Args:
        terms: of the extrapolation: 1 holds, 2 is linear, and so on.
        fitted: each term's factor, to the teacher's state at the next computed step.
        denoised: it is the denoised latent that is extrapolated, not the derivative.
        log_sigma: in log sigma, not in the number of the step.
        beside: how many terms of the guidance difference are fitted beside these.
        low: whether the terms' low spatial frequencies (`low_frequencies`) are fitted beside them, as FreqCa (Liu et al., 2025)
            caches them apart.
        state: whether the state of the last full step is one more.
        guidance_terms: of the guidance difference in f steps.
        feature_terms: of a partial step's deep feature.
        corrects: a partial step is the fitted extrapolation, and a factor of what its prediction is now less what the full
            step before it predicted.
        depth: of partial steps.
    """

    terms: int = 3
    fitted: bool = True
    denoised: bool = False
    log_sigma: bool = False
    beside: int = 0
    low: bool = False
    state: bool = False
    guidance_terms: int = 1
    feature_terms: int = 1
    corrects: bool = False
    depth: int | None = None


class Bench:
    """Runs of one teacher's samples: the first `FIT` are the search's, the rest, `judged` of them, the judge's."""

    def __init__(self, settings: TeacherSettings, judged: int = JUDGED) -> None:
        self.backend = EmbeddedBackend(settings)
        self.model, self.sigmas, self._solve = self.backend.model, self.backend.sigmas, SAMPLERS[settings.sampler]
        self.noise = torch.cat([make_noise(SEARCH_SEEDS, FIT), make_noise(JUDGE_SEEDS, judged)])
        self.prompts = [*self.backend.prompts(SEARCH_SEEDS, FIT), *self.backend.prompts(JUDGE_SEEDS, judged)]
        self.model.unet.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
        self._conditioning = self.model.conditioning(self.prompts, len(self.noise))
        self.response, self._steps = linear_response(self._solve, self.sigmas), UNetSteps(self.model.unet)
        self._store = PredictionStore()
        recorder = TrajectoryRecorder()
        by_derivative = replace(all_full(settings.steps), basis=DERIVATIVE)
        fitted_on = self._sample(by_derivative, self.sigmas, FIT, recorder)
        self.teacher = torch.cat([fitted_on, self.backend.teacher(JUDGE_SEEDS, judged)])
        self.trajectory = recorder.trajectory

    def psnr(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the PSNR of the judged samples, dB."""
        return psnr_db(latents[FIT:], self.teacher[FIT:])

    def _sample(self, schedule: Schedule | Plan, sigmas: torch.Tensor, count: int, observer: Observer | None) -> torch.Tensor:
        settings, replay = self.backend.settings, Replay(self._store, count)
        options = {"sampler": settings.sampler, "cfg": settings.cfg, "replay": replay, "observer": observer}
        return sample(self.model, schedule, sigmas, self.noise[:count], self.prompts[:count], **options)[0]

    def run(self, letters: str, order: int | None = None, sigmas: torch.Tensor | None = None, count: int | None = None):
        """Return latents [count, ...] of the product's own run: with an order of extrapolation, or with fitted blends.

        They are those of all samples by default.
        """
        sigmas = self.sigmas if sigmas is None else sigmas
        plan = make_plan(Schedule.parse(f"{letters}; order={1 if order is None else order}"), sigmas.tolist())
        if order is not None:
            return self._sample(plan, sigmas, count, None)
        teacher = response_at(self._solve, self.sigmas, self.response, sigmas)
        fit = BlendFit(plan, teacher, linear_response(self._solve, sigmas[list(plan.kept)]))
        fit.begin(self.trajectory)
        return self._sample(plan, sigmas, count, _FirstRows(fit))

    def error(self, letters: str, sigmas: torch.Tensor) -> float:
        """Return the paired error of the samples that blends are fitted on."""
        return float(latent_mse(self.run(letters, sigmas=sigmas, count=FIT), self.teacher[:FIT]).mean())

    @torch.inference_mode()
    def explore(self, letters: str, rule: Rule, sigmas: torch.Tensor | None = None) -> torch.Tensor:
        """Return latents of a run of steps F, f, P, X under a rule that the product does not have."""
        sigmas = self.sigmas if sigmas is None else sigmas
        teacher, own = response_at(self._solve, self.sigmas, self.response, sigmas), linear_response(self._solve, sigmas)
        exploration = Exploration(self, letters, rule, sigmas.tolist(), own, teacher)
        return self._solve(exploration.denoise, self.noise * (1 + sigmas[0] ** 2).sqrt(), sigmas)

    def guided(self, halves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the guided derivative and the guidance difference of both halves [2 B, ...]."""
        without, with_ = halves.chunk(2)
        return without + (with_ - without) * self.backend.settings.cfg, with_ - without

    def full(self, x: torch.Tensor, sigma: torch.Tensor, halves: int, depth: int | None = None) -> list[torch.Tensor]:
        """Return eps [halves B, ...] and with a depth its deep feature, from the store where they are kept."""
        keys = [(digest(x), float(sigma), halves, depth, part) for part in range(1 if depth is None else 2)]
        if not all(key in self._store for key in keys):
            call, forward = self._call(x, sigma, halves), self.model.unet._forward
            prediction, feature = self._steps.full(call, forward, depth)
            for key, value in zip(keys, [prediction, feature and feature["deep"]], strict=False):
                self._store.put(key, value)
        return [self._store.get(key, x.device) for key in keys]

    def partial(self, x: torch.Tensor, sigma: torch.Tensor, depth: int, deep: torch.Tensor) -> torch.Tensor:
        """Return eps [2 B, ...] of the shallow blocks on a deep feature."""
        return partial_pass(self.model.unet, self._call(x, sigma, 2), depth, deep)

    def _call(self, x: torch.Tensor, sigma: torch.Tensor, halves: int) -> NetworkCall:
        cond, uncond = self._conditioning
        rows, context = (torch.cat([x, x]), torch.cat([uncond, cond])) if halves == 2 else (x, cond)
        return NetworkCall(rows / (sigma**2 + 1).sqrt(), self.model.timestep(sigma[None]).expand(len(rows)), context)


class Exploration:
    """One run of a bench under a rule, at noise levels [n + 1], with its solver's response there and the teacher's."""

    def __init__(
        self, bench: Bench, letters: str, rule: Rule, sigmas: list[float], response: torch.Tensor, teacher: torch.Tensor
    ) -> None:
        self.bench, self.letters, self.rule, self._teacher = bench, letters, rule, teacher
        sigmas = sigmas[:-1]
        self._places = [-math.log(s) for s in sigmas] if rule.log_sigma else [float(i) for i in range(len(sigmas))]
        self._response = _denoised_response(response, sigmas) if rule.denoised else response
        self._values, self._guidance = PredictionHistory(4), PredictionHistory(max(rule.guidance_terms, rule.beside))
        self._features = PredictionHistory(rule.feature_terms)
        self._applied: list[torch.Tensor] = []  # by step, of the samples that are fitted on
        self._factors: list[float] = []
        self._full: torch.Tensor | None = None  # the last full step's derivative
        self._state: torch.Tensor | None = None  # and its state

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Return the denoised latent of the next step."""
        i = len(self._applied)
        letter, place, rule = self.letters[i], self._places[i], self.rule
        if letter == "X":
            if self.letters[i - 1] != "X":
                stop = next((j for j in range(i, len(self.letters)) if self.letters[j] != "X"), len(self.letters))
                self._factors = self._fitted(i, stop, [])
            value = self._combined(i, [])
        else:
            value = self._computed(letter, place, x, sigma)
            if letter == "P" and rule.corrects:
                seen = value - self._full
                self._factors = self._fitted(i, i + 1, [seen])
                value = self._combined(i, [seen])
            value = x - sigma * value if rule.denoised else value
            self._values.add(place, value)
        self._applied.append(value[:FIT].double())
        return value if rule.denoised else x - sigma * value

    def _computed(self, letter: str, place: float, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        if letter == "P":
            deep = self._features.extrapolate(place, (1.0,) * self.rule.feature_terms)
            return self.bench.guided(self.bench.partial(x, sigma, self.rule.depth, deep))[0]
        if letter == "f":
            difference = self._guidance.extrapolate(place, (1.0,) * self.rule.guidance_terms)
            return self.bench.full(x, sigma, 1)[0] + (self.bench.backend.settings.cfg - 1) * difference
        halves, *deep = self.bench.full(x, sigma, 2, self.rule.depth if "P" in self.letters[len(self._applied) :] else None)
        self._state = x
        self._full, difference = self.bench.guided(halves)
        self._guidance.add(place, difference)
        for feature in deep:
            self._features.add(place, feature)
        return self._full

    def _terms(self, i: int, seen: list[torch.Tensor]) -> list[torch.Tensor]:
        rule, place = self.rule, self._places[i]
        terms = [self._values.combined(weights) for weights in self._values.changes(place, rule.terms)]
        terms += [low_frequencies(term) for term in terms] if rule.low else []
        terms += [self._guidance.combined(weights) for weights in self._guidance.changes(place, rule.beside)]
        return [*terms, *([self._state] if rule.state else []), *seen]

    def _combined(self, i: int, seen: list[torch.Tensor]) -> torch.Tensor:
        return sum(term * factor for term, factor in zip(self._terms(i, seen), self._factors, strict=True))

    def _fitted(self, first: int, stop: int, seen: list[torch.Tensor]) -> list[float]:
        """Return the factors of steps first to stop with which the state at stop comes nearest to the teacher's."""
        count, row, trajectory = len(self._terms(first, seen)), self._response[stop].tolist(), self.bench.trajectory
        known = len(self._values.changes(self._places[first], self.rule.terms))
        prior = [float(not self.rule.fitted or term < min(2, known)) for term in range(count)]
        prior = torch.tensor(prior, dtype=torch.float64)
        if not self.rule.fitted:
            return prior.tolist()
        missing = trajectory.state(self._teacher, stop) - trajectory.start * row[0]
        for value, gain in zip(self._applied, row[1:], strict=False):
            missing = missing - value * gain
        effects = torch.zeros(FIT, count, missing[0].numel(), dtype=torch.float64)
        for i in range(first, stop):
            effects += torch.stack([term[:FIT].double().flatten(1) for term in self._terms(i, seen)], 1) * row[1 + i]
        return (prior + Equations.of(effects, missing.flatten(1), prior).solution()).tolist()


class _FirstRows:
    """Shows an observer the first `FIT` samples of a run alone."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def see(self, index: int, x: torch.Tensor, derivative: torch.Tensor) -> None:
        self._observer.see(index, x[:FIT], derivative[:FIT])

    def blend(self, index: int, history: PredictionHistory) -> tuple[float, ...] | None:
        return self._observer.blend(index, _FirstRowsOfHistory(history))


class _FirstRowsOfHistory:
    def __init__(self, history: PredictionHistory) -> None:
        self.changes, self._history = history.changes, history

    def combined(self, weights: list[float]) -> torch.Tensor:
        return self._history.combined(weights)[:FIT]


def low_frequencies(images: torch.Tensor) -> torch.Tensor:
    """Return [..., H, W] below about a twentieth of a cycle a pixel: the spectrum under a Gaussian of that deviation."""
    rows, columns = (torch.fft.fftfreq(size, device=images.device) for size in images.shape[-2:])
    window = (-(rows[:, None] ** 2 + columns**2) / (2 * CUTOFF**2)).exp()
    return torch.fft.ifft2(torch.fft.fft2(images) * window).real


def _denoised_response(response: torch.Tensor, sigmas: list[float]) -> torch.Tensor:
    """Return how a solver's states follow from its start and denoised latents, from how they follow from its derivatives."""
    states = torch.zeros_like(response)
    for i, row in enumerate(response):
        states[i, 0] = row[0]
        for j, sigma in enumerate(sigmas[:i]):
            states[i] += row[1 + j] / sigma * states[j]
            states[i, 1 + j] -= row[1 + j] / sigma
    return states
