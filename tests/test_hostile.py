"""What a stranger's study may not do: choose what is imported, written to, or reached over a network."""

from __future__ import annotations

from dataclasses import replace

import optuna
import pytest
from optuna.trial import TrialState, create_trial
from typer.testing import CliRunner

from flexi_core import FlexiError
from flexi_core.files import file_stem
from search_tools.backends.embedded import EmbeddedBackend
from search_tools.backends.teacher import TeacherSettings
from search_tools.cli import app
from search_tools.settings import SearchSettings
from search_tools.study.reopen import OwnHost, reopen
from search_tools.study.study import open_study


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXI_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def settings() -> SearchSettings:
    return SearchSettings.of(EmbeddedBackend(TeacherSettings(steps=6)), 2.0, 16)


@pytest.fixture
def foreign_comfyui(tmp_path) -> str:
    """Return a folder that looks like a ComfyUI and leaves a mark when its code runs."""
    folder = tmp_path / "foreign"
    for part in ("comfy", "comfy_api/latest"):
        (folder / part).mkdir(parents=True)
    (folder / "comfy" / "samplers.py").write_text("")
    (folder / "comfy" / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    return str(folder)


def a_study(storage: str, settings: SearchSettings) -> optuna.Study:
    """Return a study of one judged candidate."""
    study = open_study(storage, "s", settings)
    measured = {"mse": 0.01, "psnr_db": 20.0, "rfid": 0.5}
    attrs = {"schedule": "3*(FX)", "spent": 3.0, "errors": [0.01], "seconds": 1.0, "macs": 1.0,
             "evaluation": measured, "mse": 0.01}  # fmt: skip
    study.add_trial(create_trial(state=TrialState.COMPLETE, values=[0.5], user_attrs=attrs))
    return study


@pytest.mark.parametrize(
    "command",
    [
        ["report", "--out", "r.html"],
        ["pareto", "--speedup", "2", "--out", "x.json"],
        ["worker", "--evaluations", "1", "--study", "s"],
    ],
    ids=lambda command: command[0],
)
def test_no_study_says_which_comfyui_is_run(command, settings, foreign_comfyui, tmp_path):
    storage = f"journal:{tmp_path / 'j'}"
    backend = {"kind": "comfyui", "comfyui": foreign_comfyui, "base_directory": foreign_comfyui, "graph": {}, "node": "1"}
    a_study(storage, replace(settings, backend=backend))
    result = CliRunner().invoke(app, [*command, "--storage", storage])
    assert not (tmp_path / "ran").exists(), "the study's own folder was imported"
    assert "--comfyui" in " ".join(result.output.split())
    assert "no study may say" in " ".join(result.output.split())


def test_what_opens_a_study_again_is_taken_from_it_by_name(settings, monkeypatch, tmp_path):
    opened = []
    monkeypatch.setattr(
        "search_tools.study.reopen.open_backend", lambda spec, teacher: opened.append(spec) or EmbeddedBackend(teacher)
    )
    stored = {"kind": "comfyui", "comfyui": "/theirs", "base_directory": "/theirs", "store_folder": "/theirs", "graph": {}}
    reopen(replace(settings, backend=stored), OwnHost(tmp_path))
    assert opened == [{"kind": "comfyui", "graph": {}, "comfyui": str(tmp_path), "base_directory": None}]


@pytest.mark.parametrize("file", [r"\\server\share\u.safetensors", "//server/share/u.safetensors", r"\/server\share\u"])
def test_no_study_makes_this_machine_ask_another_for_a_file(file, settings):
    with pytest.raises(FlexiError, match="on another machine"):
        reopen(replace(settings, backend={"kind": "unet", "file": file, "size": [8, 8]}))


def test_no_study_chooses_the_folder_that_a_schedule_is_written_to(settings, tmp_path):
    (tmp_path / "flexi_x").mkdir()
    storage = f"sqlite:///{tmp_path / 's.db'}"
    a_study(storage, replace(settings, backend={"kind": "unknown"}, teacher={**settings.teacher, "sampler": "x/../../y"}))
    (tmp_path / "inside").mkdir()
    with pytest.MonkeyPatch.context() as there:
        there.chdir(tmp_path / "inside")
        result = CliRunner().invoke(app, ["pareto", "--speedup", "2", "--storage", storage])
    assert result.exit_code == 0, result.output
    assert [path.suffix for path in (tmp_path / "inside").iterdir()] == [".json"]
    assert not list(tmp_path.glob("y*"))


def test_a_base_directory_without_comfyui_is_refused():
    result = CliRunner().invoke(app, ["report", "--base-directory", "."])
    assert result.exit_code == 2 and "give its folder with --comfyui" in result.stderr


@pytest.mark.parametrize("name", ["../../etc/passwd", "a\\b", "x" * 10_000, "con\x00sole", "\ud800", "日本語 v1.2"])
def test_names_from_outside_stay_in_their_folder(name, tmp_path):
    stem = file_stem(name)
    (tmp_path / f"{stem}.json").write_text("")
    assert [path.name for path in tmp_path.glob("*.json")] == [f"{stem}.json"]
    assert len(stem) <= 100
