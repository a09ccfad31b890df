"""Every way to sample faster that `rivals.py` measures: what it is, its knob, and how it changes a run of the host."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from scene_host import BATCH, SceneBackend

from flexi_core import Schedule
from flexi_core.metrics import psnr_db
from flexi_core.networks.unet import block_count
from flexi_core.schedule.presets import deepcache
from search_tools.backends.teacher import SEARCH_SEEDS

SAME_SOLVER, BEST_SOLVER, DEEPCACHE = "same solver, fewer steps", "best solver, fewer steps", "DeepCache"
# Deterministic, and one call of the network for each step, as the teacher's solvers.
SOLVERS = (
    "euler", "dpmpp_2m", "uni_pc", "uni_pc_bh2", "res_multistep", "deis", "ipndm", "ipndm_v", "lms", "gradient_estimation",
)  # fmt: skip
SCHEDULERS = ("normal", "simple", "karras", "sgm_uniform", "beta", "kl_optimal")
INTERVALS = (2, 3, 5, 8)  # of DeepCache
FORECAST_DEPTHS = 3
GATES = (0.1, 0.2, 0.3, 0.5, 0.7)  # share of the steps after which guidance is held
THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)  # of core's caches; 0.2 is their default
FIRST_BLOCK_THRESHOLDS = (0.02, 0.05, 0.1, 0.15, 0.25, 0.4)
TEACACHE_THRESHOLDS = (0.05, 0.1, 0.2, 0.4)


@dataclass(frozen=True)
class Rival:
    """One way to sample faster, at one setting of its knob.

    Args:
        family: whose knob it is; a curve of the plots.
        knob: the setting, in words.
        patch: returns the MODEL that samples, from the teacher's.
        sampler, scheduler, steps: where they are not the teacher's.
        batch: the largest that it can sample.
        schedule: its text, where it is one of this project's.
    """

    family: str
    knob: str
    patch: Callable[[Any], Any] = lambda model: model
    sampler: str | None = None
    scheduler: str | None = None
    steps: int | None = None
    batch: int = BATCH
    schedule: str = ""

    @property
    def name(self) -> str:
        return f"{self.family}, {self.knob}"


TEACHER = Rival("teacher", "all steps full")


def scheduled(family: str, knob: str, schedule: Schedule) -> Rival:
    """Return what samples under a schedule."""

    def patch(model: Any) -> Any:
        from flexi_core.host import apply_schedule

        return apply_schedule(model, schedule)[0]

    return Rival(family, knob, patch, schedule=str(schedule))


def same_solver(steps: Sequence[int]) -> list[Rival]:
    """Return the teacher's own sampler and scheduler with fewer steps."""
    return [Rival(SAME_SOLVER, f"{count} steps", steps=count) for count in steps]


def best_solver(backend: SceneBackend, steps: int, pictures: int, say: Callable[[str], None]) -> tuple[str, str]:
    """Return the solver and scheduler whose pictures of a step count are nearest to the teacher's.

    Samples of the search's seeds decide: first every solver on the teacher's scheduler, then the best three on the others.
    """
    wanted = backend.pictures(backend.teacher(SEARCH_SEEDS, pictures))
    known: dict[tuple[str, str], float] = {}

    def judge(sampler: str, scheduler: str) -> None:
        model = backend.scenes.model
        latents = backend.draw(model, SEARCH_SEEDS, pictures, sampler=sampler, scheduler=scheduler, steps=steps)
        quality = float(psnr_db(backend.pictures(latents), wanted).mean())
        known[sampler, scheduler] = -math.inf if math.isnan(quality) else quality  # some diverge on some grids

    for sampler in SOLVERS:
        judge(sampler, backend.settings.scheduler)
    for sampler, own in sorted(known, key=known.get)[-3:]:
        for scheduler in SCHEDULERS:
            if scheduler != own:
                judge(sampler, scheduler)
    best = max(known, key=known.get)
    say(f"{steps} steps: nearest to the teacher is {' '.join(best)}, {known[best]:.1f} dB")
    return best


def deepcaches(backend: SceneBackend) -> list[Rival]:
    """Return DeepCache (Ma et al., 2023) over its interval N and the depth of its partial steps.

    And TaylorSeer-like (Liu et al., 2025), at the shallowest depths: the same with a deep feature that is forecast, linearly.
    """
    steps, depths = backend.settings.steps, tuple(backend.cost.partial_macs)
    return [
        scheduled(family, f"N={interval}, depth {depth}", deepcache(steps, interval, depth, forecast))
        for forecast, (family, tried) in enumerate({DEEPCACHE: depths, "TaylorSeer-like": depths[:FORECAST_DEPTHS]}.items())
        for depth in tried
        for interval in INTERVALS
    ]


def tgates(backend: SceneBackend) -> list[Rival]:
    """Return what T-GATE (Zhang et al., 2024) does to guidance: after a gate, the conditional half alone."""
    steps = backend.settings.steps
    gates = sorted({max(1, round(share * steps)) for share in GATES})
    texts = {gate: f"{gate}*(F)|{steps - gate}*(f)" for gate in gates}
    return [scheduled("T-GATE-like", f"gate at step {gate}", Schedule.parse(text)) for gate, text in texts.items()]


