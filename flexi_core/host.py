"""The host adapter: the one module that knows ComfyUI. Public hooks only; nothing of the host is assigned to."""

from __future__ import annotations

import hashlib
import logging
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.latent_formats
import comfy.ldm.modules.attention
import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import comfy.supported_models_base
import torch
from comfy.patcher_extension import CallbacksMP, WrapperExecutor, WrappersMP

from .again import Again, again
from .cache import PLACES, CachePolicy
from .control_steps import ShallowControl
from .demo.captions import embed_captions
from .demo.model import TOKEN_TABLE, read_weights
from .demo.model import WEIGHTS as DEMO_WEIGHTS
from .demo.scenes import parse_caption
from .errors import FlexiError, ScheduleError
from .extrapolation import Observer
from .fingerprint import architecture_fingerprint, weights_fingerprint
from .graphs import keep_outside, outside_graphs
from .live import LiveRun
from .nested_samplers import OwnLevel, listened
from .plan import Plan, between_ends, check_levels, make_plan, same_grid, window_of
from .presets import Preset, is_served
from .replay import Replay
from .report import RunReport
from .run import Run, processor_time
from .sampler import PLAIN, SamplerTraits, Solver, probe
from .schedule import Schedule
from .schedule_file import size_text, teacher_from
from .stages.bounds import Boundary, Stages, with_boundary
from .stages.network import load_stages, with_decoder
from .stages.options import in_place_of
from .transformer_steps import ModelCall
from .tune import Facts, Learner, Lesson
from .unet_steps import NetworkCall, block_count

log = logging.getLogger(__name__)

KEY = "flexiffusion"
JOIN = "flexiffusion_join"  # of what joins two models
STAGED = "flexiffusion_stages"  # of a model with a decoder for each stage
STAGE_NAMES = ("high noise", "low noise")
ON_MISMATCH = ("map", "refuse", "off")
_PATCHED = "the network's weights are patched (a LoRA)"
_PATCH_VALUES = 64  # read from each tensor of a patch
_LATENT_TYPES = (torch.float32, torch.float16, torch.bfloat16)  # in which hosts hand latents on
_REPORTS_KEPT = 8  # a graph may sample several times with one model
_RUNS_KEPT = 2  # what they began from, each with the size of two latents
# Core's own step caches, by the key of their wrappers.
_OTHER_CACHES = {"easycache": "EasyCache", "lazycache": "LazyCache"}
_SAME_FUNCTION = {"ddim": "euler", "uni_pc": "unipc", "uni_pc_bh2": "unipc_bh2"}


class RunHandle:
    """Where the reports of a patched model's last runs are found. Sampling writes to it and never reads from it."""

    def __init__(self) -> None:
        # With the digests of what the run made; None where they could not be taken.
        self._reports: deque[tuple[frozenset[str] | None, RunReport]] = deque(maxlen=_REPORTS_KEPT)
        self._begun: deque[tuple[frozenset[str], Again]] = deque(maxlen=_RUNS_KEPT)
        self.leads = False  # whether this model's own schedule is around the run that is made
        self.stands_aside = False  # for a run of full steps, which leaves no report

    @property
    def report(self) -> RunReport | None:
        """The last run's report; None before the first run has ended."""
        return self._reports[-1][1] if self._reports else None

    def report_of(self, latent: Any) -> RunReport | None:
        """Return the report of the run that made a latent (see `packed`); None where none of those kept did."""
        digest = _digest(latent)
        return next((report for made, report in reversed(self._reports) if made is None or digest in made), None)

    def full_run(self, latent: Any, on_step: Callable[[], None]) -> tuple[torch.Tensor, float] | None:
        """Sample the run that made a latent once more, with every step computed.

        Args:
            latent: of one of the last runs, as `report_of` takes it.
            on_step: is called after each step.

        Returns:
            its latent and the seconds that it took; None where what it began from is no longer known.
        """
        begun = self.begun(latent)
        if begun is None:
            return None
        self.stands_aside = True
        try:
            return begun.sample(on_step)
        finally:
            self.stands_aside = False

    def begun(self, latent: Any) -> Again | None:
        """Return what the run that made a latent began from; None where it is no longer known."""
        digest = _digest(latent)
        return next((begun for made, begun in reversed(self._begun) if digest in made), None)

    def see_start(self, _: comfy.model_patcher.ModelPatcher) -> None:
        """Say so where the model is made ready for a run that another model leads: it is the second one of a guider."""
        if not self.leads:
            note = (
                "The schedule did not run: this model is the second one of its guider, and the first one's schedule is for "
                "both. Put Flexi Apply before the first."
            )
            self.keep(lambda: RunReport(None, 0.0, [note]), None, 0.0)

    def keep(
        self,
        report: Callable[[], RunReport],
        made: Callable[[], Sequence[torch.Tensor]] | None,
        seconds: float,
        begun: Again | None = None,
    ) -> None:
        """Add the report of a run that came to its end, the latents that it made and what it began from; this never raises."""
        try:
            digests = made and frozenset(_digest(latent.to(dtype)) for latent in made() for dtype in _LATENT_TYPES)
            self._reports.append((digests, report()))
            if begun is not None:
                self._begun.append((digests, begun))
        except Exception as error:  # the picture is there, and stays
            log.exception("Flexiffusion: the report of a run failed")
            self._reports.append(
                (None, RunReport(None, seconds, [f"{_failed('The report', error)} The picture is as planned."]))
            )


