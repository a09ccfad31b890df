"""The schedule file: plain JSON, version 1, checked as a whole before anything of it is used."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ScheduleError
from ..files import read_bounded, replace_file
from ..json_text import parse_json
from ..words import shortened, visible
from .levels import between_ends
from .schedule import Schedule, falls

FORMAT = "flexiffusion-schedule"
VERSION = 1
MAX_BYTES = 4 * 1024 * 1024
MAX_NESTING = 32
_MAX_NUMBER = 1e30
_LONGEST_NAME = 200  # characters of a sampler's, a fingerprint's
_LONGEST_QUOTE = 100
_LONGEST_LINE = 500  # characters that the page writes into a node
_MOST_SIDES = 4


def load_schedule(path: str | os.PathLike[str]) -> Schedule:
    """Read a schedule file.

    What the file says beside the schedule, unknown keys included, is kept in `Schedule.info`.

    Raises:
        ScheduleError: the file is missing, too large, not JSON, of another format or a newer version, or a value of it has
            the wrong type; the message names the file.
    """
    path = Path(path)
    try:
        content = read_bounded(path, MAX_BYTES)
    except OSError as error:
        raise ScheduleError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # a NUL in the path
        raise ScheduleError(f"{str(path)!r}: not a file name ({error})") from error
    try:
        return schedule_from(content)
    except ScheduleError as error:
        raise ScheduleError(f"{path}: {error}") from error


def schedule_from(content: bytes) -> Schedule:
    """Return the schedule of a file's content; see `load_schedule`."""
    try:
        data = parse_json(content, MAX_NESTING, parse_constant=_refuse_number, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise ScheduleError("not a text file; a schedule file is JSON") from error
    except ValueError as error:
        raise ScheduleError(f"not valid JSON ({error}); it may be cut off, copy it again") from error
    return _from_dict(data)


def save_schedule(schedule: Schedule, path: str | os.PathLike[str]) -> None:
    """Write a schedule file, whole or not at all.

    Raises:
        ScheduleError: the folder is missing or cannot be written to, or the schedule's info holds what JSON cannot.
    """
    try:
        text = json.dumps(to_dict(schedule), indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ScheduleError(f"{path}: the schedule's info cannot be written as JSON ({error})") from error
    try:
        with replace_file(path) as temporary:
            temporary.write_bytes(text)
    except OSError as error:
        raise ScheduleError(f"{path}: cannot be written ({error.strerror or error})") from error


def to_dict(schedule: Schedule) -> dict[str, Any]:
    """Return the file's object."""
    text = str(replace(schedule, sigmas=None))
    head = {"format": FORMAT, "version": VERSION, "schedule": text, "steps": len(schedule)}
    head |= {} if schedule.sigmas is None else {"sigmas": list(schedule.sigmas)}
    return head | {key: value for key, value in schedule.info.items() if key not in (*head, "sigmas")}


def from_dict(data: Any) -> Schedule:
    """Return the schedule of a file's object, every value checked; see `load_schedule`."""
    if _nesting(data) > MAX_NESTING:
        raise ScheduleError(f"its values are nested more than {MAX_NESTING} deep")
    return _from_dict(data)


def _from_dict(data: Any) -> Schedule:
    if not isinstance(data, dict):
        raise ScheduleError(f"a schedule file holds a JSON object, this one a {type(data).__name__}")
    if data.get("format") != FORMAT:
        raise ScheduleError(f"not a schedule file: its format is {_quoted(data.get('format'))}, expected {FORMAT!r}")
    version = data.get("version")
    if not _is_int(version) or version < 1:
        raise ScheduleError(f"the version is {_quoted(version)}; expected a whole number from 1")
    if version > VERSION:
        raise ScheduleError(f"the file has version {version}, this release reads up to {VERSION}; update the node pack")
    if not isinstance(data.get("schedule"), str):
        raise ScheduleError(f"the schedule is {_quoted(data.get('schedule'))}; expected its text")
    info = {key: value for key, value in data.items() if key not in ("format", "version", "schedule", "steps", "sigmas")}
    schedule = Schedule.parse(data["schedule"])
    if "steps" in data and not (_is_int(data["steps"]) and data["steps"] == len(schedule)):
        raise ScheduleError(f"the file says {_quoted(data['steps'])} steps, its schedule text has {len(schedule)}")
    if data.get("sigmas") is not None:
        schedule = _with_sigmas(schedule, data["sigmas"])
    for key in ("teacher", "measured", "provenance"):
        if not isinstance(info.get(key, {}), dict):
            raise ScheduleError(f"{key} is a {type(info[key]).__name__}; expected an object")
    _check_teacher(info.get("teacher", {}), len(schedule))
    schedule = schedule.with_info(**info)
    grid = schedule.teacher_sigmas
    if schedule.sigmas is not None and grid is not None and between_ends(schedule.sigmas, grid) is None:
        raise ScheduleError("sigmas do not begin and end where teacher.sigmas do, and would never be used; correct one of them")
    return schedule


def made_for(schedule: Schedule) -> str:
    """Return in a line what run a schedule was made for, and what was measured of it; empty where nothing says so."""
    teacher, measured = schedule.info.get("teacher", {}), schedule.info.get("measured", {})
    parts = []
    if teacher:
        steps = teacher.get("steps", len(schedule))
        parts = [" ".join(filter(None, [str(steps), teacher.get("sampler", ""), "steps"])), teacher.get("scheduler", "")]
        scales = [f"{part['cfg']:g}" for part in (teacher, *teacher.get("stages", ())) if "cfg" in part]
        parts += [f"cfg {' then '.join(scales)}"] if scales else []
        parts += [size_text(teacher["size"])] if teacher.get("size") else []
    results = [
        template.format(float(measured[key]))
        for key, template in (("speedup_macs", "{:.1f}x fewer MACs"), ("psnr_db", "{:.1f} dB"))
        if _is_number(measured.get(key))
    ]
    run = f"made for {', '.join(filter(None, parts))}" if parts else ""
    words = "; ".join(filter(None, [run, ", ".join(results), _chosen_on(schedule.info.get("preset"))]))
    return shortened(visible(words, ""), _LONGEST_LINE)


def teacher_from(schedule: Schedule, step: int) -> dict[str, Any]:
    """Return what a file says of the teacher's run at a step, from 0: a run of several models says it of each stretch."""
    teacher = schedule.info.get("teacher", {})
    for stage in teacher.get("stages", ()):
        if step < stage["steps"]:
            return {**teacher, **stage}
        step -= stage["steps"]
    return teacher


def _chosen_on(preset: Any) -> str:
    """Return in words how a ready-made schedule was measured; empty where an info does not say."""
    measured = preset.get("measured") if isinstance(preset, dict) else None
    found = measured if isinstance(measured, dict) else {}
    near, plain = found.get("psnr_db"), found.get("plain_db")
    if not (_is_number(near) and _is_number(plain)):
        return ""
    return f"Flexi Preset's, {near:.0f} dB on test models of {preset.get('steps')} steps; as few plain steps {plain:.0f} dB"


def size_text(size: Sequence[int]) -> str:
    """Return a latent's size [..., H, W] as people write it, the width first."""
    return "x".join(str(side) for side in reversed(size))


def _with_sigmas(schedule: Schedule, sigmas: Any) -> Schedule:
    if not isinstance(sigmas, list) or not all(map(_is_number, sigmas)):
        raise ScheduleError("sigmas is not a list of numbers")
    found = tuple(map(float, sigmas))
    if schedule.sigmas not in (None, found):
        raise ScheduleError("sigmas are not the noise levels that the schedule's own text has; leave out one of the two")
    return replace(schedule, sigmas=found)


def _check_settings(settings: dict[str, Any], name: str) -> None:
    for key in ("architecture", "weights", "sampler", "scheduler"):
        if key in settings and not isinstance(settings[key], str):
            raise ScheduleError(f"{name}.{key} is {_quoted(settings[key])}; expected text")
        if len(settings.get(key, "")) > _LONGEST_NAME:
            raise ScheduleError(f"{name}.{key} has {len(settings[key])} characters; a name has at most {_LONGEST_NAME}")
    if "cfg" in settings and not _is_number(settings["cfg"]):
        raise ScheduleError(f"{name}.cfg is {_quoted(settings['cfg'])}; expected a number")


def _check_stages(stages: Any, steps: int) -> None:
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise ScheduleError("teacher.stages is not a list of objects")
    lengths = [stage.get("steps") for stage in stages]
    if not all(_is_int(length) and length > 0 for length in lengths) or sum(lengths) != steps:
        raise ScheduleError(f"teacher.stages have steps {_quoted(lengths)}; expected whole numbers from 1, {steps} together")
    for number, stage in enumerate(stages):
        _check_settings(stage, f"teacher.stages[{number}]")


def _check_teacher(teacher: dict[str, Any], steps: int) -> None:
    _check_settings(teacher, "teacher")
    if "stages" in teacher:
        _check_stages(teacher["stages"], steps)
    if "steps" in teacher and not _is_int(teacher["steps"]):
        raise ScheduleError(f"teacher.steps is {_quoted(teacher['steps'])}; expected a whole number")
    size = teacher.get("size")
    if size is not None and not (isinstance(size, list) and len(size) <= _MOST_SIDES and all(_is_side(v) for v in size)):
        raise ScheduleError(f"teacher.size is {_quoted(size)}; expected a list of whole numbers from 1, at most {_MOST_SIDES}")
    sigmas = teacher.get("sigmas")
    if sigmas is None:
        return
    if not isinstance(sigmas, list) or not all(_is_number(s) and s >= 0 for s in sigmas):
        raise ScheduleError("teacher.sigmas is not a list of numbers from 0 up")
    if len(sigmas) != steps + 1:
        raise ScheduleError(f"teacher.sigmas has {len(sigmas)} values; a schedule of {steps} steps has {steps + 1}")
    if not falls(sigmas):
        raise ScheduleError("teacher.sigmas does not fall from step to step")


def _refuse_number(text: str) -> float:
    raise ValueError(f"{text[:20]} is not a number that a schedule file can hold")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_number(text)


def _quoted(value: Any) -> str:
    """Return a value from a file as a message shows it."""
    return shortened(visible(repr(value)), _LONGEST_QUOTE)


def _is_side(value: Any) -> bool:
    return _is_int(value) and 0 < value < _MAX_NUMBER


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MAX_NUMBER


def _nesting(value: Any) -> int:
    """Return the depth of a value's lists and objects, counted to one more than `MAX_NESTING`."""
    depth, level = 0, [value]
    while depth <= MAX_NESTING:
        level = [v for v in level if isinstance(v, dict | list)]
        if not level:
            break
        depth += 1
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
    return depth
