"""The ready-made schedules: placements of full steps for each kind of sampler and number of steps, chosen by measurement.

    python benchmarks/presets.py --dit scene_dit.safetensors --workers 2      # many hours; goes on where it stopped

Every sampler of the host is probed and belongs to a kind. For each kind, setting, step count and number of full steps,
placements, bases and blends are rehearsed (`rehearsal.py`), and the best of them sampled, on the testbeds: the embedded U-Net
and the small transformer of `scene_dit.py`, with guidance and without, on the grids that people use. The best is then judged
on unseen seeds, under samplers of its kind. It becomes a preset only if it is surely ahead of as many plain steps of that
sampler and scheduler in every one of these runs, and reads no fewer captions. Written:
flexi_core/schedule/data/presets.json, which Flexi Preset offers, docs/results/presets.md, and everything that was measured in
docs/results/presets-trials.json. `--again` judges once more what is known, without choosing.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rehearsal import Rehearsal, record
from rich.console import Console
from scene_dit import scene_model
from scene_host import SceneBackend, SceneModel, embedded_model, open_comfy

from flexi_core import FlexiError, Schedule
from flexi_core.files import write_text
from flexi_core.metrics import data_range, psnr_db
from flexi_core.run.replay import PredictionStore
from flexi_core.run.sampler import probe
from flexi_core.schedule.presets import FAMILY, at_places, full_steps
from search_tools.backends.teacher import JUDGE_SEEDS, SEARCH_SEEDS, TeacherSettings

RESULTS = Path(__file__).parents[1] / "docs" / "results"
SPEEDUPS = (1.25, 1.5, 2.0, 3.0, 5.0)
STEPS = (20, 8, 30, 4, 10, 25, 6, 50, 15, 40)  # what people run most first
# Network, scheduler and guidance scale by setting (`flexi_core.schedule.presets.setting`).
BEDS = {
    "guided, jump to a low end": (("embedded", "normal", 3.0), ("scene DiT", "normal", 3.0)),
    "guided, high end": (("embedded", "simple", 3.0), ("scene DiT", "simple", 3.0)),
    "guided, even low end": (("embedded", "karras", 3.0),),
    "unguided, high end": (("embedded", "simple", 1.0), ("scene DiT", "simple", 1.0)),
    "unguided, jump to a low end": (("embedded", "normal", 1.0), ("scene DiT", "normal", 1.0)),
    "unguided, even low end": (("embedded", "karras", 1.0),),
}
OTHERS = ("simple", "beta")  # schedulers whose fewer plain steps are tried too
# Samplers that a kind's placements are chosen under; judged are all. The first ones are what people run.
CHOSEN_UNDER = ("euler", "dpmpp_2m", "res_multistep", "uni_pc", "gradient_estimation", "euler_ancestral", "lcm", "er_sde",
                "dpmpp_2m_sde", "dpmpp_3m_sde", "heun", "dpm_2", "sa_solver", "res_multistep_ancestral", "dpm_2_ancestral",
                "dpmpp_2s_ancestral", "seeds_2", "heunpp2", "seeds_3", "dpmpp_sde")  # fmt: skip
RARE = 4  # step counts of the usual kinds that come before the first of a rare one
REHEARSED = 8  # of a teacher's samples that schedules are rehearsed on
MOVES = 4  # of single full steps, in rehearsal
TRIED = 3  # schedules that did best in rehearsal, and are sampled
JUDGED_UNDER = 2  # samplers of a kind
OTHERS_ON = 0.5  # of the samples other schedulers are tried: they are only told of
ENUMERATED = 35  # placements: where there are no more, all are tried
BENDS = ((1.0, 1.0), (1.3, 1.0), (1.0, 1.3), (1.3, 1.6))  # towards the start, the end
BLENDS = {
    "derivative": ((1.0, 1.0), (1.0, 0.7), (1.0, 0.8, 0.3)),
    "denoised": ((1.0, 0.5), (1.0,), (1.0, 0.25), (1.0, 0.8), (1.0, 0.8, 0.3)),
}
READ = 0.6  # of what Euler's captions are read: a teacher below it is broken, and no testbed
UNSURE = 1.0  # dB: taken off a lead whose standard error is not known
SHORT = 10  # steps of the runs that are judged on twice as many samples: they are cheap, and their pictures differ more
_err = Console(stderr=True)


@dataclass(frozen=True)
class Made:
    """How samples came out.

    Args:
        psnr_db: to the teacher's [count].
        read: share of the pictures that are what their captions ask.
    """

    psnr_db: torch.Tensor
    read: float


@dataclass(frozen=True)
class Lead:
    """What a schedule did in one run, and as many plain steps: dB, means over the samples.

    Args:
        run: its name.
        made, plain: of both.
    """

    run: str
    made: Made
    plain: Made

    @property
    def mean_db(self) -> float:
        return float((self.made.psnr_db - self.plain.psnr_db).mean())

    @property
    def sure_db(self) -> float:
        """The mean less its standard error."""
        leads = self.made.psnr_db - self.plain.psnr_db
        return self.mean_db - float(leads.std() / len(leads) ** 0.5)


class Bed:
    """One model under one sampler and scheduler, at any number of steps.

    Args:
        scenes: the model.
        sampler, scheduler: names of the host's.
        cfg: guidance scale.
        batch: samples at once.
    """

    def __init__(self, scenes: SceneModel, sampler: str, scheduler: str, cfg: float, batch: int) -> None:
        self.scenes, self.sampler, self.scheduler, self.cfg, self.batch = scenes, sampler, scheduler, cfg, batch
        self.name = f"{scenes.name}, {sampler}, {scheduler}, cfg {cfg:g}"
        self._backends: dict[int, SceneBackend] = {}
        self._plain: dict[tuple, float] = {}
        self._teachers: dict[tuple, torch.Tensor] = {}
        self._rehearsals: dict[int, Rehearsal] = {}
        self._stores: dict[int, PredictionStore] = {}

    def backend(self, steps: int) -> SceneBackend:
        """Return the back end of a step count."""
        if steps not in self._backends:
            self._backends[steps] = SceneBackend(self.scenes, TeacherSettings(self.sampler, self.scheduler, steps, self.cfg))
            self._backends[steps].batch = self.batch
        return self._backends[steps]

    def rehearsed(self, schedule: Schedule) -> float:
        """Return the mean PSNR that a schedule's samples would have to the teacher's, dB, without asking the network."""
        steps = len(schedule)
        if steps not in self._rehearsals:
            self._rehearsals[steps] = self._rehearsal(steps)
        return float(self._against(steps, self._rehearsals[steps].end(schedule), SEARCH_SEEDS).mean())

    def made(self, schedule: Schedule, seed: int, count: int) -> Made:
        """Return how a schedule's samples come out."""
        steps = len(schedule)
        store = self._stores.setdefault(steps, PredictionStore(2**28))
        return self._seen(steps, self.backend(steps).sample(schedule, seed, count, predictions=store).latents, seed)

    def plain(self, steps: int, full: int, seed: int, count: int, scheduler: str | None = None) -> Made:
        """Return how as many plain steps come out."""
        scheduler = None if scheduler == self.scheduler else scheduler
        key = steps, full, seed, count, scheduler
        if key not in self._plain:
            made = self.backend(steps).draw(self.scenes.model, seed, count, steps=full, scheduler=scheduler)
            self._plain[key] = self._seen(steps, made, seed)
        return self._plain[key]

    def read(self, steps: int, seed: int, count: int) -> float:
        """Return the share of the teacher's pictures that are what their captions ask."""
        return self._read(steps, self._teacher(steps, seed, count), seed)

    def forget(self) -> None:
        """Drop kept predictions and rehearsals."""
        self._stores.clear()
        self._rehearsals.clear()

    def _teacher(self, steps: int, seed: int, count: int) -> torch.Tensor:
        key = steps, seed, count
        if key not in self._teachers:
            self._teachers[key] = self.backend(steps).draw(self.scenes.model, seed, count)
        return self._teachers[key]

    def _rehearsal(self, steps: int) -> Rehearsal:
        import comfy.model_sampling
        import comfy.samplers
        from comfy.patcher_extension import WrappersMP

        from flexi_core.host import HostSolver

        backend, model = self.backend(steps), self.scenes.model

        def run(see: Callable[[torch.Tensor, float, torch.Tensor], None]) -> torch.Tensor:
            def watched(executor, x, timestep, model_options=None, seed=None):
                denoised = executor(x, timestep, model_options or {}, seed)
                see(x, float(timestep.max()), denoised)
                return denoised

            clone = model.clone()
            clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "rehearsal", watched)
            return backend.draw(clone, SEARCH_SEEDS, REHEARSED)

        recorded = record(run, backend.sigmas)
        self._teachers[steps, SEARCH_SEEDS, REHEARSED] = recorded.end
        solve = HostSolver(comfy.samplers.sampler_object(self.sampler), model)
        flow = isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST)
        traits = probe(solve, backend.sigmas.tolist())
        return Rehearsal(solve, SEARCH_SEEDS, recorded, traits, flow)

    def _seen(self, steps: int, latents: torch.Tensor, seed: int) -> Made:
        return Made(self._against(steps, latents, seed), self._read(steps, latents, seed))

    def _read(self, steps: int, latents: torch.Tensor, seed: int) -> float:
        return float(self.backend(steps).caption_accuracy(latents, seed).double().mean())

    def _against(self, steps: int, latents: torch.Tensor, seed: int) -> torch.Tensor:
        """Return the PSNR of samples to the teacher's, dB [count]."""
        backend = self.backend(steps)
        teacher = backend.pictures(self._teacher(steps, seed, len(latents)))
        made = backend.pictures(latents.float()).nan_to_num(nan=1e3, posinf=1e3, neginf=-1e3)
        return psnr_db(made, teacher, data_range(teacher)).double().clamp(max=99)