def apply_schedule(
    model: comfy.model_patcher.ModelPatcher,
    schedule: Schedule | Preset | Learner,
    on_mismatch: str = "map",
    cache: str = "auto",
    cache_limit_mib: float = 0,
    replay: Callable[[], Replay] | None = None,
    observe: Callable[[Plan, Solver], Observer | None] | None = None,
    live: Callable[[Plan | None, str], LiveRun] | None = None,
) -> tuple[comfy.model_patcher.ModelPatcher, RunHandle]:
    """Return a clone of a model that samples under a schedule, and the handle of its reports.

    The clone carries only this immutable schedule; the state of a run is made when sampling starts and dropped when it ends.

    Args:
        model: any model of the host.
        schedule: of any length; or a preset, or what learns from the model's runs: these say when each run starts what it is.
        on_mismatch: what to do when the run is not the one the schedule was made for: `map` it, `refuse` to sample, or
            turn the schedule `off`.
        cache: where deep features are kept, one of `PLACES`; `auto` is the device's memory while that leaves room, else RAM.
        cache_limit_mib: features that do not fit are not kept, and their partial steps run in full; 0 is no limit.
        replay: makes a run's view of a store of predictions, for searches that sample one run many times.
        observe: makes what follows a run's derivatives, from its plan and its sampler.
        live: makes what tells how a run goes on, from its plan and its schedule's text; from None for plain sampling.

    Raises:
        FlexiError: on_mismatch or cache is not one of the known, or the limit is negative.
    """
    for value, name, known in ((on_mismatch, "on_mismatch", ON_MISMATCH), (cache, "cache", PLACES)):
        if value not in known:
            raise FlexiError(f"{name} is {value!r}; expected one of {', '.join(known)}")
    if not cache_limit_mib >= 0:
        raise FlexiError(f"cache_limit_mib is {cache_limit_mib}; expected 0 (no limit) or more")
    limit = cache_limit_mib * 2**20 if cache_limit_mib else float("inf")
    policy = CachePolicy(cache, limit, comfy.model_management.get_free_memory)
    clone, handle = model.clone(), RunHandle()
    # One schedule per model: a later Apply node takes the earlier one's place.
    earlier = bool(model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY))
    wrappers = {
        WrappersMP.OUTER_SAMPLE: _OuterSample(schedule, on_mismatch, policy, handle, earlier, replay, observe, live),
        **_ASKED_AT,
        WrappersMP.CALC_COND_BATCH: _calc_cond_batch,
        WrappersMP.APPLY_MODEL: _apply_model,
        WrappersMP.DIFFUSION_MODEL: _diffusion_model,
    }
    for kind, wrapper in wrappers.items():
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    _put_in_order(clone)
    clone.remove_callbacks_with_key(CallbacksMP.ON_PRE_RUN, KEY)
    clone.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, handle.see_start)
    return clone, handle


class _Refused(FlexiError):
    """The run is not the schedule's, and was to be refused then."""


@dataclass(frozen=True)
class _Laid:
    """A schedule laid over a run.

    Args:
        plan: None for plain sampling.
        words: what the report says first.
        notes: what it says last.
        schedule: that a preset, or what was learned, became.
        lesson: what is learned of the run.
    """

    plan: Plan | None
    words: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    schedule: Schedule | None = None
    lesson: Lesson | None = None


class _HostRun:
    """The run with what the adapter has to remember of it; lives in the run's own model options."""

    def __init__(self, run: Run, post_cfg_functions: int, own: OwnLevel, has_two_models: bool) -> None:
        self.run, self.post_cfg_functions, self.own = run, post_cfg_functions, own
        self.has_two_models = has_two_models

    def __deepcopy__(self, memo: dict) -> _HostRun:
        return self  # of options that are copied for a call: the run stays one


class _OuterSample:
    """Makes and drops the run, and hands the sampler the sigmas without the removed steps."""

    def __init__(
        self,
        schedule: Schedule | Preset | Learner,
        on_mismatch: str,
        policy: CachePolicy,
        handle: RunHandle,
        earlier: bool,
        replay: Callable[[], Replay] | None,
        observe: Callable[[Plan, Solver], Observer | None] | None,
        live: Callable[[Plan | None, str], LiveRun] | None,
    ) -> None:
        self.schedule, self.on_mismatch, self.policy, self.handle, self.replay = schedule, on_mismatch, policy, handle, replay
        self.observe, self.live = observe, live
        self.notes = ("The schedule takes the place of an earlier one on this model.",) if earlier else ()

    def __call__(self, executor, *args, **kwargs):
        self.handle.leads = True
        try:
            return (executor if self.handle.stands_aside else partial(self._sample, executor))(*args, **kwargs)
        finally:
            self.handle.leads = False

    def _sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        keep_outside()
        guider, own = executor.class_obj, OwnLevel()
        solve = HostSolver(sampler, guider.model_patcher, getattr(guider, "cfg", 1.0))
        try:
            # Latents of several streams, as of pictures and sound, come packed into one; the first is the pictures'.
            shapes = kwargs.get("latent_shapes") or [noise.shape]
            laid = self._lay(guider, solve, sigmas, shapes[0], noise)
        except (_Refused, comfy.model_management.InterruptProcessingException):
            raise
        except Exception as error:  # whatever goes wrong with the schedule, the picture is made
            log.exception("Flexiffusion: the schedule could not be laid over the run")
            laid = _Laid(None, notes=(_failed("The schedule", error),))
        plan, notes = laid.plan, [*self.notes, *laid.notes]
        watched = self._watched(laid)
        begun = _begun(guider, noise, latent_image, sampler, sigmas, *args, **kwargs)
        began = time.perf_counter()
        if plan is None:
            latent = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
            seconds = time.perf_counter() - began
            self.handle.keep(lambda: RunReport(None, seconds, notes, laid.words), lambda: [latent], seconds, begun)
            if watched:
                watched.end(self.handle.report)
            return latent
        if others := _other_models(guider):
            notes.append(
                f"The guider asks a second model ({', '.join(others)}): the schedule covers it too, and its MACs are counted "
                "as the first one's."
            )
        stopwatch = _stopwatch(guider.model_patcher.load_device)
        counted = {"optimized_attention_override": _counted_attention}
        observer = laid.lesson.observer if laid.lesson else self.observe and self.observe(plan, solve)
        watch = watched.step if watched else None
        run = Run(plan, stopwatch, self.policy, counted, self.replay and self.replay(), observer, watch)
        options = guider.model_options.setdefault("transformer_options", {})
        post_cfg = len(guider.model_options.get("sampler_post_cfg_function", ()))
        options[KEY] = _HostRun(run, post_cfg, own, bool(others))
        try:
            latent = executor(noise, latent_image, listened(sampler, own), plan.sampled(sigmas), *args, **kwargs)
        except BaseException:
            if watched:
                watched.end(None)
            raise
        finally:
            options.pop(KEY, None)
            answer = run.release()
        seconds = time.perf_counter() - began

        def made() -> list[torch.Tensor]:
            # Some nodes hand on the last answer too, beside the latent.
            return [latent] if answer is None else [latent, guider.model_patcher.model.process_latent_out(answer.cpu())]

        self.handle.keep(
            lambda: RunReport(run, seconds, [*notes, *_not_finite(latent)], laid.words, laid.schedule), made, seconds, begun
        )
        if laid.lesson:
            _finish(laid.lesson)
        if watched:
            watched.end(self.handle.report)
        return latent

    def _watched(self, laid: _Laid) -> LiveRun | None:
        """Return what tells how the run goes on, where somebody looks; a page must not cost the picture."""
        try:
            text = "" if laid.plan is None else str(laid.schedule or self.schedule)
            return self.live and self.live(laid.plan, text)
        except Exception:
            log.exception("Flexiffusion: a run cannot be shown as it goes on")
            return None

    def _lay(self, guider, solve: HostSolver, sigmas: torch.Tensor, shape: torch.Size, noise: torch.Tensor) -> _Laid:
        """Lay the schedule, or what the preset is for this run, or what was learned of it, over the run.

        Raises:
            _Refused: the schedule was made for another run, and on_mismatch is refuse.
        """
        if others := _other_caches(guider.model_options):
            return _stood_down(f"{others} skips steps of this model too; remove one of the two")
        levels = sigmas.tolist()
        try:
            check_levels(levels)
        except ScheduleError as error:
            return _stood_down(str(error))
        traits = probe(solve, levels)
        if solve.interrupted is not None:
            raise solve.interrupted
        if traits is not None and not traits.keeps_levels:
            return _stood_down(f"{solve.name} chooses its own noise levels; use another sampler")
        schedule, words, resolved, lesson, stages = self.schedule, [], None, None, _stages_in(guider)
        if isinstance(schedule, Learner):
            lesson = schedule.lesson(_facts(guider, traits, levels, solve, shape, noise))
            if lesson.schedule is None:
                return _Laid(None, lesson.words)
            schedule, resolved = lesson.schedule, lesson.schedule
            words += lesson.words
        elif isinstance(schedule, Preset):
            found = schedule.resolve(traits, levels, _is_guided(guider), bool(stages and stages.starts(levels)))
            if found.schedule is None:
                return _Laid(None, found.words)
            schedule = resolved = found.schedule
            words += found.words
        elif "X" in schedule.letters:
            if traits is None:
                return _stood_down(f"{solve.name} could not be tried, so what its skipped steps need is unknown")
            words += _advice(schedule, traits)
        top = getattr(guider.model_patcher.get_model_object("model_sampling"), "sigma_max", None)
        top = None if top is None else float(top)
        grid = _grid_mismatches(schedule, levels, top)
        teacher = teacher_from(schedule, window_of(schedule, levels, top) or 0)
        others = [
            *_teacher_mismatches(teacher, guider.model_patcher, solve.name),
            *_setting_mismatches(teacher, getattr(guider, "cfg", None), shape),
        ]
        differences = [*grid, *others]
        if differences and self.on_mismatch == "refuse":
            raise _Refused(
                f"the schedule does not fit this run: {'; '.join(differences)}. Change the run, load another schedule, "
                "or set on_mismatch to map"
            )
        if differences and self.on_mismatch == "off":
            return _Laid(None, notes=(*_other_run(differences), "The schedule is off, as on_mismatch asks."))
        plan = make_plan(schedule, levels, traits or PLAIN, top, stages)
        if plan.lost:
            # A preset's own words say what to do.
            advice = "" if resolved else f" Use Flexi Preset, or a schedule for {len(levels) - 1} steps."
            words.insert(0, plan.lost + advice)
        words[:0] = _cautions(others)
        # How it was mapped says all about another grid.
        return _Laid(plan, tuple(words), tuple(_other_run(others)), resolved, lesson)


