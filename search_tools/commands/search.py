"""`flexi search`: a schedule for one sampling run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from flexi_core import FlexiError, save_schedule

from .. import console
from ..backends.teacher import JUDGE_SEEDS
from ..strategies.strategies import STRATEGIES
from .options import (
    BaseDirectory,
    Checkpoint,
    ClipVision,
    ComfyUI,
    Grace,
    HostChoice,
    Json,
    Negative,
    NodeId,
    Prompt,
    PromptsFile,
    SamplerName,
    SchedulerName,
    Seed,
    Size,
    SpaceChoice,
    Strategy,
    TeacherCfg,
    TeacherSteps,
    UNetFile,
    WorkflowFile,
    check_out,
    default_out,
    open_chosen_backend,
)

JUDGED = 16  # samples


@console.one_line_errors
def search(
    steps: TeacherSteps = 50,
    sampler: SamplerName = "euler",
    scheduler: SchedulerName = "normal",
    cfg: TeacherCfg = None,
    unet: UNetFile = None,
    size: Size = None,
    comfyui: ComfyUI = None,
    workflow: WorkflowFile = None,
    node: NodeId = None,
    prompts: PromptsFile = None,
    base_directory: BaseDirectory = None,
    checkpoint: Checkpoint = None,
    prompt: Prompt = "",
    negative: Negative = "",
    clip_vision: ClipVision = None,
    speedup: Annotated[float, typer.Option(min=1.0, help="Least reduction of the network's MACs.")] = 5.0,
    quality: Annotated[
        float | None,
        typer.Option(help="Instead of --speedup: how near the pictures are to come to those of all steps, PSNR in dB."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Time for everything; the study's earlier searches count. [default: 10]")
    ] = None,
    evaluations: Annotated[int | None, typer.Option(min=1, help="Budget of the study, candidates.")] = None,
    seed: Seed = 0,
    storage: Annotated[str, typer.Option(help="Optuna storage URL.")] = "sqlite:///flexi_studies.db",
    study: Annotated[str | None, typer.Option(help="Study name. [default: made from the settings]")] = None,
    out: Annotated[Path | None, typer.Option(help="Schedule file. [default: made from the settings]")] = None,
    strategy: Annotated[Strategy, typer.Option(help="nsga2 searches a whole front: take any speed-up with flexi pareto.")] = (
        Strategy[STRATEGIES[0]]
    ),
    space: Annotated[
        SpaceChoice,
        typer.Option(
            help="paper: equal segments, removed null steps; paper-x: extrapolated ones; free: any segments; levels: full "
            "steps at noise levels of their own."
        ),
    ] = SpaceChoice.all,
    samples: Annotated[
        int, typer.Option("--samples", "--seeds", min=16, help="Teacher samples to compare with, each from a seed of its own.")
    ] = 32,
    finalists: Annotated[int, typer.Option(min=0, help="How many of the best meet again on twice the samples.")] = 4,
    fit: Annotated[
        bool,
        typer.Option("--fit/--no-fit", help="Fit how extrapolated steps are blended, so that the run lands on the teacher's."),
    ] = True,
    reuse_guidance: Annotated[
        bool, typer.Option("--reuse-guidance", help="Let steps run the prompt's half alone, with the last step's guidance.")
    ] = False,
    guesses: Annotated[int, typer.Option(min=0, help="Schedules to start from, made from some full runs; 0 makes none.")] = 6,
    move: Annotated[
        bool, typer.Option("--move/--no-move", help="Move the noise levels of the best schedule's full steps in the end.")
    ] = True,
    create_only: Annotated[bool, typer.Option("--create-only", help="Only make the study; flexi worker searches it.")] = False,
    grace: Grace = None,
    as_json: Json = False,
) -> None:
    """Search a schedule for a sampling run; the same command goes on where it stopped.

    The run is one of the embedded model, of --unet, or, with --comfyui, of a workflow or a checkpoint of the user's own.
    """
    from ..deadline import Deadline
    from ..measures.judge import Judge, judging_runs
    from ..settings import SearchSettings
    from ..space.space import FAMILIES
    from ..study.study import open_study, with_results
    from .quality import run_for_quality
    from .running import GRACE, run, say

    if minutes is None and evaluations is None:
        minutes = 10.0
    deadline = Deadline(minutes, lambda judged: judging_runs(judged, backend.settings.steps, 1 / speedup), JUDGED)
    check_out(out)
    host = HostChoice(comfyui, workflow, node, prompts, base_directory, checkpoint, prompt, negative, clip_vision)
    backend = open_chosen_backend(sampler, scheduler, steps, cfg, unet=unet, size=size, host=host)
    if reuse_guidance and backend.settings.cfg == 1:
        raise FlexiError("--reuse-guidance is for guided runs; this one has cfg 1 and nothing to reuse")
    if quality is not None and create_only:
        raise FlexiError("--quality makes a study for each number of full steps that it tries; --create-only makes one")
    families = FAMILIES if space is SpaceChoice.all else (space.value,)
    wanted = SearchSettings.of(
        backend,
        speedup,
        samples,
        families=families,
        strategy=strategy.value,
        seed=seed,
        finalists=finalists,
        fit=fit,
        reuse_guidance=reuse_guidance,
        guesses=guesses,
        move=move,
    )
    if quality is None:  # refused before a study of it is made
        wanted.space(backend.cost, backend.identity["sigmas"], backend.traits, sorted({*backend.cuts, *backend.starts}))
    if create_only:
        opened = open_study(storage, study or wanted.default_name, wanted)
        if as_json:
            console.print_json({"study": opened.study_name})
            return
        console.out.print(f"study      {opened.study_name}", markup=False, highlight=False, soft_wrap=True)
        return
    how = {"deadline": deadline, "evaluations": evaluations, "grace": grace or GRACE}
    tried = None
    if quality is None:
        opened, _, result = run(backend, wanted, storage, study, **how)
    else:
        tried = run_for_quality(backend, wanted, storage, study, quality, **how)
        if tried is None:
            _say_all_steps(quality, backend.settings.steps, as_json)
            return
        opened, result, speedup = tried.study, tried.result, backend.settings.steps / tried.full
    out = out or default_out(backend, speedup)
    if result.best is None:
        raise FlexiError("the search was interrupted before its first candidate; run the same command to go on")
    if result.interrupted:
        save_schedule(result.best.schedule.with_info(teacher=backend.identity), out)
        console.err.print(f"interrupted; {out} has the best schedule so far. The same command goes on with the search.")
    judged = deadline.judged_samples()
    if judged < JUDGED:
        say(f"for lack of time the result is judged on {judged} samples, not on {JUDGED}: give more --minutes")
    with console.progress_bar("samples") as bar:
        row, _ = Judge(backend, judged, JUDGE_SEEDS, bar).judge("searched", result.best.schedule)
    save_schedule(with_results(result.best.schedule, backend.identity, row, judged, opened, seed), out)
    if as_json:
        console.print_json({"schedule": str(result.best.schedule), "file": str(out), "study": opened.study_name,
                     "interrupted": result.interrupted, "candidates": len(result.candidates), "seconds": result.seconds,
                     "search": asdict(result.best.evaluation), "judged": row.as_dict(),
                     **({"quality": quality, "reached": tried.reached, "full": tried.full} if tried else {})})  # fmt: skip
        return
    if tried:
        missed = "" if tried.reached else "; it was not reached: more --minutes go on with it"
        console.out.print(
            f"quality    {tried.psnr_db:.1f} dB on the search's samples with {tried.full} of {backend.settings.steps} steps "
            f"computed, {quality:g} asked for{missed}",
            highlight=False,
            soft_wrap=True,
        )
    console.print_table([row], f"{judged} unseen seeds")
    console.out.print(f"schedule   {result.best.schedule}", highlight=False, soft_wrap=True)
    console.out.print(f"written    {out}", highlight=False)
    console.out.print(
        f"study      {opened.study_name}: {len(result.candidates)} candidates, {result.seconds:.0f} s", highlight=False
    )


def _say_all_steps(quality: float, steps: int, as_json: bool) -> None:
    """Say that no schedule is near enough."""
    if as_json:
        console.print_json({"schedule": None, "file": None, "quality": quality, "reached": False})
        return
    console.out.print(f"No schedule is known that comes within {quality:g} dB: sample all {steps} steps.", highlight=False)