def placements(steps: int, full: int) -> Iterator[tuple[int, ...]]:
    """Yield places of the full steps: all there are where they are few, else a head of them and an even or bent rest."""
    if math.comb(steps - 1, full - 1) <= ENUMERATED:
        yield from ((0, *rest) for rest in itertools.combinations(range(1, steps), full - 1))
        return
    for head in sorted({1, max(1, round(full / 3))}):
        for last in sorted({steps - 1, max(steps - max(2, round(steps / full)), full - 1)}):
            for start, end in BENDS:
                yield bent(steps, full, head, last, start, end)


def bent(steps: int, full: int, head: int, last: int, start: float, end: float) -> tuple[int, ...]:
    """Return places: `head` full steps, then the rest up to `last`, denser towards the start or the end."""
    u = np.linspace(0, 1, full - head + 1)
    bends = 1 - (1 - u**start) ** end
    places = {*range(head), *(round(head - 1 + float(b) * (last - head + 1)) for b in bends)}
    for place in (*range(last, -1, -1), *range(steps)):  # two that fell together
        if len(places) == full:
            break
        places.add(place)
    return tuple(sorted(places))


def neighbours(steps: int, places: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the placements with one full step, not the first, moved by one, the last ones first."""
    found = []
    for i in reversed(range(1, len(places))):
        for shift in (-1, 1):
            moved = places[i] + shift
            if 0 < moved < steps and moved not in places:
                found.append(tuple(sorted([*places[:i], moved, *places[i + 1 :]])))
    return found


@dataclass(frozen=True)
class Choice:
    """Places of full steps, and how the others are extrapolated."""

    steps: int
    places: tuple[int, ...]
    basis: str
    blend: tuple[float, ...]

    @property
    def schedule(self) -> Schedule:
        return replace(at_places(self.steps, self.places, self.blend), basis=self.basis)


class Chooser:
    """Finds the schedule of a step count and a number of full steps that is furthest ahead of plain steps.

    Args:
        beds: to choose on, the most telling first.
        samples: to choose on; 0 leaves the choice to the rehearsal.
        quick: whether only the best of another step count and the best in rehearsal are sampled, on the first testbed.
    """

    def __init__(self, beds: Sequence[Bed], samples: int, quick: bool) -> None:
        self._beds, self._samples, self._quick = beds, samples, quick
        self._known: dict[tuple, float] = {}

    def best(self, steps: int, full: int, start: Sequence[Choice], draws_noise: bool) -> Choice:
        """Return the best that was found.

        Args:
            steps: of the run.
            full: of these.
            start: what was best at other numbers, to try too.
            draws_noise: whether the samplers do: then the derivative is no basis.
        """
        bases = ("denoised",) if draws_noise else ("derivative", "denoised")
        usual = [Choice(steps, p, basis, BLENDS[basis][0]) for p in placements(steps, full) for basis in bases]
        ranked = self._by_rehearsal([*start, *usual])
        blends = [replace(c, basis=b, blend=blend) for c in ranked[:4] for b in bases for blend in BLENDS[b]]
        best = self._by_rehearsal(blends)
        if not self._samples:
            return self._climbed(best[0])
        tried = [*dict.fromkeys([self._climbed(best[0]), *self._by_rehearsal(start)[:1], best[0], ranked[0], *best[1:]])]
        if self._quick:
            return max(tried[:2], key=lambda c: self._score(c, self._beds[:1]))
        by_first = sorted(tried[:TRIED], key=lambda c: -self._score(c, self._beds[:1]))
        others = [replace(by_first[0], basis=b, blend=blend) for b in bases for blend in BLENDS[b]]
        return max(
            dict.fromkeys([*by_first[:2], *self._by_rehearsal(others)[:2]]), key=lambda c: self._score(c, self._beds[:2])
        )

    def _by_rehearsal(self, choices: Iterable[Choice]) -> list[Choice]:
        return sorted(dict.fromkeys(choices), key=lambda c: -self._rehearsed(c))

    def _rehearsed(self, choice: Choice) -> float:
        if choice not in self._known:
            self._known[choice] = statistics.mean(bed.rehearsed(choice.schedule) for bed in self._beds[:2])
        return self._known[choice]

    def _climbed(self, choice: Choice) -> Choice:
        """Return a choice that no move of one full step by one makes better in rehearsal, or that was moved often."""
        for _ in range(MOVES):
            better = self._by_rehearsal([choice, *(replace(choice, places=p) for p in neighbours(choice.steps, choice.places))])
            if self._rehearsed(better[0]) <= self._rehearsed(choice) + 0.05:
                break
            choice = better[0]
        return choice

    def _score(self, choice: Choice, beds: Sequence[Bed]) -> float:
        """Return the mean lead, dB, a lead of more than 10 counted as that and a loss twice."""
        gains = [self._gain(choice, bed) for bed in beds]
        return statistics.mean(min(gain, 10.0) for gain in gains) + min(0.0, *gains)

    def _gain(self, choice: Choice, bed: Bed) -> float:
        key = choice, bed.name
        if key not in self._known:
            made = bed.made(choice.schedule, SEARCH_SEEDS, self._samples)
            plain = bed.plain(choice.steps, len(choice.places), SEARCH_SEEDS, self._samples)
            self._known[key] = Lead(bed.name, made, plain).mean_db
        return self._known[key]


class Measurer:
    """Everything that one process measures with.

    Args:
        dit: weights of `scene_dit.py`; None leaves the transformer out.
        samples: to choose on.
        judged: to judge on.
        quick: as `Chooser`'s.
        under: how many samplers of a kind.
    """

    def __init__(self, dit: Path | None, samples: int, judged: int, quick: bool, under: int) -> None:
        self._samples, self._judged, self._quick, self._under = samples, judged, quick, under
        self._models = {"embedded": embedded_model()} | ({} if dit is None else {"scene DiT": scene_model(dit)})

    @cache  # noqa: B019 (one for each process)
    def bed(self, network: str, sampler: str, scheduler: str, cfg: float) -> Bed:
        """Return a testbed."""
        return Bed(self._models[network], sampler, scheduler, cfg, 2 * max(self._samples, self._judged))

    def beds(self, setting: str, sampler: str, steps: int) -> list[Bed]:
        """Return the testbeds of a setting under a sampler whose teachers are not broken."""
        found = []
        for network, scheduler, cfg in BEDS[setting]:
            if network in self._models:
                bed, euler = self.bed(network, sampler, scheduler, cfg), self.bed(network, "euler", scheduler, cfg)
                if bed.read(steps, JUDGE_SEEDS, self.judged(steps)) >= READ * euler.read(20, JUDGE_SEEDS, self._judged):
                    found.append(bed)
        return found

    def choose(
        self, setting: str, samplers: Sequence[str], steps: int, draws_noise: bool, known: Sequence[Choice]
    ) -> dict[str, Any]:
        """Return the chosen schedules of a kind, a setting and a step count with what was measured, by their full steps.

        Args:
            setting: of `BEDS`.
            samplers: of the kind; the first ones are chosen and judged under.
            steps: of the run.
            draws_noise: whether they do.
            known: what was chosen at another step count.
        """
        beds = {sampler: self.beds(setting, sampler, steps) for sampler in samplers[: self._under]}
        # The samplers and the testbeds by turns.
        rows = [of_sampler[i:] + of_sampler[:i] for i, of_sampler in enumerate(beds.values())]
        chosen_on = [bed for row in itertools.zip_longest(*rows) for bed in row if bed]
        entries: dict[str, Any] = {}
        if not chosen_on:
            return entries
        chooser = Chooser(chosen_on, self._samples, self._quick)
        for full in sorted({full_steps(steps, s) for s in SPEEDUPS} - {steps, 1}, reverse=True):
            start = [scaled(choice, steps, full) for choice in known]
            best = chooser.best(steps, full, start, draws_noise)
            entries[str(full)] = {"schedule": str(best.schedule), "measured": self._judge(best.schedule, full, beds)}
        for bed in chosen_on:
            bed.forget()
        return entries

    def again(self, setting: str, samplers: Sequence[str], steps: int, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Return entries as they are judged now."""
        beds = {sampler: self.beds(setting, sampler, steps) for sampler in samplers[: self._under]}
        if not any(beds.values()):
            return {}
        judged = {
            full: entry | {"measured": self._judge(Schedule.parse(entry["schedule"]), int(full), beds)}
            for full, entry in entries.items()
        }
        for bed in itertools.chain(*beds.values()):
            bed.forget()
        return judged

    def judged(self, steps: int) -> int:
        """Return how many samples runs are judged on."""
        return self._judged * (2 if steps <= SHORT else 1)

    def _judge(self, schedule: Schedule, full: int, beds: Mapping[str, Sequence[Bed]]) -> dict[str, Any]:
        steps, count = len(schedule), self.judged(len(schedule))
        leads = [
            Lead(bed.name, bed.made(schedule, JUDGE_SEEDS, count), bed.plain(steps, full, JUDGE_SEEDS, count))
            for bed in itertools.chain(*beds.values())
        ]
        first = next(itertools.chain(*beds.values()))
        some = math.ceil(OTHERS_ON * count)
        others = {name: float(first.plain(steps, full, JUDGE_SEEDS, some, name).psnr_db.mean()) for name in OTHERS}
        other = max(others, key=others.get)
        worst = min(leads, key=lambda lead: lead.sure_db)
        return {
            "psnr_db": round(statistics.mean(float(lead.made.psnr_db.mean()) for lead in leads), 1),
            "plain_db": round(statistics.mean(float(lead.plain.psnr_db.mean()) for lead in leads), 1),
            "other": other,
            "other_db": round(others[other], 1),
            "least_lead_db": round(worst.mean_db, 2),
            "least_sure_db": round(worst.sure_db, 2),
            "least_in": worst.run,
            "read": round(statistics.mean(lead.made.read for lead in leads), 4),
            "plain_read": round(statistics.mean(lead.plain.read for lead in leads), 4),
            "runs": [lead.run for lead in leads],
            "samples": count,
        }


def scaled(choice: Choice, steps: int, full: int) -> Choice:
    """Return a choice laid over another number of steps and of full ones."""
    old = choice.places
    wanted = np.interp(np.linspace(0, 1, full), np.linspace(0, 1, len(old)), old) / (choice.steps - 1) * (steps - 1)
    places = {0, *(round(float(place)) for place in wanted)}
    for place in range(steps):
        if len(places) == full:
            break
        places.add(place)
    return Choice(steps, tuple(sorted(places)), choice.basis, choice.blend)


def choice_of(text: str) -> Choice:
    """Return the choice that a schedule's text stands for."""
    schedule = Schedule.parse(text)
    places = tuple(i for i, letter in enumerate(schedule.letters) if letter == "F")
    return Choice(len(schedule), places, schedule.basis, next(s.blend for s in schedule.segments if s.blend))


def kinds_of_samplers() -> dict[str, list[str]]:
    """Return the host's samplers by kind, without those that presets stand down for and without twins on the GPU."""
    import comfy.samplers

    from flexi_core.host import HostSolver

    model, found = embedded_model().model, defaultdict(list)
    grid = comfy.samplers.KSampler(model, 20, model.load_device, "euler", "normal", denoise=1.0).sigmas.tolist()
    for name in comfy.samplers.SAMPLER_NAMES:
        traits = probe(HostSolver(comfy.samplers.sampler_object(name), model), grid)
        if traits and traits.keeps_levels and not traits.reads_guidance and not name.endswith("_gpu") and name != "ddim":
            found[traits.kind].append(name)
    rank = {name: i for i, name in enumerate(CHOSEN_UNDER)}
    return {kind: sorted(names, key=lambda n: rank.get(n, len(rank))) for kind, names in found.items()}


def work(jobs: Any, done: Any, comfyui: Path, device: str, until: float, measuring: tuple) -> None:
    """Measure what is asked for until there is no more, or the time is up; run in a process of its own."""
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    open_comfy(comfyui, device)
    measurer = Measurer(*measuring)
    while (job := jobs.get()) is not None:
        kind, setting, samplers, steps, texts, entries = job
        if time.time() > until:
            done.put((kind, setting, steps, None))
            continue
        try:
            if entries:
                entries = measurer.again(setting, samplers, steps, entries)
            else:
                known = [choice_of(text) for text in texts]
                entries = measurer.choose(setting, samplers, steps, not kind.startswith("no noise"), known)
        except Exception as error:  # the others go on
            _err.print(f"{kind}, {setting}, {steps} steps: {type(error).__name__}: {error}", highlight=False)
            entries = None
        done.put((kind, setting, steps, entries))


def offered(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that are surely ahead of plain steps in every run, and read no fewer captions."""
    return {full: entry for full, entry in entries.items() if is_ahead(entry["measured"])}


def is_ahead(measured: Mapping[str, Any]) -> bool:
    """Return whether a schedule does better than as many plain steps, by what was measured of it."""
    return sure_db(measured) > 0 and measured.get("read", 1) >= measured.get("plain_read", 0)


def sure_db(measured: Mapping[str, Any]) -> float:
    """Return the least lead less its standard error, which those that were judged first, on 8 or 32 samples, do not have."""
    return measured.get("least_sure_db", measured["least_lead_db"] - UNSURE)


def main(
    dit: Annotated[Path | None, typer.Option(help="Weights of scene_dit.py; without it the U-Net alone.")] = None,
    comfyui: Annotated[Path, typer.Option(help="A ComfyUI checkout.")] = Path("~/comfy/ComfyUI"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    minutes: Annotated[float, typer.Option(help="After which no new step count of a kind is begun.")] = 1e6,
    kinds: Annotated[str, typer.Option(help="Beginnings of kinds' names, separated by semicolons; all by default.")] = "",
    settings: Annotated[str, typer.Option(help="Beginnings of settings' names, separated by semicolons.")] = "",
    samples: Annotated[int, typer.Option(min=0, help="To choose on; 0 leaves it to the rehearsal.")] = REHEARSED,
    judged: Annotated[int, typer.Option(help="To judge on.")] = 16,
    under: Annotated[int, typer.Option(min=1, help="Samplers of a kind, the most used ones.")] = JUDGED_UNDER,
    counts: Annotated[str, typer.Option(help="Step counts, separated by commas; all by default.")] = "",
    again: Annotated[bool, typer.Option("--again", help="Judge what is known, where that is of fewer testbeds.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Choose again what is known, from that.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Sample only two: the best of a near step count, the best in rehearsal.")
    ] = False,
    trials: Annotated[Path, typer.Option(help="Everything that was measured, also what is not offered.")] = (
        RESULTS / "presets-trials.json"
    ),
    out: Annotated[Path, typer.Option(help="The presets' file.")] = FAMILY,
) -> None:
    """Choose, judge and write the ready-made schedules."""
    until = time.time() + 60 * minutes
    open_comfy(comfyui, device)
    found = kinds_of_samplers()
    known = json.loads(trials.read_text(encoding="utf-8")) if trials.exists() else {}
    wanted = [int(count) for count in counts.split(",")] if counts else list(STEPS)
    waiting = [
        (kind, setting, samplers, steps)
        for steps in wanted
        for kind, samplers in found.items()
        for setting in BEDS
        if kind.startswith(tuple(kinds.split(";"))) and setting.startswith(tuple(settings.split(";")))
        if fresh or _is_wanted(setting, known.get(kind, {}).get(setting, {}).get(str(steps)), again, dit is not None)
    ]
    usual = {kind: min(map(CHOSEN_UNDER.index, {*samplers} & {*CHOSEN_UNDER})) for kind, samplers in found.items()}
    waiting.sort(key=lambda job: wanted.index(job[3]) + (RARE if usual[job[0]] >= CHOSEN_UNDER.index("heun") else 0))
    context = multiprocessing.get_context("spawn")
    jobs, done = context.Queue(), context.Queue()
    processes = [
        context.Process(target=work, args=(jobs, done, comfyui, device, until, (dit, samples, judged, quick, under)))
        for _ in range(workers)
    ]
    for process in processes:
        process.start()
    under_way = 0
    began = time.time()
    finished = 0
    total = len(waiting)
    while waiting or under_way:
        while waiting and under_way < workers:
            kind, setting, samplers, steps = waiting.pop(0)
            counts_of = known.get(kind, {}).get(setting, {})
            near = min(counts_of, key=lambda count: abs(math.log(int(count) / steps)), default=None)
            texts = [entry["schedule"] for entry in counts_of[near].values()] if near else []
            jobs.put((kind, setting, samplers, steps, texts, counts_of.get(str(steps)) if again else None))
            under_way += 1
        kind, setting, steps, entries = done.get()
        under_way -= 1
        finished += 1
        if entries is not None:
            known.setdefault(kind, {}).setdefault(setting, {})[str(steps)] = entries
            left = (time.time() - began) / finished * (total - finished) / 60
            leads = {full: entry["measured"]["least_lead_db"] for full, entry in entries.items()}
            kept = "/".join(offered(entries))
            said = f"{kind}; {setting}; {steps}: {leads}; offered {kept or 'none'}; {left:.0f} minutes left"
            _err.print(said, highlight=False, soft_wrap=True)
            write_text(trials, json.dumps(known, indent=1) + "\n")
    for _ in processes:
        jobs.put(None)
    for process in processes:
        process.join()
    presets: dict[str, Any] = {}
    for kind, setting, steps, entries in _cells(known, found):
        if kept := offered(entries):
            presets.setdefault(kind, {}).setdefault(setting, {})[steps] = kept
    write_text(out, json.dumps(presets, indent=1) + "\n")
    page = "\n".join(_page(known, found)) + "\n"
    write_text(RESULTS / "presets.md", page)
    print(page)


def _is_wanted(setting: str, entries: Mapping[str, Any] | None, again: bool, transformer: bool) -> bool:
    """Return whether a cell is to be measured: as it is not known, or again as it is not known of all testbeds."""
    if not again or not entries:
        return entries is None and not again
    measured = [entry["measured"] for entry in entries.values()]
    if not all("least_sure_db" in m for m in measured):
        return True
    missing = transformer and any(network == "scene DiT" for network, _, _ in BEDS[setting])
    return missing and not any(run.startswith("scene DiT") for m in measured for run in m["runs"])


def _cells(known: Mapping[str, Any], found: Iterable[str]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yield the kind, the setting, the steps and the entries of everything that was measured, in order."""
    for kind in found:
        for setting in BEDS:
            counts = known.get(kind, {}).get(setting, {})
            for steps in sorted(counts, key=int):
                yield kind, setting, steps, counts[steps]


def _page(known: Mapping[str, Any], found: Mapping[str, Sequence[str]]) -> list[str]:
    lines = [
        "# Ready-made schedules",
        "",
        "Made by `python benchmarks/presets.py`. Mean PSNR to the run of all steps, dB; as few plain steps of the same sampler",
        "and scheduler; the least lead in any run. Unseen seeds; testbeds: "
        + "; ".join(dict.fromkeys(f"{n}, {s}, cfg {c:g}" for beds in BEDS.values() for n, s, c in beds))
        + ".",
        "One run is one sampler on one testbed. A schedule is offered where its least lead is above its standard error,",
        "and where the pictures of all runs together read no fewer captions than those of plain steps. Where captions are not",
        f"given, no standard error was kept either, and {UNSURE:g} dB is taken for it.",
    ]
    shown: set[tuple[str, str]] = set()
    for kind, setting, steps, entries in _cells(known, found):
        if (kind, setting) not in shown:
            shown.add((kind, setting))
            lines += ["", f"## {kind}; {setting}", "", ", ".join(found[kind]), ""]
            lines += [
                "| steps | full | PSNR | plain | other scheduler, plain | least lead | read (plain) | runs, samples | offer |",
                "|-|-|-|-|-|-|-|-|-|",
            ]
        for full, entry in entries.items():
            m = entry["measured"]
            offers = "yes" if is_ahead(m) else "no"
            read = f"{m['read']:.2f} ({m['plain_read']:.2f})" if "read" in m else ""
            runs = m["runs"] if isinstance(m["runs"], int) else len(m["runs"])
            lines.append(
                f"| {steps} | {full} | {m['psnr_db']} | {m['plain_db']} | {m['other_db']} ({m['other']}) | "
                f"{m['least_lead_db']:+} ± {m['least_lead_db'] - sure_db(m):.1f} ({m['least_in']}) | {read} | "
                f"{runs}, {m['samples']} | {offers} |"
            )
    return lines


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    try:
        typer.run(main)
    except FlexiError as error:
        sys.exit(str(error))