def _facts(
    guider: Any,
    traits: SamplerTraits | None,
    levels: Sequence[float],
    solve: HostSolver,
    shape: Sequence[int],
    noise: torch.Tensor,
) -> Facts:
    """Return what learning has to know of a run."""
    cfg = float(getattr(guider, "cfg", 1.0))
    identity = {
        **teacher_of(guider.model_patcher, cfg),
        "guider": type(guider).__name__,
        "sampler": solve.name,
        "steps": len(levels) - 1,
        "sigmas": [float(level) for level in levels],
        "size": list(shape[2:]),
    }
    one = noise.numel() * noise.element_size() // max(noise.shape[0], 1)
    stages = _stages_in(guider)
    starts = () if stages is None else stages.starts(levels)
    return Facts(identity, traits, levels, solve, one, noise.shape[0], starts)


def _stages_in(guider: Any) -> Stages | None:
    """Return the stages of the run that a guider makes; None where one network runs all of it."""
    options = guider.model_options.get("transformer_options", {})
    staged = options.get(JOIN) or options.get(STAGED)
    return staged and staged.stages


def _begun(*args: Any, **kwargs: Any) -> Again | None:
    """Return what a run begins from; None where a host samples it with other arguments than are known."""
    try:
        return again(*args, **kwargs)
    except Exception:  # a comparison is for later, the picture for now
        log.exception("Flexiffusion: a run cannot be sampled once more")
        return None


def _finish(lesson: Lesson) -> None:
    """Keep what a run taught; the picture is there, and stays."""
    try:
        lesson.finish()
    except Exception:
        log.exception("Flexiffusion: what a run taught could not be kept")


def _other_models(guider: Any) -> list[str]:
    """Return the names under which a guider holds models beside the one that it samples with."""
    return [
        name
        for name, value in vars(guider).items()
        if isinstance(value, comfy.model_patcher.ModelPatcher) and value is not guider.model_patcher
    ]


def _stood_down(reason: str) -> _Laid:
    return _Laid(None, notes=(f"The schedule stood down: {reason}.",))


def _failed(what: str, error: Exception) -> str:
    return f"{what} failed ({type(error).__name__}: {error}), an error of Flexiffusion's own; the log has more."


def _not_finite(latent: Any) -> list[str]:
    """Return a sentence for the report where a run ended in numbers that are none; nothing where all are finite."""
    finite = bool(torch.isfinite(packed(latent)).all())
    return [] if finite else ["The picture is spoiled: some of its numbers are not finite. Bypass Flexi Apply."]


def _is_guided(guider: Any) -> bool:
    """Return whether a guider of the host runs with and without the prompt: any guidance scale of it is not 1."""
    scales = [value for name, value in vars(guider).items() if name.startswith("cfg") and isinstance(value, int | float)]
    return any(not math.isclose(scale, 1.0) for scale in scales)


class HostSolver:
    """The solver that a sampler of the host is, for any denoiser; its noise is that of a seed of its own.

    Args:
        sampler: of the run.
        patcher: of the run's model, whose noise levels some samplers look at.
        cfg: the run's guidance scale, which some samplers look at.
    """

    def __init__(self, sampler: comfy.samplers.Sampler, patcher: comfy.model_patcher.ModelPatcher, cfg: float = 1.0) -> None:
        self.own, self.cfg = OwnLevel(), cfg
        sampler = listened(sampler, self.own)
        self._function = getattr(sampler, "sampler_function", None)
        self._options = getattr(sampler, "extra_options", {})
        self._patcher = patcher
        self.reads_guidance = False  # whether it asked for the prediction without the prompt
        self.interrupted: BaseException | None = None  # by the user, while it was tried

    @property
    def name(self) -> str:
        """The sampler's name, as people choose it where it is the host's own."""
        name = getattr(self._function, "__name__", "the sampler")
        return name.removeprefix("sample_").removesuffix("_function")

    def __call__(
        self, denoise: Callable[[torch.Tensor, float], torch.Tensor], x: torch.Tensor, sigmas: torch.Tensor, seed: int = 0
    ) -> torch.Tensor:
        """Return where the sampler ends.

        Raises:
            TypeError: the sampler is not one of the host's own kind.
        """
        extra = {"seed": seed, "model_options": {}, "denoise_mask": None}
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a sampler's library, about the made-up run
            torch.default_generator.manual_seed(seed)  # the CPU's alone: no other device is put back behind it
            try:
                return self._function(
                    _StandIn(denoise, self), x, sigmas.clone(), extra_args=extra, callback=None, disable=True, **self._options
                )
            except comfy.model_management.InterruptProcessingException as error:
                self.interrupted = error
                raise


