"""Laws of the comparison of cheap fitnesses with true FID; on a tiny model with very short runs."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from typer.testing import CliRunner

from flexi_core import FlexiError, Schedule
from flexi_core.metrics import frechet_distance, kendall_tau, latent_mse, rfid
from search_tools.backends.embedded import EmbeddedBackend
from search_tools.backends.teacher import JUDGE_SEEDS, SEARCH_SEEDS, TeacherSettings
from search_tools.cli import app
from search_tools.correlate.correlate import FID_SEEDS, CorrelateSettings, correlate
from search_tools.measures.references import features_of, scenes
from search_tools.space.space import Space

SMALL = CorrelateSettings(speedups=(2, 3), each=3, counts=(2, 4), fid_samples=6)


class Counting(EmbeddedBackend):
    """Keeps what was sampled, and is interrupted on demand."""

    asked: list[tuple[str, int, int]]
    interrupt_at = -1

    def sample(self, schedule, seed, count, **others):
        self.asked.append((str(schedule), seed, count))
        if len(self.asked) == self.interrupt_at:
            raise KeyboardInterrupt
        return super().sample(schedule, seed, count, **others)


@pytest.fixture(scope="module")
def backend(backend_on, tiny_model):
    backend = backend_on(tiny_model, TeacherSettings(steps=6), Counting)
    backend.asked = []
    return backend


@pytest.fixture(scope="module")
def reference(backend):
    return features_of(backend.features, scenes(60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("measured")


@pytest.fixture(scope="module")
def found(backend, reference, folder):
    return correlate(backend, reference, SMALL, folder)


def test_candidates_keep_their_budgets_and_differ(backend, found):
    assert [c.speedup for c in found.candidates] == [2, 2, 2, 3, 3, 3]
    assert len({c.schedule for c in found.candidates}) == 6
    for candidate in found.candidates:
        space = Space(6, candidate.speedup, backend.cost)
        assert space.spent(Schedule.parse(candidate.schedule)) <= space.budget


def test_each_figure_is_the_metric_of_the_candidates_own_samples(backend, reference, found):
    candidate = found.candidates[3]
    schedule = Schedule.parse(candidate.schedule)
    latents, teacher = backend.sample(schedule, SEARCH_SEEDS, 4).latents, backend.teacher(SEARCH_SEEDS, 4)
    own = backend.features(backend.sample(schedule, FID_SEEDS, 6).latents)
    assert candidate.fid == pytest.approx(frechet_distance(own, reference), rel=1e-3)
    assert candidate.fitness["latent MSE", 2] == pytest.approx(float(latent_mse(latents, teacher)[:2].mean()), rel=1e-3)
    features, others = backend.features(latents), backend.features(teacher)
    assert candidate.fitness["rFID", 4] == pytest.approx(rfid(features, others), rel=1e-2)
    assert candidate.fitness["cost alone", 0] == pytest.approx(-Space(6, 1, backend.cost).spent(schedule))


def test_tau_is_between_a_fitness_and_true_fid(found):
    agreements = {(a.fitness, a.samples): a for a in found.agreements}
    assert agreements.keys() == found.candidates[0].fitness.keys()
    for key, agreement in agreements.items():
        expected = kendall_tau([c.fitness[key] for c in found.candidates], [c.fid for c in found.candidates])
        assert agreement.tau == pytest.approx(expected, nan_ok=True)
        assert not agreement.low > agreement.tau and not agreement.high < agreement.tau


def test_costs_are_those_of_the_networks_that_ran(backend, found):
    agreements = {(a.fitness, a.samples): a for a in found.agreements}
    assert agreements["cost alone", 0].macs == agreements["cost alone", 0].seconds == 0
    assert agreements["rFID", 4].macs == pytest.approx(2 * agreements["rFID", 2].macs)
    # Both are of the same schedules; 4 samples against 6, two rows for each.
    assert agreements["rFID", 4].macs / found.fid_macs == pytest.approx(4 / 6)
    assert agreements["rFID", 4].teacher_macs == pytest.approx(4 * 6 * 2 * backend.cost.full_macs, rel=0.01)
    assert agreements["caption errors", 4].teacher_macs == 0


def test_fitness_and_true_fid_never_see_the_same_sample(backend, found):
    seeds = {seed for _, seed, _ in backend.asked}
    assert {SEARCH_SEEDS, FID_SEEDS} <= seeds
    assert FID_SEEDS - JUDGE_SEEDS > 10_000_000


def test_a_second_run_samples_nothing_and_a_larger_one_only_what_is_new(backend, reference, folder, found):
    backend.asked = []
    again = correlate(backend, reference, SMALL, folder)
    assert again == found and backend.asked == []
    correlate(backend, reference, CorrelateSettings((2, 3), 3, (2, 4), 8), folder)
    assert [(seed, count) for _, seed, count in backend.asked] == [(FID_SEEDS + 6, 2)] * 6
    assert correlate(backend, reference, SMALL, folder).agreements[3].tau == found.agreements[3].tau


def test_an_interrupted_run_goes_on_with_the_candidates_it_had(backend, reference, found, tmp_path):
    backend.asked, backend.interrupt_at = [], 6
    with pytest.raises(KeyboardInterrupt):
        correlate(backend, reference, SMALL, tmp_path)
    done, backend.interrupt_at = backend.asked[:5], -1
    backend.asked = []
    resumed = correlate(backend, reference, SMALL, tmp_path)
    assert not set(done) & set(backend.asked) and len(backend.asked) == 12 - 5
    assert [(c.schedule, c.fid) for c in resumed.candidates] == [(c.schedule, c.fid) for c in found.candidates]


def test_a_folder_of_other_candidates_and_a_broken_file_are_refused(backend, reference, folder, found, tmp_path):
    with pytest.raises(FlexiError, match="was made with another each, seed; give another --folder"):
        correlate(backend, reference, CorrelateSettings((2, 3), 4, (2,), 6, seed=1), folder)
    correlate(backend, reference, CorrelateSettings((2,), 3, (2,), 4), tmp_path)
    broken = next((tmp_path / "candidates").iterdir())
    broken.write_bytes(b"1234")
    with pytest.raises(FlexiError, match=f"{broken.name}: cannot be read .*; delete it"):
        correlate(backend, reference, CorrelateSettings((2,), 3, (2,), 4), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": ()}, "sample counts"),
        ({"counts": (1, 8)}, "at least 2"),
        ({"fid_samples": 2}, "at least 4"),
        ({"speedups": (2,), "each": 2}, "at least 3 candidates"),
    ],
)
def test_settings_that_rank_nothing_are_refused(changes, message):
    with pytest.raises(FlexiError, match=message):
        CorrelateSettings(**changes)


def test_a_budget_with_too_few_schedules_is_refused(backend, reference, tmp_path):
    with pytest.raises(FlexiError, match=r"at 6x there are only [0-9]* different schedules"):
        correlate(backend, torch.zeros(9, 64), CorrelateSettings((6,), 50, (2,), 4), tmp_path)


def test_the_command_writes_table_candidates_and_plot(tiny_embedded, tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXI_CACHE", str(tmp_path / "cache"))
    args = ["correlate", "--steps", 4, "--speedups", "2", "--each", 3, "--counts", "2,4", "--fid-samples", 4, "--scenes", 20]
    args = [*map(str, args), "--folder", str(tmp_path / "out")]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    table = result.stdout[: result.stdout.index("3 random schedules")]
    assert "rFID" in table and max(map(len, table.splitlines())) <= 80
    with (tmp_path / "out" / "correlate.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and {"speedup", "schedule", "fid", "cost_alone", "rfid_2", "rfid_4"} <= rows[0].keys()
    assert (tmp_path / "out" / "correlate.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "out" / "correlate.md").read_text()
    assert page.startswith("# Whether cheap fitnesses rank") and page.count("| rFID |") == 2
    printed = json.loads(CliRunner().invoke(app, [*args, "--json"]).stdout)
    assert len(printed["candidates"]) == 3 and printed["fid_macs"] > 0 and len(printed["agreements"]) == 9
    refused = CliRunner().invoke(app, ["correlate", "--counts", "2;4", "--folder", str(tmp_path / "out")])
    assert refused.exit_code == 2 and "'2;4' is no list of numbers" in refused.stderr