def core_caches() -> list[Rival]:
    """Return the host's own LazyCache and EasyCache nodes over their threshold, and EasyCache with its caches kept apart.

    EasyCache as it is (ComfyUI 0.3.64) adds the cached difference of every conditioning to all rows of a batch: conditional and
    unconditional half become the same on skipped steps, and more than one picture at a time is an error. And it never sees the
    calls of a network of Stable Diffusion 3's kind, which does not offer the hook that it waits at.
    """
    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode, easycache_forward_wrapper

    def patched(node: Any, threshold: float, correct: bool = False) -> Callable[[Any], Any]:
        def patch(model: Any) -> Any:
            model = node.execute(model, threshold, 0.15, 0.95, False)[0]
            if correct:
                options = model.model_options["transformer_options"]
                options["easycache"] = _kept_apart(options["easycache"])
                network = model.get_model_object("diffusion_model")
                if block_count(network) is None:
                    forward = partial(easycache_forward_wrapper, type(network).forward.__get__(network))
                    model.add_object_patch("diffusion_model.forward", forward)
            return model

        return patch

    found = []
    for threshold in THRESHOLDS:
        knob = f"threshold {threshold:g}"
        found.append(Rival("LazyCache", knob, patched(LazyCacheNode, threshold)))
        found.append(Rival("EasyCache, corrected", knob, patched(EasyCacheNode, threshold, correct=True)))
        if threshold in THRESHOLDS[1::2]:
            found.append(Rival("EasyCache as it is", knob, patched(EasyCacheNode, threshold), batch=1))
    return found


def packs(folder: Path, say: Callable[[str], None]) -> list[Rival]:
    """Return first-block cache and TeaCache by their own node packs, as they lie in a folder; one that is not there is said."""
    found = []
    first_block = _pack_node(folder / "Comfy-WaveSpeed" / "__init__.py", "ApplyFBCacheOnModel", say)
    if first_block is not None:
        for threshold in FIRST_BLOCK_THRESHOLDS:

            def patch(model: Any, threshold: float = threshold) -> Any:
                return first_block().patch(model, "diffusion_model", threshold)[0]

            found.append(Rival("first-block cache", f"threshold {threshold:g}", patch))
    teacache = _pack_node(folder / "ComfyUI-TeaCache" / "nodes.py", "TeaCache", say)
    if teacache is not None:
        for threshold in TEACACHE_THRESHOLDS:

            def patch(model: Any, threshold: float = threshold) -> Any:
                # The pack has coefficients for some networks by name; flux is the first of them.
                return teacache().apply_teacache(model, "flux", threshold, 0.0, 1.0, "cpu")[0]

            found.append(Rival("TeaCache", f"threshold {threshold:g}", patch))
    return found


def runnable(backend: SceneBackend, rivals: Sequence[Rival], say: Callable[[str], None]) -> Iterator[Rival]:
    """Yield the rivals of the families that sample this model; why the others do not is said."""
    tried: set[str] = set()
    failed: set[str] = set()
    for rival in rivals:
        if rival.family not in tried:
            tried.add(rival.family)
            try:
                rows = min(rival.batch, 2)
                latents = backend.draw(rival.patch(backend.scenes.model), SEARCH_SEEDS, rows, steps=3)
                if not latents.isfinite().all():
                    raise ValueError("its latents are not finite")
            except Exception as error:  # whatever another pack's code raises on a network that it does not know
                failed.add(rival.family)
                say(f"{rival.family} is skipped on {backend.scenes.name}: {_reason(error)}")
        if rival.family not in failed:
            yield rival


def _kept_apart(holder: Any) -> Any:
    """Return core's EasyCache state with each conditioning's rows given their own cached difference."""
    import torch
    from comfy_extras.nodes_easycache import EasyCacheHolder

    class KeptApart(EasyCacheHolder):
        def apply_cache_diff(self, x: torch.Tensor, uuids: list) -> torch.Tensor:
            if self.first_cond_uuid in uuids:
                self.total_steps_skipped += 1
            return x + torch.cat([self.uuid_cache_diffs[uuid] for uuid in uuids])

        def clone(self) -> KeptApart:
            return KeptApart(
                self.reuse_threshold,
                self.start_percent,
                self.end_percent,
                self.subsample_factor,
                self.offload_cache_diff,
                self.verbose,
            )

    return KeptApart.clone(holder)


def _pack_node(file: Path, name: str, say: Callable[[str], None]) -> type | None:
    """Return a node class of another pack's module; None, with the reason said, where that fails."""
    pack = file.parent
    try:
        return _import_file(file).NODE_CLASS_MAPPINGS[name]
    except Exception as error:  # whatever another pack's code raises when it is imported
        say(f"{pack.name} is skipped: {_reason(error)}")
        return None


def _reason(error: Exception) -> str:
    """Return an error in one line; some print a whole network."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) < 160 else f'{text[:60]} ... {text[-90:]}'}"


def _import_file(file: Path) -> ModuleType:
    name = file.parent.name if file.stem == "__init__" else f"{file.parent.name}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)  # an __init__.py makes a package
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