class _StandIn:
    """Stands for the model before a sampler that is tried: its answers are given, its noise levels the real model's."""

    def __init__(self, denoise: Callable[[torch.Tensor, float], torch.Tensor], solver: HostSolver) -> None:
        self._denoise, self._solver = denoise, solver
        patcher = solver._patcher
        base = SimpleNamespace(model_sampling=patcher.get_model_object("model_sampling"))
        self.inner_model = SimpleNamespace(inner_model=base, model_patcher=patcher, model_options={}, cfg=solver.cfg, conds={})

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, model_options: Any = None, **_: Any) -> torch.Tensor:
        own = self._solver.own.sigma
        denoised = self._denoise(x, float(sigma.max()) if own is None else own)
        for listener in (model_options or {}).get("sampler_post_cfg_function", ()):
            self._solver.reads_guidance = True
            denoised = listener(
                {"denoised": denoised, "cond_denoised": denoised, "uncond_denoised": denoised, "input": x, "sigma": sigma,
                 "model": self.inner_model.inner_model, "cond_scale": 1.0, "model_options": model_options}
            )  # fmt: skip
        return denoised


def _advice(schedule: Schedule, traits: SamplerTraits) -> list[str]:
    """Return what the user of a schedule of extrapolated steps should know of the run's sampler."""
    if schedule.basis == "derivative" and traits.draws_noise:
        return [
            "The sampler draws noise, and the schedule carries the derivative on: expect grain. Leave out basis=derivative."
        ]
    if not is_served(traits):
        return [f"With a sampler that {traits.words}, no schedule of extrapolated steps is known to beat as many plain steps."]
    return []


def _other_run(differences: Sequence[str]) -> list[str]:
    return [f"Made for another run: {difference}." for difference in differences]


def _cautions(differences: Sequence[str]) -> list[str]:
    """Return what other settings than a schedule's own come to, in words; they stand before all else."""
    for part, name in (("the sampler", "sampler"), ("the network's", "model")):
        if any(difference.startswith(part) for difference in differences):
            return [f"Made for another {name}: expect artefacts."]
    return ["Made for other settings: it may come less near."] if differences else []


def _grid_mismatches(schedule: Schedule, sigmas: Sequence[float], top: float | None) -> list[str]:
    """Return in words how a run's noise levels [n + 1] differ from those that a schedule was made for.

    A window of such a run does not; `top` is the model's highest noise level.
    """
    if window_of(schedule, sigmas, top) is not None:
        return []
    if len(sigmas) - 1 != len(schedule):
        return [f"the schedule has {len(schedule)} steps, the run {len(sigmas) - 1}"]
    if schedule.teacher_sigmas is not None and not same_grid(schedule.teacher_sigmas, sigmas):
        return ["the noise levels (scheduler, denoise or window) differ"]
    if schedule.sigmas is not None and between_ends(schedule.sigmas, sigmas) is None:
        return ["the schedule's own noise levels begin or end elsewhere than the run's"]
    return []


def _teacher_mismatches(teacher: Mapping[str, Any], model: comfy.model_patcher.ModelPatcher, sampler: str) -> list[str]:
    """Return in words how a run's sampler and network differ from the teacher in a schedule's file.

    Args:
        teacher: in a schedule's file; empty where there is none.
        model: the run's.
        sampler: name of the run's sampler function, without `sample_`; empty when not known.
    """
    found, wanted = [], teacher.get("sampler")
    if wanted and sampler and sampler not in (wanted, _SAME_FUNCTION.get(wanted)):
        found.append(f"the sampler was {wanted}, the run's is {sampler}")
    network = model.get_model_object("diffusion_model")
    architecture, weights = teacher.get("architecture"), teacher.get("weights")
    if architecture and architecture != architecture_fingerprint(network):
        found.append("the network's architecture differs")
    elif weights and patches_note(model) != teacher.get("patches", ""):
        found.append("the network's weights are patched otherwise (a LoRA)" if "patches" in teacher else _PATCHED)
    elif weights and weights != weights_fingerprint(network, unpatched_weights(model)):
        found.append("the network's weights differ")
    if weights and teacher.get("networks", "") != networks_note(model):
        found.append("the run changes its network elsewhere, or to another one")
    return found


def _setting_mismatches(teacher: Mapping[str, Any], cfg: float | None, shape: Sequence[int]) -> list[str]:
    """Return in words how a run's guidance scale and its latent's size differ from those in a schedule's file.

    Args:
        teacher: in a schedule's file; empty where there is none.
        cfg: the run's; None where its guider has none.
        shape: of the run's latent [B, C, ..., H, W].
    """
    found, wanted = [], teacher.get("cfg")
    if wanted is not None and cfg is not None and not math.isclose(wanted, cfg, rel_tol=1e-3):
        found.append(f"the guidance scale was {wanted:g}, the run's is {cfg:g}")
    size = teacher.get("size")
    if size and list(shape[-len(size) :]) != list(size):
        found.append(f"the latent was {size_text(size)}, the run's is {size_text(shape[-len(size) :])}")
    return found


