"""The command line: `flexi demo | search | evaluate | show | train-demo`.

Results go to stdout (`--json` for programs), progress and messages to stderr; bad input ends with one line and exit code 2.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from flexi_core import FlexiError, Schedule, load_schedule, save_schedule
from flexi_core.demo.model import DEFAULT_CFG
from flexi_core.demo.sampling import SAMPLERS, SCHEDULERS

from .teacher import JUDGE_SEEDS, TeacherSettings

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
_out, _err = Console(), Console(stderr=True)

Sampler = Enum("Sampler", {name: name for name in SAMPLERS})
Scheduler = Enum("Scheduler", {name: name for name in SCHEDULERS})
SpaceChoice = Enum("SpaceChoice", {"all": "all", "paper": "paper", "paper-x": "paper-x", "free": "free"})
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Seed = Annotated[int, typer.Option(help="Seed of the search.")]
Samples = Annotated[int, typer.Option(min=2, help="Samples to judge on; compare rFID of equal counts only.")]


def _one_line_errors(command: Callable) -> Callable:
    @wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except FlexiError as error:
            _err.print(f"flexi: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            _err.print("flexi: interrupted")
            raise typer.Exit(130) from error

    return wrapped


@app.command()
@_one_line_errors
def demo(
    folder: Annotated[Path, typer.Option(help="Where the results go.")] = Path("flexi_demo"),
    steps: Annotated[int, typer.Option(help="Euler steps of the teacher.")] = 50,
    speedup: Annotated[float, typer.Option(min=1.0, help="Least reduction of the network's MACs.")] = 5.0,
    minutes: Annotated[float, typer.Option(min=0.01, help="Time for the search itself.")] = 1.5,
    samples: Samples = 32,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Search a schedule for the embedded model and show what it is worth: a schedule file, pictures and a table."""
    from .judge import Judge, baselines
    from .pictures import save_image_rows, save_pareto
    from .study import with_results

    settings = TeacherSettings(steps=steps)
    _make_folder(folder)
    began = time.monotonic()
    backend, space, study, result = _search(
        settings, speedup, SpaceChoice.all, seed, minutes, None, f"sqlite:///{folder / 'study.db'}", None, 24
    )
    if result.best is None:
        raise FlexiError("the search was interrupted before its first candidate; run the same command to go on")
    file = folder / f"flexi_demo_{speedup:g}x.json"
    if result.interrupted:
        save_schedule(result.best.schedule.with_info(teacher=backend.identity), file)
        _err.print(f"interrupted; {file} has the best schedule so far. The same command goes on with the search.")
    with _progress("samples") as bar:
        judge = Judge(backend, samples, JUDGE_SEEDS, bar)
        best, images = judge.judge("searched", result.best.schedule)
        rows = [judge.teacher_row, best]
        rows.append(judge.judge_fewer_steps(space.full_steps))
        pictures = [("teacher", judge.teacher.images), (f"searched, {best.speedup_macs:.1f}x fewer MACs", images)]
        for name, schedule in baselines(space)[:2]:
            row, images = judge.judge(name, schedule)
            rows.append(row)
            pictures.append((name, images))
        curves = judge.curves((2, 3, 5, 8))
    save_schedule(with_results(result.best.schedule, backend.identity, best, samples, study, seed), file)
    save_image_rows(folder / "images.png", pictures)
    title = f"{settings.steps} {settings.sampler} steps, {samples} unseen seeds"
    save_pareto(folder / "pareto.png", result.candidates, settings.steps, rows, curves, title)
    seconds = time.monotonic() - began
    if as_json:
        _print_json({"schedule": str(result.best.schedule), "file": str(file), "rows": [r.as_dict() for r in rows],
                     "candidates": len(result.candidates), "seconds": seconds})  # fmt: skip
        return
    _print_table(rows, title)
    _out.print(f"schedule   {result.best.schedule}", highlight=False, soft_wrap=True)
    _out.print(f"written    {file}, {folder / 'images.png'}, {folder / 'pareto.png'}", highlight=False, soft_wrap=True)
    _out.print(f"took       {seconds:.0f} s, {len(result.candidates)} candidates", highlight=False)


