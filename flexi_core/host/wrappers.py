"""A schedule in a model: what is laid over each run as it begins, and the wrapper around its sampling."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..errors import FlexiError, ScheduleError
from ..networks.graphs import keep_outside
from ..run.cache import PLACES, CachePolicy
from ..run.live import LiveRun
from ..run.nested_samplers import OwnLevel, listened
from ..run.null_steps.extrapolation import Observer
from ..run.plan import Plan, make_plan
from ..run.replay import Replay
from ..run.report import RunReport
from ..run.run import Run
from ..run.sampler import PLAIN, SamplerTraits, Solver, probe
from ..schedule.file import teacher_from
from ..schedule.levels import check_levels, window_of
from ..schedule.presets import Preset
from ..schedule.schedule import Schedule
from ..tune import Facts, Learner, Lesson
from .again import Again, again
from .calls import ASKED_AT, OngoingRun, answer_conds, answer_model, answer_network, counted_attention
from .handle import RunHandle, failed_words, packed
from .joining import put_in_order, stages_in
from .keys import KEY
from .mismatch import (
    advice_words,
    caution_words,
    grid_mismatches,
    other_run_words,
    setting_mismatches,
    teacher_mismatches,
    teacher_of,
)
from .solver import HostSolver
from .stopwatch import stopwatch_of

log = logging.getLogger(__name__)

ON_MISMATCH = ("map", "refuse", "off")
# Core's own step caches, by the key of their wrappers.
_OTHER_CACHES = {"easycache": "EasyCache", "lazycache": "LazyCache"}


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
        **ASKED_AT,
        WrappersMP.CALC_COND_BATCH: answer_conds,
        WrappersMP.APPLY_MODEL: answer_model,
        WrappersMP.DIFFUSION_MODEL: answer_network,
    }
    for kind, wrapper in wrappers.items():
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    put_in_order(clone)
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
            laid = _Laid(None, notes=(failed_words("The schedule", error),))
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
        stopwatch = stopwatch_of(guider.model_patcher.load_device)
        counted = {"optimized_attention_override": counted_attention}
        observer = laid.lesson.observer if laid.lesson else self.observe and self.observe(plan, solve)
        watch = watched.step if watched else None
        run = Run(plan, stopwatch, self.policy, counted, self.replay and self.replay(), observer, watch)
        options = guider.model_options.setdefault("transformer_options", {})
        post_cfg = len(guider.model_options.get("sampler_post_cfg_function", ()))
        options[KEY] = OngoingRun(run, post_cfg, own, bool(others))
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
        schedule, words, resolved, lesson, stages = self.schedule, [], None, None, stages_in(guider)
        if isinstance(schedule, Learner):
            lesson = schedule.lesson(_facts(guider, traits, levels, solve, shape, noise))
            if lesson.schedule is None:
                return _Laid(None, lesson.words)
            schedule, resolved = lesson.schedule, lesson.schedule
            words += lesson.words
        elif isinstance(schedule, Preset):
            found = schedule.resolve(traits, levels, is_guided(guider), bool(stages and stages.starts(levels)))
            if found.schedule is None:
                return _Laid(None, found.words)
            schedule = resolved = found.schedule
            words += found.words
        elif "X" in schedule.letters:
            if traits is None:
                return _stood_down(f"{solve.name} could not be tried, so what its skipped steps need is unknown")
            words += advice_words(schedule, traits)
        top = getattr(guider.model_patcher.get_model_object("model_sampling"), "sigma_max", None)
        top = None if top is None else float(top)
        grid = grid_mismatches(schedule, levels, top)
        teacher = teacher_from(schedule, window_of(schedule, levels, top) or 0)
        others = [
            *teacher_mismatches(teacher, guider.model_patcher, solve.name),
            *setting_mismatches(teacher, getattr(guider, "cfg", None), shape),
        ]
        differences = [*grid, *others]
        if differences and self.on_mismatch == "refuse":
            raise _Refused(
                f"the schedule does not fit this run: {'; '.join(differences)}. Change the run, load another schedule, "
                "or set on_mismatch to map"
            )
        if differences and self.on_mismatch == "off":
            return _Laid(None, notes=(*other_run_words(differences), "The schedule is off, as on_mismatch asks."))
        plan = make_plan(schedule, levels, traits or PLAIN, top, stages)
        if plan.lost:
            # A preset's own words say what to do.
            advice = "" if resolved else f" Use Flexi Preset, or a schedule for {len(levels) - 1} steps."
            words.insert(0, plan.lost + advice)
        words[:0] = caution_words(others)
        # How it was mapped says all about another grid.
        return _Laid(plan, tuple(words), tuple(other_run_words(others)), resolved, lesson)


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
    stages = stages_in(guider)
    starts = () if stages is None else stages.starts(levels)
    return Facts(identity, traits, levels, solve, one, noise.shape[0], starts)


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


def _not_finite(latent: Any) -> list[str]:
    """Return a sentence for the report where a run ended in numbers that are none; nothing where all are finite."""
    finite = bool(torch.isfinite(packed(latent)).all())
    return [] if finite else ["The picture is spoiled: some of its numbers are not finite. Bypass Flexi Apply."]


def is_guided(guider: Any) -> bool:
    """Return whether a guider of the host runs with and without the prompt: any guidance scale of it is not 1."""
    scales = [value for name, value in vars(guider).items() if name.startswith("cfg") and isinstance(value, int | float)]
    return any(not math.isclose(scale, 1.0) for scale in scales)


def _other_caches(model_options: dict[str, Any]) -> str:
    """Return the names of other step caches on a model, empty where there is none."""
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    keys = {key for of_kind in wrappers.values() for key, functions in of_kind.items() if functions}
    return " and ".join(name for key, name in _OTHER_CACHES.items() if key in keys)