def patches_note(model: comfy.model_patcher.ModelPatcher) -> str:
    """Return how a model's network is patched, as by a LoRA: how many weights, and a digest; empty where it is not."""
    patches = {key: model.patches[key] for key in sorted(model.patches) if key.startswith("diffusion_model.")}
    digest, waiting = hashlib.sha256(), [patches]
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            flat = value.detach().flatten()
            spread = flat[:: max(1, len(flat) // _PATCH_VALUES)]
            digest.update(f"{tuple(value.shape)}".encode() + spread.to("cpu", torch.float16).numpy().tobytes())
        elif isinstance(value, dict):
            waiting += [part for item in value.items() for part in item]
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, str | int | float):
            digest.update(repr(value).encode())
        elif hasattr(value, "weights"):  # an adapter of the host
            waiting += [type(value).__name__, value.weights]
    return f"{len(patches)} weights, sha256:{digest.hexdigest()[:16]}" if patches else ""


def teacher_of(model: comfy.model_patcher.ModelPatcher, cfg: float) -> dict[str, Any]:
    """Return what a schedule's file says of a run's model and guidance scale.

    `weights` are the original ones; `patches`, where there are any, what changes them for a while, as a LoRA; `networks` the
    others of a run that has several.
    """
    network, patches = model.get_model_object("diffusion_model"), patches_note(model)
    said = {
        "architecture": architecture_fingerprint(network),
        "weights": weights_fingerprint(network, unpatched_weights(model)),
        "cfg": cfg,
    }
    networks = networks_note(model)
    return said | ({"patches": patches} if patches else {}) | ({"networks": networks} if networks else {})


def networks_note(model: comfy.model_patcher.ModelPatcher) -> str:
    """Return which networks come after a model's own in a run, and where; empty where none does."""
    found = []
    for joined in model.get_additional_models_with_key(JOIN):
        (join,) = model.get_wrappers(WrappersMP.OUTER_SAMPLE, JOIN)
        note = weights_fingerprint(joined.get_model_object("diffusion_model"), unpatched_weights(joined))
        found.append(f"{note} {patches_note(joined)} from {join.boundary.value:g} {join.boundary.unit}, {join.in_grid}")
    for own in model.get_additional_models_with_key(STAGED):
        (outer,) = model.get_wrappers(WrappersMP.OUTER_SAMPLE, STAGED)
        levels = ", ".join(f"{level:g}" for level in outer.args[0].boundaries)
        found.append(f"{weights_fingerprint(own.model)} at {levels}")
    return "; ".join(found)


def unpatched_weights(model: comfy.model_patcher.ModelPatcher) -> dict[str, torch.Tensor]:
    """Return the original weights, by the network's own names, where another clone's patches now stand in their place."""
    return {key.removeprefix("diffusion_model."): kept.weight for key, kept in model.backup.items()}


def _predict_noise(executor, x, timestep, model_options=None, seed=None):
    model_options = {} if model_options is None else model_options
    host_run = model_options.get("transformer_options", {}).get(KEY)
    if host_run is None:
        return executor(x, timestep, model_options, seed)
    listens = len(model_options.get("sampler_post_cfg_function", ())) > host_run.post_cfg_functions
    return host_run.run.predict(
        x,
        float(timestep.max()),
        lambda: executor(x, timestep, model_options, seed),
        must_compute="the sampler reads the unguided prediction, which an extrapolated step does not have" if listens else "",
        level=host_run.own.sigma,
    )


class _Guider:
    """Stands for a guider of the host before a sampler: its questions go through `_predict_noise`, all else to the guider."""

    def __init__(self, guider: Any) -> None:
        self.__dict__["_guider"] = guider

    def __call__(self, x, timestep, model_options=None, seed=None):
        return _predict_noise(self._guider, x, timestep, model_options, seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._guider, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._guider, name, value)


def _sampler_sample(executor, guider, *args, **kwargs):
    return executor(_Guider(guider), *args, **kwargs)


# ComfyUI before 0.3.52 has no hook around the guider's answer: there the sampler gets a stand-in for the guider.
_HAS_PREDICT_NOISE = hasattr(WrappersMP, "PREDICT_NOISE")
_ASKED_AT = {WrappersMP.PREDICT_NOISE: _predict_noise} if _HAS_PREDICT_NOISE else {WrappersMP.SAMPLER_SAMPLE: _sampler_sample}


def _calc_cond_batch(executor, model, conds, x_in, timestep, model_options):
    """Leave the unconditional half out where guidance is reused; let control nets run a partial step's own blocks alone."""
    options = model_options.get("transformer_options", {})
    host_run = options.get(KEY)
    if host_run is None:
        return executor(model, conds, x_in, timestep, model_options)
    run, sigma = host_run.run, float(timestep.max())
    depth = run.partial_depth(sigma)
    if depth is not None and block_count(model.diffusion_model) is not None:
        views: dict[int, ShallowControl] = {}  # conditionings that share a control net still share it
        conds = [cond and [_with_shallow_control(entry, depth, views) for entry in cond] for cond in conds]
    if len(conds) != 2 or any(cond is None for cond in conds):
        if host_run.has_two_models:
            run.guides_itself(sigma, "the guider has two models")
        elif len(conds) > 1:
            unguided = "the run is not guided" if len(conds) == 2 else f"the guider has {len(conds)} conditionings, not two"
            run.guides_itself(sigma, unguided)
        return executor(model, conds, x_in, timestep, model_options)

    def halves(both: bool):
        # The host leaves a conditioning out that is None.
        return executor(model, conds if both else [conds[0], None], x_in, timestep, model_options)

    window = getattr(options.get("context_window"), "index_list", ())
    return [*run.guide(x_in, sigma, halves, tuple(window))]


def _with_shallow_control(entry: dict[str, Any], depth: int, views: dict[int, ShallowControl]) -> dict[str, Any]:
    control = entry.get("control")
    if control is None:
        return entry
    return {**entry, "control": views.setdefault(id(control), ShallowControl(control, depth))}


@outside_graphs
def _diffusion_model(executor, *args, **kwargs):
    """Run the calls of a U-Net; a network of another kind is met at `_apply_model`."""
    network = executor.class_obj
    if block_count(network) is None:
        return executor(*args, **kwargs)

    call = _network_call(*args, **kwargs)
    host_run = call.options.get(KEY)
    if host_run is None:
        return call.run(executor)
    return host_run.run.forward(network, call, _sigma(call.options), _Forward(executor))


@outside_graphs
def _network_call(x, timesteps, context=None, y=None, control=None, transformer_options=None, **others) -> NetworkCall:
    options = {} if transformer_options is None else transformer_options
    return NetworkCall(x, timesteps, context, y, control, options, others)


class _Forward:
    """The host's own forward with the wrappers that other packs have put between it and ours."""

    def __init__(self, executor: WrapperExecutor) -> None:
        self._executor = executor

    @outside_graphs
    def __call__(self, *args, **kwargs):
        return self._executor(*args, **kwargs)

    def around(self, forward: Callable[..., torch.Tensor], owner: Any = None) -> Callable[..., torch.Tensor]:
        """Return another forward with the same wrappers around it, for which it is `owner`'s."""
        executor = self._executor
        owner = executor.class_obj if owner is None else owner
        return WrapperExecutor.new_class_executor(forward, owner, executor.wrappers, executor.idx + 1).execute


def _apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
    """Run the calls of a network that is no U-Net: transformers differ in their arguments, the model around them does not."""
    options = {} if transformer_options is None else transformer_options
    call = ModelCall(x, t, c_concat, c_crossattn, control, options, kwargs)
    model, host_run = executor.class_obj, options.get(KEY)
    if host_run is None or block_count(model.diffusion_model) is not None:
        return call.run(executor)
    return host_run.run.forward(model, call, _sigma(options), _Forward(executor))


@outside_graphs
def _sigma(options: dict[str, Any]) -> float:
    return float(options["sigmas"].max())


def packed(latent: Any) -> torch.Tensor:
    """Return a latent as it is sampled: one of several streams [B, ...] (the host's NestedTensor) packed to [B, 1, N]."""
    if not getattr(latent, "is_nested", False):
        return latent
    return torch.cat([stream.reshape(stream.shape[0], 1, -1) for stream in latent.unbind()], dim=-1)


def _digest(latent: Any) -> str:
    values = packed(latent).detach().to("cpu", torch.float32).contiguous()
    return hashlib.sha256(f"{tuple(values.shape)}".encode() + values.numpy().tobytes()).hexdigest()


def _other_caches(model_options: dict[str, Any]) -> str:
    """Return the names of other step caches on a model, empty where there is none."""
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    keys = {key for of_kind in wrappers.values() for key, functions in of_kind.items() if functions}
    return " and ".join(name for key, name in _OTHER_CACHES.items() if key in keys)


def _counted_attention(_, *args, **kwargs):
    """Stand for the attention that the host chose, which may need a real device; the MACs are the same."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


def _stopwatch(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Return a stopwatch for a device (see `Run`): on CUDA by events, which cost no wait.

    Waiting for the device before and after each step made a U-Net's steps 12 to 24 % slower on an H200
    (docs/results/gpu.md), since the host could not prepare the next one meanwhile.
    """
    return partial(_DeviceSpan, device) if device.type == "cuda" else processor_time


class _DeviceSpan:
    """A span of a CUDA device's time: begun when made, ended by the first call; the next ones tell its seconds."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._end = device, None
        self._begin = self._mark()

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def __call__(self) -> float:
        if self._end is None:
            self._end = self._mark()
            return 0.0
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1000


def join_models(
    high: comfy.model_patcher.ModelPatcher,
    low: comfy.model_patcher.ModelPatcher,
    boundary: Boundary,
    in_grid: bool = True,
) -> tuple[comfy.model_patcher.ModelPatcher, tuple[str, ...]]:
    """Return one model whose high noise levels are one model's and whose low ones another's, and what is to be said of it.

    What either has of its own (LoRAs, patches, hooks, a function around its guidance) stays its own; what is put on the joined
    model is for both. The noise levels of a run are those of the first.

    Args:
        high: for the noise levels above the boundary.
        low: for those on and below it.
        boundary: between them, found for each run when it starts.
        in_grid: put the noise level next to the boundary on it, where a step would straddle it.

    Raises:
        FlexiError: the models' latents or predictions differ, they are one model, one of them is joined, or the boundary's unit
            is none of this model's.
    """
    for name, model in zip(STAGE_NAMES, (high, low), strict=True):
        if _has_stages(model):
            raise FlexiError(f"the {name} model has stages already; give Flexi Join Models the models themselves")
    if high.is_clone(low):
        raise FlexiError(
            "both inputs are one loaded model, and only one set of patches can be in its weights; for one model with other "
            "LoRAs in each half use LoRA hooks on the conditioning, or two KSampler (Advanced) nodes"
        )
    formats = [type(model.model.latent_format).__name__ for model in (high, low)]
    if formats[0] != formats[1]:
        raise FlexiError(f"the models' latents differ: high noise has {formats[0]}, low noise {formats[1]}; join alike ones")
    samplings = [model.get_model_object("model_sampling") for model in (high, low)]
    predictions = [_prediction_type(sampling) for sampling in samplings]
    if predictions[0] != predictions[1]:
        raise FlexiError(
            f"the models' predictions differ: high noise predicts as {predictions[0]}, low noise as {predictions[1]}; join "
            "alike ones"
        )
    join = _Join(boundary, in_grid, _own_options(high))
    join.level([1.0, 0.0], samplings[0])  # a unit that this model has not is refused now
    clone = high.clone()
    clone.set_additional_models(JOIN, [low.clone()])
    wrappers = {
        WrappersMP.OUTER_SAMPLE: join,
        WrappersMP.SAMPLER_SAMPLE: _sampler_sample_joined,
        WrappersMP.CALC_COND_BATCH: _calc_cond_batch_joined,
    }
    if _HAS_PREDICT_NOISE:
        wrappers[WrappersMP.PREDICT_NOISE] = _predict_noise_joined
    for kind, wrapper in wrappers.items():
        clone.add_wrapper_with_key(kind, JOIN, wrapper)
    clone.add_callback_with_key(CallbacksMP.ON_PRE_RUN, JOIN, join.see_start)
    _put_in_order(clone)
    own = [getattr(sampling, "sigmas", None) for sampling in samplings]
    if None not in own and (own[0].shape != own[1].shape or not torch.allclose(own[0].cpu(), own[1].cpu(), rtol=1e-4)):
        shifts = [getattr(sampling, "shift", None) for sampling in samplings]
        numbers = "" if None in shifts else f" (shift {shifts[0]:g}, not {shifts[1]:g})"
        return clone, (f"The noise levels of a run are the high noise model's{numbers}; the low noise model's differ.",)
    return clone, ()


def _has_stages(model: comfy.model_patcher.ModelPatcher) -> bool:
    return any(model.get_additional_models_with_key(key) for key in (JOIN, STAGED))


def _put_in_order(model: comfy.model_patcher.ModelPatcher) -> None:
    """Let a run's stages be known before a schedule is laid over it, and each of its networks be called where it has to be."""
    for kind in {*model.wrappers}:
        for key in (JOIN, STAGED, KEY) if kind == WrappersMP.OUTER_SAMPLE else (STAGED, KEY, JOIN):
            own = [*model.get_wrappers(kind, key)]
            model.remove_wrappers_with_key(kind, key)
            for wrapper in own:
                model.add_wrapper_with_key(kind, key, wrapper)


def _prediction_type(sampling: Any) -> str:
    """Return the name of the host's class that turns a network's output into the denoised latent."""
    return next((cls.__name__ for cls in type(sampling).__mro__ if "calculate_denoised" in vars(cls)), "unknown")


def _own_options(model: comfy.model_patcher.ModelPatcher) -> dict[str, Any]:
    """Return the options that a run of a model begins with, but for a schedule: that is the run's."""
    own = comfy.model_patcher.create_model_options_clone(model.model_options)
    transformer = own.setdefault("transformer_options", {})
    for name, kinds in (("wrappers", model.wrappers), ("callbacks", model.callbacks)):
        comfy.patcher_extension.merge_nested_dicts(transformer.setdefault(name, {}), kinds, copy_dict1=False)
        for of_kind in transformer[name].values():
            of_kind.pop(KEY, None)
    return own


class _Join:
    """Finds the boundary of a joined model's run, and puts it into the run's grid; outermost, so that a schedule meets it."""

    def __init__(self, boundary: Boundary, in_grid: bool, high_options: dict[str, Any]) -> None:
        self.boundary, self.in_grid, self.high_options = boundary, in_grid, high_options
        self.leads = False  # whether the run that is made is the joined model's

    def see_start(self, _: comfy.model_patcher.ModelPatcher) -> None:
        """Say so where the joined model is made ready for a run that another model leads: its second network is not asked."""
        if not self.leads:
            log.warning(
                "Flexiffusion: a joined model is the second one of its guider: its high noise model alone answers, at every "
                "level. Put the joined model first, or give the guider one of the two."
            )

    def level(self, sigmas: Sequence[float], sampling: Any) -> float:
        """Return the boundary as a noise level of a run [n + 1] of a model with this sampling."""
        ends = (float(getattr(sampling, "sigma_min", 0)), float(getattr(sampling, "sigma_max", 0)))
        return self.boundary.level(sigmas, lambda sigma: float(sampling.timestep(torch.tensor([sigma]))), ends)

    def stages(self, sigmas: torch.Tensor, sampling: Any) -> Stages:
        """Return the stages of a run [n + 1] of a model with this sampling."""
        return Stages((self.level(sigmas.tolist(), sampling),), STAGE_NAMES)

    def grid(self, sigmas: torch.Tensor, sampling: Any) -> torch.Tensor:
        """Return a run's noise levels [n + 1], with the boundary among them where that is asked for."""
        levels = sigmas.tolist()
        found = with_boundary(levels, self.level(levels, sampling)) if self.in_grid else levels
        return sigmas if found == levels else sigmas.new_tensor(found)

    def __call__(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        guider = executor.class_obj
        patcher = guider.model_patcher
        sampling = patcher.get_model_object("model_sampling")
        stages, sigmas = self.stages(sigmas, sampling), self.grid(sigmas, sampling)
        options = guider.model_options.setdefault("transformer_options", {})
        low = patcher.get_additional_models_with_key(JOIN)[0]
        options[JOIN] = _Joined(stages, patcher, low, self.high_options)
        self.leads = True
        try:
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            options.pop(JOIN, None)
            self.leads = False


def levels_of(model: comfy.model_patcher.ModelPatcher, sigmas: torch.Tensor) -> torch.Tensor:
    """Return the noise levels [n + 1] that a model samples at where a sampler is given others: a joined one's boundary."""
    for join in model.get_wrappers(WrappersMP.OUTER_SAMPLE, JOIN):
        sigmas = join.grid(sigmas, model.get_model_object("model_sampling"))
    return sigmas


def stages_of(model: comfy.model_patcher.ModelPatcher, sigmas: torch.Tensor) -> Stages | None:
    """Return where the network of a model's run changes; None where it does not.

    Args:
        model: joined, with stages, or neither.
        sigmas: of the run [n + 1], as `levels_of` has them.
    """
    for join in model.get_wrappers(WrappersMP.OUTER_SAMPLE, JOIN):
        return join.stages(sigmas, model.get_model_object("model_sampling"))
    for outer in model.get_wrappers(WrappersMP.OUTER_SAMPLE, STAGED):
        return outer.args[0]
    return None


class _Joined:
    """The run of a joined model; lives in the run's own model options."""

    def __init__(
        self,
        stages: Stages,
        high: comfy.model_patcher.ModelPatcher,
        low: comfy.model_patcher.ModelPatcher,
        high_options: dict[str, Any],
    ) -> None:
        self.stages, self.high, self.low = stages, high, low
        self._high_options, self._low_options = high_options, _own_options(low)
        self._encoded: dict[int, tuple[Any, Any]] = {}  # conditioning for the low model, by that for the high one
        self._alike = _encodes_as(high.model, low.model)

    def __deepcopy__(self, memo: dict) -> _Joined:
        return self  # of options that are copied for a call: the run stays one

    def is_low(self, timestep: torch.Tensor) -> bool:
        """Return whether a noise level [B] is the low model's."""
        return self.stages.at(float(timestep.max())) > 0

    def begin(self, guider: Any, noise: torch.Tensor, **known: Any) -> None:
        """Make the low model ready as the host does the high one, and encode the conditioning for it."""
        scratch = comfy.model_patcher.create_model_options_clone(self.low.model_options)
        comfy.sampler_helpers.prepare_model_patcher(self.low, guider.conds, scratch)  # LoRAs that come with a prompt
        self.low.pre_run()
        if self._alike:
            return
        given = {c["uuid"]: c.get("model_conds", {}) for conds in guider.original_conds.values() for c in conds}
        for kind, conds in guider.conds.items():
            bare = [{**cond, "model_conds": given.get(cond.get("uuid"), {})} for cond in conds]
            encode = self.low.model.extra_conds
            encoded = comfy.samplers.encode_model_conds(encode, bare, noise, noise.device, kind, **known)
            for cond, own in zip(conds, encoded, strict=True):
                self._encoded[id(cond["model_conds"])] = cond["model_conds"], own["model_conds"]

    def end(self) -> None:
        """Leave the low model as it was."""
        self.low.cleanup()
        self.low.restore_hook_patches()

    def options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the options of a call with the low model's own in the place of the high one's."""
        # Its clones on other devices are the high model's.
        run = {key: value for key, value in options.items() if key not in ("multigpu_clones", "multigpu_thread_pool")}
        return in_place_of(run, self._high_options, self._low_options)

    def conds(self, conds: Sequence[list[dict[str, Any]] | None]) -> list[list[dict[str, Any]] | None]:
        """Return conditionings as the low model takes them."""
        if self._alike:
            return conds
        return [entries and list(map(self._for_low, entries)) for entries in conds]

    def _for_low(self, entry: dict[str, Any]) -> dict[str, Any]:
        found = self._encoded.get(id(entry["model_conds"]))
        if found is None:
            raise FlexiError(
                "the joined models take conditioning each in its own form, and another node cuts it up (context windows); "
                "sample them in two KSampler (Advanced) nodes"
            )
        return {**entry, "model_conds": found[1]}


def _encodes_as(one: Any, other: Any) -> bool:
    """Return whether two of the host's models take conditioning in the same form."""
    configs = [{**model.model_config.unet_config, "dtype": None} for model in (one, other)]
    keys = [getattr(model, "concat_keys", ()) for model in (one, other)]
    return type(one) is type(other) and configs[0] == configs[1] and keys[0] == keys[1]


def _joined_run(model_options: dict[str, Any] | None) -> _Joined | None:
    return (model_options or {}).get("transformer_options", {}).get(JOIN)


def _sampler_sample_joined(
    executor, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, *args, **kwargs
):
    joined = _joined_run(extra_args.get("model_options"))
    if joined is None:
        return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs)
    try:
        joined.begin(guider, noise, latent_image=latent_image, denoise_mask=denoise_mask, seed=extra_args.get("seed"))
        return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs)
    finally:
        joined.end()