@app.command()
@_one_line_errors
def search(
    steps: Annotated[int, typer.Option(help="Steps of the teacher.")] = 50,
    sampler: Annotated[Sampler, typer.Option(help="Sampler of the teacher.")] = Sampler.euler,
    scheduler: Annotated[Scheduler, typer.Option(help="Scheduler of the teacher.")] = Scheduler.normal,
    cfg: Annotated[float, typer.Option(min=0.0, help="Guidance scale of the teacher.")] = DEFAULT_CFG,
    speedup: Annotated[float, typer.Option(min=1.0, help="Least reduction of the network's MACs.")] = 5.0,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Budget of the study, evaluation time. [default: 10]")] = None,
    evaluations: Annotated[int | None, typer.Option(min=1, help="Budget of the study, candidates.")] = None,
    seed: Seed = 0,
    storage: Annotated[str, typer.Option(help="Optuna storage URL.")] = "sqlite:///flexi_studies.db",
    study: Annotated[str | None, typer.Option(help="Study name. [default: made from the settings]")] = None,
    out: Annotated[Path | None, typer.Option(help="Schedule file. [default: made from the settings]")] = None,
    space: Annotated[
        SpaceChoice, typer.Option(help="paper: full, partial, removed null; free: full and extrapolated null.")
    ] = (SpaceChoice.all),
    samples: Annotated[int, typer.Option(min=16, help="Teacher samples that the search compares with.")] = 32,
    as_json: Json = False,
) -> None:
    """Search a schedule for a sampling run of the embedded model; the same command goes on where it was stopped."""
    from .judge import Judge
    from .study import with_results

    settings = TeacherSettings(sampler.value, scheduler.value, steps, cfg)
    if minutes is None and evaluations is None:
        minutes = 10.0
    out = out or Path(f"flexi_{settings.sampler}_{steps}_{speedup:g}x.json")
    if not out.parent.is_dir():
        raise FlexiError(f"the folder {out.parent} does not exist; make it or give another --out")
    if out.is_dir():
        raise FlexiError(f"{out} is a folder; give --out the name of a file")
    backend, _, opened, result = _search(settings, speedup, space, seed, minutes, evaluations, storage, study, samples)
    if result.best is None:
        raise FlexiError("the search was interrupted before its first candidate; run the same command to go on")
    if result.interrupted:
        save_schedule(result.best.schedule.with_info(teacher=backend.identity), out)
        _err.print(f"interrupted; {out} has the best schedule so far. The same command goes on with the search.")
    with _progress("samples") as bar:
        row, _ = Judge(backend, 16, JUDGE_SEEDS, bar).judge("searched", result.best.schedule)
    save_schedule(with_results(result.best.schedule, backend.identity, row, 16, opened, seed), out)
    if as_json:
        _print_json({"schedule": str(result.best.schedule), "file": str(out), "study": opened.study_name,
                     "interrupted": result.interrupted, "candidates": len(result.candidates), "seconds": result.seconds,
                     "search": asdict(result.best.evaluation), "judged": row.as_dict()})  # fmt: skip
        return
    _print_table([row], "16 unseen seeds")
    _out.print(f"schedule   {result.best.schedule}", highlight=False, soft_wrap=True)
    _out.print(f"written    {out}", highlight=False)
    _out.print(f"study      {opened.study_name}: {len(result.candidates)} candidates, {result.seconds:.0f} s", highlight=False)


