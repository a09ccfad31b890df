"""The command line as a user meets it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexi_core import Schedule, load_schedule, save_schedule
from search_tools.cli import COMMANDS, app, command

SMALL = ["--steps", "5", "--speedup", "2.5", "--samples", "16"]


@pytest.fixture
def flexi(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEXI_CACHE", str(tmp_path / "cache"))
    runner = CliRunner()
    return lambda *args: runner.invoke(app, [str(a) for a in args])


@pytest.mark.parametrize(("given", "found"), [(None, "passive"), ("active", "active")])
def test_threads_sleep_while_they_wait_before_torch_is_loaded_unless_the_user_wants_otherwise(given, found):
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    module, function = re.search('^flexi = "(.+):(.+)"$', text, re.MULTILINE).groups()
    watch = """
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("seen", os.environ.get("OMP_WAIT_POLICY"))
            sys.exit()
sys.meta_path.insert(0, Watch())
"""
    code = f"import os, sys\n{watch}\nfrom {module} import {function}\n{function}()"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    ran = subprocess.run(
        [sys.executable, "-c", code, "show", "--help"], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.stdout == f"seen {found}\n", ran.stderr


def test_search_evaluate_and_show_work_on_one_file(flexi, tiny_embedded, tmp_path):
    found = flexi("search", *SMALL, "--evaluations", 2, "--out", "s.json", "--json")
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    schedule = load_schedule(tmp_path / "s.json")
    assert str(schedule) == result["schedule"] and result["candidates"] == 2
    assert schedule.info["teacher"]["steps"] == 5 and len(schedule.info["teacher"]["sigmas"]) == 6
    assert {"speedup_macs", "speedup_time", "rfid", "psnr_db", "samples", "features"} <= schedule.info["measured"].keys()
    assert schedule.info["measured"]["speedup_macs"] >= 2.5
    assert {"version", "seed", "study"} <= schedule.info["provenance"].keys()

    again = flexi("search", *SMALL, "--evaluations", 2, "--out", "s.json", "--json")
    assert json.loads(again.stdout)["candidates"] == 2, "a finished study is not searched again"

    table = flexi("evaluate", "s.json", "--samples", 2, "--json")
    assert table.exit_code == 0, table.output
    rows = {row["name"]: row for row in json.loads(table.stdout)["rows"]}
    assert rows["teacher"]["speedup_macs"] == 1 and rows["s"]["schedule"] == str(schedule)
    assert "2 of 5, removed" in rows

    shown = flexi("show", "s.json")
    assert shown.exit_code == 0 and str(schedule) in shown.stdout and "euler" in shown.stdout
    assert json.loads(flexi("show", "s.json", "--json").stdout)["format"] == "flexiffusion-schedule"


def test_demo_writes_a_schedule_pictures_and_a_table(flexi, tmp_path):
    result = flexi("demo", "--steps", 10, "--minutes", 0.02, "--samples", 2, "--folder", "out", "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    schedule = load_schedule(printed["file"])
    assert len(schedule) == 10 and schedule.info["measured"]["speedup_macs"] >= 4.5
    assert (tmp_path / "out" / "images.png").stat().st_size > 1000
    assert (tmp_path / "out" / "pareto.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["show", "missing.json"], "missing.json: cannot be read"),
        (["search", "--out", "nowhere/s.json"], "the folder nowhere does not exist"),
        (["search", *SMALL, "--storage", "sqlite:///no/such.db"], "cannot be used"),
        (["search", "--steps", "4", "--speedup", "9"], "possible are 1 to 4"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flexi, args, message):
    result = flexi(*args)
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ") and "Traceback" not in result.output


def test_show_prints_whatever_a_file_says(flexi, tmp_path):
    odd = Schedule.parse("FX").with_info(
        provenance={"note": "[/x] [red]", "sigmas": 3, "list": [1] * 9}, teacher={"sigmas": None}
    )
    save_schedule(odd, tmp_path / "s.json")
    result = flexi("show", "s.json")
    assert result.exit_code == 0 and "[/x] [red]" in result.stdout


def test_evaluate_takes_a_depth_that_the_network_does_not_have(flexi, tiny_embedded, tmp_path):
    teacher = {"model": "embedded", "sampler": "euler", "scheduler": "normal", "steps": 4, "cfg": 3.0}
    save_schedule(Schedule.parse("FPPP@6").with_info(teacher=teacher), tmp_path / "s.json")
    result = flexi("evaluate", "s.json", "--samples", 2, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rows"][1]["speedup_macs"] == 1


def test_a_schedule_for_another_model_is_not_judged_on_the_embedded_one(flexi, tmp_path):
    save_schedule(Schedule.parse("4*(FX)"), tmp_path / "s.json")
    result = flexi("evaluate", "s.json")
    assert result.exit_code == 2 and "made for an unnamed model" in result.stderr


def test_evaluate_puts_several_files_of_one_run_into_one_table(flexi, tiny_embedded, tmp_path):
    teacher = {"model": "embedded", "sampler": "euler", "scheduler": "normal", "steps": 4, "cfg": 3.0}
    save_schedule(Schedule.parse("FXFX").with_info(teacher=teacher), tmp_path / "a.json")
    save_schedule(Schedule.parse("FNFN").with_info(teacher=teacher), tmp_path / "b.json")
    save_schedule(Schedule.parse("FXFX").with_info(teacher={**teacher, "cfg": 2.0}), tmp_path / "other.json")
    result = flexi("evaluate", "a.json", "b.json", "--samples", 2, "--json")
    assert result.exit_code == 0, result.output
    assert [row["name"] for row in json.loads(result.stdout)["rows"]][:3] == ["teacher", "a", "b"]
    refused = flexi("evaluate", "a.json", "other.json")
    assert refused.exit_code == 2 and "other.json was made for another run than a.json" in refused.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_has_each_ones_own_first_line(name):
    assert COMMANDS[name][1] == " ".join(command(name).help.split("\n\n")[0].split())