def _predict_noise_joined(executor, x, timestep, model_options=None, seed=None):
    joined = _joined_run(model_options)
    if joined is not None and joined.is_low(timestep):
        model_options = joined.options(model_options)
    return executor(x, timestep, {} if model_options is None else model_options, seed)


def _calc_cond_batch_joined(executor, model, conds, x_in, timestep, model_options):
    """Let the low model answer in its stage; a second model of the guider's answers for itself."""
    joined = _joined_run(model_options)
    if joined is None or model is not joined.high.model or not joined.is_low(timestep):
        return executor(model, conds, x_in, timestep, model_options)
    options = model_options if _HAS_PREDICT_NOISE else joined.options(model_options)
    return executor(joined.low.model, joined.conds(conds), x_in, timestep, options)


def stage_model(model: comfy.model_patcher.ModelPatcher, path: Path) -> comfy.model_patcher.ModelPatcher:
    """Return a model whose decoder is another in each stage of a file; the model's own stays for nothing but that.

    Patches of the model's weights reach the encoder that the stages share, and hooks every stage.

    Args:
        model: the base, a U-Net.
        path: of the stage file.

    Raises:
        FlexiError: the file cannot be read or is for another base, or the model has stages already or is no U-Net.
    """
    if _has_stages(model):
        raise FlexiError("the model has stages already; give Flexi Stage Model the base model itself")
    network = model.get_model_object("diffusion_model")
    if block_count(network) is None:
        raise FlexiError("the model is no U-Net; a stage file's decoders are for the U-Net that they were trained on")
    found = load_stages(path)
    found.check_base(architecture_fingerprint(network), weights_fingerprint(network, unpatched_weights(model)))
    cast = model.model.manual_cast_dtype
    decoders = torch.nn.ModuleList(found.decoders(partial(_HostParts, comfy.ops.pick_operations(network.dtype, cast))))
    own = comfy.model_patcher.ModelPatcher(decoders.to(network.dtype), model.load_device, model.offload_device)
    clone = model.clone()
    clone.set_additional_models(STAGED, [own])
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, STAGED, partial(_outer_sample_staged, found.stages))
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, STAGED, _diffusion_model_staged)
    _put_in_order(clone)
    return clone