@app.command()
@_one_line_errors
def evaluate(
    files: Annotated[list[Path], typer.Argument(help="Schedule files made for the same run of the embedded model.")],
    samples: Samples = 64,
    first_seed: Annotated[int, typer.Option(min=JUDGE_SEEDS, help="First of the unseen seeds.")] = JUDGE_SEEDS,
    as_json: Json = False,
) -> None:
    """Judge schedules on seeds that no search ever saw, beside fewer steps and DeepCache at the cost of the first."""
    from .embedded import EmbeddedBackend
    from .judge import Judge, baselines
    from .space import Space

    schedules = {str(file): load_schedule(file) for file in files}
    settings = _settings_of(schedules[str(files[0])], files[0])
    for file, schedule in schedules.items():
        if _settings_of(schedule, Path(file)) != settings:
            raise FlexiError(f"{file} was made for another run than {files[0]}; judge it by a command of its own")
    backend = EmbeddedBackend(settings)
    for file, schedule in schedules.items():
        for key in ("architecture", "weights"):
            if schedule.info["teacher"].get(key, backend.identity[key]) != backend.identity[key]:
                _err.print(f"{file}: made for other {key} than the embedded model has now", style="yellow", markup=False)
    speedup = settings.steps / Space(settings.steps, 1, backend.cost).spent(schedules[str(files[0])])
    space = Space(settings.steps, speedup, backend.cost)
    with _progress("samples") as bar:
        judge = Judge(backend, samples, first_seed, bar)
        rows = [judge.teacher_row, *(judge.judge(Path(file).stem, schedule)[0] for file, schedule in schedules.items())]
        rows += [judge.judge_fewer_steps(space.full_steps)]
        rows += [judge.judge(name, other)[0] for name, other in baselines(space)]
    if as_json:
        _print_json({"schedules": [str(schedule) for schedule in schedules.values()], "samples": samples,
                     "first_seed": first_seed, "rows": [row.as_dict() for row in rows]})  # fmt: skip
        return
    _print_table(rows, f"{settings.steps} {settings.sampler} steps, {samples} unseen seeds")


@app.command()
@_one_line_errors
def show(
    file: Annotated[Path, typer.Argument(help="A schedule file.")],
    as_json: Json = False,
) -> None:
    """Show what a schedule file says: the steps, the run it was made for, what was measured."""
    from flexi_core.schedule_file import to_dict

    schedule = load_schedule(file)
    if as_json:
        _print_json(to_dict(schedule))
        return
    _out.print(str(schedule), highlight=False, soft_wrap=True)
    styles = {"F": "white on blue", "P": "black on cyan", "N": "dim", "X": "black on yellow"}
    for at in range(0, len(schedule), 50):
        line = "".join(f"[{styles[letter]}]{letter}[/]" for letter in schedule.letters[at : at + 50])
        _out.print(f"{at + 1:>5}  {line}")
    for part in ("teacher", "measured", "provenance"):
        table = Table(title=part, title_justify="left", show_header=False)
        for key, value in schedule.info.get(part, {}).items():
            if isinstance(value, list) and len(value) > 4:
                shown = f"{value[0]} ... {value[-1]} ({len(value)} values)"
            else:
                shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            table.add_row(escape(key), escape(shown))
        if table.row_count:
            _out.print(table)


@app.command("train-demo")
@_one_line_errors
def train_demo(
    folder: Annotated[Path, typer.Option(help="Where checkpoint and weights go; a checkpoint in it is continued.")] = Path(
        "flexi_training"
    ),
    images: Annotated[int, typer.Option(min=64, help="Scenes to train the U-Net on.")] = 150_000,
    classifier_images: Annotated[int, typer.Option(min=256, help="Scenes to train the classifier on.")] = 307_200,
    seed: Seed = 1,
    as_json: Json = False,
) -> None:
    """Train the embedded model and its classifier anew, from procedural scenes, and judge them as they were accepted."""
    from flexi_core.demo.train import accept, train_classifier, train_unet

    _make_folder(folder)
    with _progress("scenes") as bar:
        files = [
            train_classifier(folder, images=classifier_images, seed=seed, progress=lambda *a: bar("classifier", *a[:2])),
            train_unet(folder, images=images, seed=seed, progress=lambda *a: bar(f"U-Net, loss {a[2]:.4f}", *a[:2])),
        ]
    with _progress("samples") as bar:
        accepted = accept(*files, progress=bar)
    if as_json:
        _print_json({"files": [str(f) for f in files], **accepted})
        return
    for key, value in accepted.items():
        _out.print(f"{key:<28} {value:.4f}", highlight=False)
    _out.print(f"written    {', '.join(map(str, files))}", highlight=False)


