"""The report of a study: one HTML file that needs nothing but a browser."""

from __future__ import annotations

import base64
import json
import logging
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna

from flexi_core import __version__
from flexi_core.errors import FlexiError
from flexi_core.files import file_stem, replace_file
from flexi_core.schedule.file import to_dict
from flexi_core.schedule.kinds import StepKind
from flexi_core.schedule.schedule import Schedule

from ..backends.protocol import Backend
from ..backends.teacher import SEARCH_SEEDS
from ..settings import SearchSettings
from ..study.front import Found, as_fast, evaluated, fastest_of, found_in, front, ranked, with_search_results
from ..study.reopen import OwnHost, reopen
from ..study.study import settings_of
from .charts import pareto_chart, progress_chart
from .pictures import png_uri, visible

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # a name, the work done and the work in all

_STRIPS = 6  # schedules shown step by step
_PICTURED = 4  # candidates with an image row
_TABLE = 20  # rows of the table, beside the front's
_SMALL_SIDE = 128  # pixels up to which a picture is enlarged without smoothing
_TEMPLATE = "report.html.j2"


def write_report(
    study: optuna.Study,
    file: Path,
    samples: int = 6,
    *,
    images: bool = True,
    progress: Progress = lambda name, done, total: None,
    own: OwnHost | None = None,
) -> str | None:
    """Write the report of a study, whole or not at all.

    Args:
        study: of `flexi search`, finished or not.
        file: HTML.
        samples: images in a row.
        images: sample them; where the study's back end cannot be opened the report says why and has none.
        progress: called while images are sampled.
        own: the user's own ComfyUI, for a study of a run in it.

    Returns:
        why the report has no images; None where it has.

    Raises:
        FlexiError: it is not a study of this project, or the file cannot be written.
    """
    settings, found = settings_of(study), found_in(study)
    judged, on_front = ranked(found), front(found)
    asked = min(settings.speedup, fastest_of(found)) if judged else settings.speedup
    fast = ranked(as_fast(found, asked))
    backend, rows, no_images = None, [], "they were not asked for (--no-images)"
    if images and fast:
        try:
            backend = reopen(settings, own or OwnHost())
            rows, no_images = _image_rows(backend, _pictured(fast, on_front), samples, progress), None
        except (FlexiError, OSError, RuntimeError) as error:  # a device out of memory, a teacher that does not load
            log.warning("the report has no images: %s", error)
            no_images = str(error)
    features = None if backend is None else backend.features.name
    teacher = settings.identity if backend is None else dict(backend.identity)
    shown = fast[:_STRIPS]
    listed = {one.number: one for one in (*fast[:_TABLE], *on_front)}
    context = {
        "version": __version__,
        "study": study.study_name,
        "quoted": shlex.quote(study.study_name),
        "settings": list(_flat(settings.as_dict())),
        "wanted": settings.speedup,
        "asked": asked,
        "fastest": fastest_of(found) if judged else None,
        "samples": settings.samples,
        "teacher": settings.teacher_settings,
        "features": features,
        "finished": len(found),
        "evaluated": len(evaluated(found)),
        "seconds": sum(one.seconds for one in found),
        "best": fast[0] if fast else None,
        "cards": [(one, _cells(one.schedule)) for one in shown],
        "listed": sorted(listed.values(), key=lambda one: (-one.speedup, one.evaluation.mse)),
        "front": {one.number for one in on_front},
        "rows": rows,
        "no_images": no_images,
        "charts": _charts(found, on_front, fast[0], asked) if fast else {},
        "file": _file_of(fast[0], settings, study.study_name, teacher, features) if fast else None,
    }
    text = _render(context)
    try:
        with replace_file(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FlexiError(f"{file}: cannot be written ({error.strerror or error})") from error
    return no_images


def file_name_of(study_name: str) -> str:
    """Return a name for a study's report that every file system takes."""
    return f"flexi_report_{re.sub(r'[^A-Za-z0-9_.-]+', '_', study_name)[:100]}.html"


def _render(context: Mapping[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    # The library's own text, which is fit to stand in a script element; nothing of the study is in it.
    plotly = Markup(get_plotlyjs()) if context["charts"] else ""
    return environment.get_template(_TEMPLATE).render(**context, kinds={kind.value: kind for kind in StepKind}, plotly=plotly)


def _number(value: float, form: str) -> str:
    """Return a measured number; the PSNR of equal images, which is infinite, in words."""
    return format(value, form) if math.isfinite(value) else "same"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested settings as (dotted name, text)."""
    flat = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat += _flat(value, f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)))
    return flat


def _cells(schedule: Schedule) -> list[tuple[str, str]]:
    """Return for each step its letter and what it is, in words."""
    return [
        (
            step.kind.value,
            f"step {i + 1}: {step.kind.label}"
            + ("" if step.depth is None else f", depth {step.depth}")
            + f" (segment {step.segment + 1})",
        )
        for i, step in enumerate(schedule.steps())
    ]


def _file_of(found: Found, settings: SearchSettings, name: str, teacher: Mapping[str, Any], features: str | None) -> dict:
    """Return the best candidate's schedule file: its name, and its text as a data URI."""
    schedule = with_search_results(found, settings, name, teacher, features, by="flexi report")
    text = json.dumps(to_dict(schedule), indent=2, ensure_ascii=False).encode()
    run = settings.teacher_settings
    return {
        "name": f"flexi_{file_stem(run.sampler)}_{run.steps}_{found.speedup:.2g}x.json",
        "uri": f"data:application/json;base64,{base64.b64encode(text).decode()}",
    }


def _charts(found: Sequence[Found], on_front: Sequence[Found], best: Found, speedup: float) -> dict[str, Any]:
    return {
        "pareto": pareto_chart(found, on_front, best),
        "candidates": progress_chart(found, speedup, "candidates"),
        "seconds": progress_chart(found, speedup, "seconds"),
    }


def _pictured(fast: Sequence[Found], on_front: Sequence[Found]) -> list[Found]:
    """Return the best candidate, some of the front from its slow to its fast end, and the next best where it is short."""
    best, *next_best = fast
    others = [one for one in on_front if one.number != best.number]
    count = min(len(others), _PICTURED - 1)
    places = {round(i * (len(others) - 1) / max(count - 1, 1)) for i in range(count)}
    chosen = {one.number: one for one in (best, *(others[place] for place in sorted(places)), *next_best)}
    return list(chosen.values())[:_PICTURED]


def _image_rows(backend: Backend, candidates: Sequence[Found], samples: int, progress: Progress) -> list[dict[str, Any]]:
    """Return rows of pictures from the same noise, the teacher's first: whose they are, and data URIs."""
    made = [backend.teacher(SEARCH_SEEDS, samples, lambda done, total: progress("teacher", done, total))]
    for one in candidates:
        name = f"candidate {one.number}"
        made.append(
            backend.sample(
                one.schedule, SEARCH_SEEDS, samples, progress=lambda done, total, name=name: progress(name, done, total)
            ).latents
        )
    decoded = [backend.pictures(latents) for latents in made]
    return [
        {
            "of": one,
            "images": [png_uri(picture) for picture in row],
            "small": max(row.shape[-2:]) <= _SMALL_SIDE,
            "channels": decoded[0].shape[1],
        }
        for one, row in zip((None, *candidates), visible(*decoded), strict=True)
    ]