class _HostParts:
    """Makes a decoder of the host's own modules, which its forward knows; see `stages.network.Parts`."""

    def __init__(self, operations: Any, arguments: Mapping[str, Any], groups: Callable[[int], int]) -> None:
        class Fitting(operations):
            class GroupNorm(operations.GroupNorm):
                def __init__(self, num_groups: int, num_channels: int, *args: Any, **kwargs: Any) -> None:
                    super().__init__(groups(num_channels), num_channels, *args, **kwargs)

        self._arguments, self._made = arguments, {"dtype": torch.float32, "operations": Fitting}

    def residual(self, channels: int, out: int) -> torch.nn.Module:
        emb, scale_shift = 4 * self._arguments["model_channels"], self._arguments["use_scale_shift_norm"]
        return openaimodel.ResBlock(channels, emb, 0.0, out, use_scale_shift_norm=scale_shift, **self._made)

    def transformer(self, channels: int, heads: int, dim_head: int, depth: int) -> torch.nn.Module:
        context = {"context_dim": self._arguments["context_dim"], "use_linear": self._arguments["use_linear_in_transformer"]}
        return comfy.ldm.modules.attention.SpatialTransformer(channels, heads, dim_head, depth, **context, **self._made)

    def upsample(self, channels: int) -> torch.nn.Module:
        return openaimodel.Upsample(channels, True, **self._made)

    def out(self, channels: int, out: int) -> torch.nn.Module:
        operations, dtype = self._made["operations"], self._made["dtype"]
        norm = operations.GroupNorm(32, channels, dtype=dtype)
        return torch.nn.Sequential(norm, torch.nn.SiLU(), operations.Conv2d(channels, out, 3, padding=1, dtype=dtype))

    def block(self, layers: Sequence[torch.nn.Module]) -> torch.nn.Module:
        return openaimodel.TimestepEmbedSequential(*layers)