def _search(settings, speedup, choice, seed, minutes, evaluations, storage, name, samples):
    from .embedded import EmbeddedBackend
    from .fitness import Fitness, stages_to
    from .space import FAMILIES, Space
    from .study import open_study, run_search

    backend = EmbeddedBackend(settings)
    families = FAMILIES if choice is SpaceChoice.all else (choice.value,)
    space = Space(settings.steps, speedup, backend.cost, families)
    identity = {k: v for k, v in backend.identity.items() if k != "sigmas"}
    decides = {**identity, "speedup": speedup, "space": list(families), "seed": seed, "samples": samples}
    name = name or (
        f"{settings.sampler}-{settings.scheduler}-{settings.steps}-cfg{settings.cfg:g}-{speedup:g}x-"
        f"{choice.value}-n{samples}-seed{seed}-{identity['weights'][-6:]}"
    )
    study = open_study(storage, name, decides)
    with _progress("samples") as bar:
        fitness = Fitness(backend, stages_to(samples), progress=lambda done, total: bar("teacher", done, total))
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]} left"))
    with Progress(*columns, console=_err, transient=True) as progress:
        task = progress.add_task("search", total=1.0, left="?")

        def on_progress(state) -> None:
            best = (
                f"rFID {state.best.evaluation.rfid:.3g}, {state.best.evaluation.psnr_db:.1f} dB" if state.best else "none yet"
            )
            done = state.seconds / max(state.seconds + state.seconds_left, 1e-9)
            left = f"{max(state.seconds_left, 0):.0f} s"
            progress.update(task, completed=done, left=left, description=f"search: {state.finished} candidates, best {best}")

        result = run_search(study, space, fitness, seed=seed, minutes=minutes, evaluations=evaluations, on_progress=on_progress)
    return backend, space, study, result


def _settings_of(schedule: Schedule, file: Path) -> TeacherSettings:
    teacher = schedule.info.get("teacher", {})
    if teacher.get("model") != "embedded":
        raise FlexiError(
            f"{file}: made for {teacher.get('model', 'an unnamed model')}; evaluate needs one for the embedded model"
        )
    missing = [key for key in ("sampler", "scheduler", "steps", "cfg") if key not in teacher]
    if missing:
        raise FlexiError(f"{file}: its teacher lacks {', '.join(missing)}; write them into the file or search anew")
    return TeacherSettings(teacher["sampler"], teacher["scheduler"], teacher["steps"], teacher["cfg"])


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FlexiError(f"{folder}: cannot be made ({error.strerror or error}); give another --folder") from error


@contextmanager
def _progress(unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function of (name, done, total) that draws one bar with the time left on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=_err, transient=True) as progress:
        tasks: dict[str, int] = {}

        def update(name: str, done: int, total: int) -> None:
            key = name.split(",")[0]
            if key not in tasks:
                for task in tasks.values():
                    progress.update(task, visible=False)
                tasks[key] = progress.add_task(name, total=total)
            progress.update(tasks[key], description=name, completed=done, total=total)

        yield update


def _print_table(rows, title: str) -> None:
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in ("", "MACs", "time", "PSNR, dB", "SSIM", "rFID", "captions"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in rows:
        same = row.psnr_db == float("inf")
        table.add_row(
            row.name,
            f"{row.speedup_macs:.2f}x",
            f"{row.speedup_time:.2f}x",
            # Half the 95 % interval: both ends would not fit into 80 columns.
            "same" if same else f"{row.psnr_db:.1f} ±{(row.psnr_high - row.psnr_low) / 2:.1f}",
            f"{row.ssim:.4f}",
            "0" if same else f"{row.rfid:.3g}",
            f"{row.caption_accuracy:.1%}",
        )
    _out.print(table)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))