class _Staged:
    """The run of a stage model: its networks, one for each stage; lives in the run's own model options."""

    def __init__(self, stages: Stages, networks: Sequence[torch.nn.Module]) -> None:
        self.stages, self.networks = stages, networks

    def __deepcopy__(self, memo: dict) -> _Staged:
        return self  # of options that are copied for a call: the run stays one


def _outer_sample_staged(stages: Stages, executor, *args, **kwargs):
    guider = executor.class_obj
    network = guider.model_patcher.get_model_object("diffusion_model")
    decoders = guider.model_patcher.get_additional_models_with_key(STAGED)[0].model
    options = guider.model_options.setdefault("transformer_options", {})
    options[STAGED] = _Staged(stages, [with_decoder(network, decoder) for decoder in decoders])
    try:
        return executor(*args, **kwargs)
    finally:
        options.pop(STAGED, None)


@outside_graphs
def _diffusion_model_staged(executor, *args, **kwargs):
    """Call the network of the stage in the place of the base's, with all that is around it."""
    call = _network_call(*args, **kwargs)
    staged = call.options.get(STAGED)
    if staged is None:
        return executor(*args, **kwargs)
    network = staged.networks[staged.stages.at(_sigma(call.options))]
    return call.run(_Forward(executor).around(partial(type(network)._forward, network), network))


class _Pixels(comfy.latent_formats.LatentFormat):
    """Pixels as latents: three channels of the picture's own size, as they are."""

    latent_channels = 3
    spacial_downscale_ratio = 1  # the host's spelling
    latent_rgb_factors = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


class _DemoConfig(comfy.supported_models_base.BASE):
    """The host's description of the embedded model: pixels as latents, eps prediction, no text encoder."""

    unet_config: dict[str, Any] = {}
    unet_extra_config: dict[str, Any] = {}  # the host's own would overwrite num_head_channels
    latent_format = _Pixels
    memory_usage_factor = 1.0
    sampling_settings = {"beta_schedule": "linear", "linear_start": 0.00085, "linear_end": 0.012}


def load_demo_model() -> comfy.model_patcher.ModelPatcher:
    """Return the embedded model as a MODEL of the host: its own UNetModel with the bundled weights.

    Raises:
        FlexiError: the weights file is missing or broken.
    """
    unet_config, weights, _ = read_weights(DEMO_WEIGHTS)
    weights.pop(TOKEN_TABLE)
    layout = {"image_size": 32, "use_spatial_transformer": True, "legacy": False, "use_linear_in_transformer": False}
    config = _DemoConfig({**unet_config, **layout, "num_heads": -1, "dtype": torch.float32})
    model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.EPS)
    model.diffusion_model.load_state_dict(weights)
    return comfy.model_patcher.ModelPatcher(
        model.eval(),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def demo_conditioning(caption: str) -> list:
    """Return the CONDITIONING of a caption for the embedded model; the empty caption is the unconditional prompt.

    Raises:
        FlexiError: a word is not known.
    """
    parsed = parse_caption(caption)
    _, weights, _ = read_weights(DEMO_WEIGHTS)
    return [[embed_captions(weights[TOKEN_TABLE], [parsed]), {}]]
