"""Laws of the search: its space, its evolution, its studies; on a tiny U-Net with very short runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from flexi_core import FlexiError, Schedule
from flexi_core.demo.model import DemoModel
from flexi_core.networks.fingerprint import architecture_fingerprint, weights_fingerprint
from flexi_core.run.cost import NetworkCost, StagedCost, schedule_cost
from flexi_core.runtime.file_model import FileModel
from flexi_core.runtime.sampling import sigmas_karras
from flexi_core.schedule.presets import all_full, deepcache
from flexi_core.stages.bounds import Stages
from flexi_core.stages.embedded import EmbeddedParts, StagedModel
from flexi_core.stages.network import make_decoder, save_stages
from flexi_core.tune.levels import at_levels, full_levels, karras_levels, with_level
from search_tools.backends.embedded import EmbeddedBackend
from search_tools.backends.small_model import SmallModelBackend
from search_tools.backends.teacher import JUDGE_SEEDS, SEARCH_SEEDS, TeacherSettings, TeacherStore
from search_tools.backends.unet_file import UNetFileBackend
from search_tools.fitness import Fitness, stages_to
from search_tools.measures.judge import Judge, baselines
from search_tools.settings import SearchSettings
from search_tools.space.space import FAMILIES, Space
from search_tools.strategies.evolution import PAIRED_MARGIN, EvolutionSampler, near_best
from search_tools.strategies.strategies import ask_schedule
from search_tools.study.study import best_of, open_study, run_search

# Partial steps of depth 1, 2, 3 cost 8, 22 and 38 % of a full one.
COST = NetworkCost(1000.0, {("input", 0): 80.0, ("input", 1): 140.0, ("input", 2): 160.0, ("input", 3): 620.0,
                            **{("output", i): 0.0 for i in range(4)}})  # fmt: skip


@pytest.fixture(scope="module")
def backend(unet_file, tmp_path_factory):
    return UNetFileBackend(TeacherSettings(steps=6, cfg=1.0), FileModel.load(unet_file), tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def fitness(backend):
    return Fitness(backend, (1, 3))


@pytest.fixture(scope="module")
def space(backend):
    return Space(6, 2.0, backend.cost)


@pytest.fixture(scope="module")
def settings(backend):
    return SearchSettings.of(backend, 2.0, samples=8, seed=5)


@pytest.fixture(scope="module")
def whole(space, fitness, settings):
    """An uninterrupted search of 15 candidates."""
    study = open_study("sqlite://", "whole", settings)
    return run_search(study, space, fitness, evaluations=15)


def _grid(steps: int) -> tuple[float, ...]:
    """Return noise levels of a run, as a scheduler's."""
    return (*(float(level) for level in np.geomspace(14.6, 0.03, steps) ** 1.1), 0.0)


def _walk(space: Space, count: int):
    rng = np.random.default_rng(3)
    schedule = space.random(rng)
    for _ in range(count):
        yield schedule
        schedule = space.mutate(schedule, rng) if rng.random() < 0.8 else space.random(rng)


@pytest.mark.parametrize("families", [FAMILIES, *((family,) for family in FAMILIES)])
@pytest.mark.parametrize(("steps", "speedup"), [(50, 5.0), (25, 3.0), (20, 1.0), (7, 7.0), (30, 2.7)])
def test_every_schedule_of_the_space_has_the_runs_length_and_keeps_the_budget(steps, speedup, families):
    space = Space(steps, speedup, COST, families, sigmas=_grid(steps))
    for schedule in [*space.seeds(), *_walk(space, 150)]:
        assert len(schedule) == steps
        assert space.spent(schedule) <= space.budget


@pytest.mark.parametrize("families", [FAMILIES, *((family,) for family in FAMILIES)])
def test_genes_and_schedules_are_the_same_thing(families):
    space = Space(50, 5.0, COST, families, sigmas=_grid(50))
    for schedule in [*space.seeds(), *_walk(space, 150)]:
        genes = space.encode(schedule)
        assert space.decode(genes) == schedule
        distributions = space.distributions()
        assert all(distributions[name]._contains(distributions[name].to_internal_repr(v)) for name, v in genes.items())


@pytest.mark.parametrize("strategy", ["search", "front", "guidance"])
@pytest.mark.parametrize(("cuts", "speedup"), [((10,), 2.0), ((10,), 10.0), ((3, 11), 2.5), ((1, 2, 19), 4.0)])
def test_every_window_of_a_cut_run_begins_with_a_full_step_within_the_budget(cuts, speedup, strategy):
    space = Space(
        20, speedup, COST, sigmas=_grid(20), cuts=cuts, front=strategy == "front", reuse_guidance=strategy == "guidance"
    )
    assert space.families == ("free",) and not space.moves
    for schedule in [*space.seeds(), *_walk(space, 150)]:
        assert len(schedule) == 20 and all(schedule.letters[cut] == "F" for cut in cuts)
        assert space.spent(schedule) <= space.budget
        assert str(space.decode(space.encode(schedule))) == str(schedule)


def test_a_cut_run_keeps_a_full_step_for_each_window_and_has_no_other_space():
    with pytest.raises(FlexiError, match="each of the run's 3 windows begins with a full one; possible are 1 to 6"):
        Space(20, 10.0, COST, cuts=(5, 10))
    with pytest.raises(FlexiError, match="nothing is left of the space paper: each of the run's 2 windows"):
        Space(20, 2.0, COST, ("paper",), cuts=(10,))


def test_full_steps_are_spent_where_networks_are_cheap():
    cheap = NetworkCost(100.0)
    cost = StagedCost.over([0] * 10 + [1] * 10, {0: NetworkCost(1900.0), 1: cheap})
    assert cost.full_macs == 1000.0 and cost.at(9).full_macs == 1900.0 and cost.of(1) == cheap
    space = Space(20, 4.0, cost, cuts=(10,))
    assert space.full_steps == 12, "two dear ones and all ten cheap ones: 4800 of the 5000 that there are"
    found = [*space.seeds(), *_walk(space, 150)]
    for schedule in found:
        letters = schedule.letters
        macs = 1900 * letters[:10].count("F") + 100 * letters[10:].count("F")
        assert schedule_cost(schedule, cost) == macs <= 5000 and letters[0] == letters[10] == "F"
    most = max(schedule.letters.count("F") for schedule in found)
    assert most > 5, "as many as an average step would leave room for"
    assert [Space(20, speedup, COST).full_steps for speedup in (1.0, 3.0, 20.0)] == [20, 6, 1]


def test_a_back_end_of_several_networks_counts_each_steps_own(tmp_path):
    config = {
        "in_channels": 3, "out_channels": 3, "model_channels": 32, "channel_mult": [1], "num_res_blocks": [1],
        "transformer_depth": [0], "transformer_depth_output": [0, 0], "transformer_depth_middle": -1,
    }  # fmt: skip
    base = FileModel.untrained(config, (8, 8), tmp_path / "base.safetensors")
    stages = Stages((2.0,), ("high", "low"))
    decoders = [make_decoder(EmbeddedParts, base.unet_config, width, own_middle=False) for width in (64, 32)]
    prints = {"architecture": architecture_fingerprint(base.unet), "weights": weights_fingerprint(base.unet)}
    save_stages(tmp_path / "stages.safetensors", stages, decoders, base.unet_config, prints)

    class Staged(SmallModelBackend):
        kind = "staged"

        def prompts(self, seed, count):
            return None

    model = StagedModel(base, tmp_path / "stages.safetensors")
    backend = Staged(TeacherSettings("euler", "normal", 8, 1.0), model, None, tmp_path)
    (start,) = backend.starts
    high, low = (backend.cost.of(stage).full_macs for stage in range(2))
    assert high > 1.5 * low and backend.cost.at(start - 1).full_macs == high and backend.cost.at(start).full_macs == low
    schedule = Schedule.parse("F" + "X" * (start - 1) + "F" * (8 - start))
    assert backend.sample(schedule, 0, 2).macs == 2 * schedule_cost(schedule, backend.cost) == 2 * (high + (8 - start) * low)
    full = backend.sample(all_full(4), 0, 1, steps=4).macs
    above = sum(stages.at(float(sigma)) == 0 for sigma in backend.grid(4)[:-1])
    assert full == above * high + (4 - above) * low, "of another number of steps, where these lie"


def test_the_papers_space_has_equal_segments_partial_steps_and_removed_nulls_only():
    space = Space(50, 5.0, COST, ("paper",))
    letters = set()
    for schedule in _walk(space, 200):
        lengths = [len(segment) for segment in schedule.segments]
        assert max(lengths) - min(lengths) <= 1
        letters |= set(schedule.letters)
    assert letters == set("FPN")


def test_mutation_of_the_papers_schedules_stays_in_the_papers_space():
    rng, space = np.random.default_rng(0), Space(50, 5.0, COST)
    for start in (s for s in space.seeds() if space.family(s) == "paper"):
        for _ in range(20):
            start = space.mutate(start, rng)
            assert space.family(start) == "paper" and "X" not in start.letters


def test_the_free_space_holds_the_others():
    free = Space(50, 5.0, COST, ("free",))
    for family in ("paper", "paper-x"):
        for schedule in _walk(Space(50, 5.0, COST, (family,)), 100):
            assert free.decode(free.encode(schedule)) == schedule


def test_mutation_of_free_segments_reaches_every_kind_of_step_unequal_lengths_and_depths():
    schedules = [*_walk(Space(50, 5.0, COST, ("free",)), 300)]
    assert {letter for schedule in schedules for letter in schedule.letters} == set("FPNX")
    assert any(set(schedule.letters) == set("FPNX") for schedule in schedules)
    assert any(len({s.depth for s in schedule.segments if s.depth}) > 1 for schedule in schedules)
    assert any(len({len(s) for s in schedule.segments}) > 3 for schedule in schedules)


def test_full_steps_at_levels_of_their_own_are_spread_evenly_between_the_runs_ends():
    grid = _grid(25)
    space = Space(25, 3.0, COST, ("levels",), sigmas=grid)
    for schedule in [*space.seeds(), *_walk(space, 100)]:
        lengths = [len(segment) for segment in schedule.segments]
        assert len(lengths) == 8 and max(lengths) - min(lengths) == 1 and set(schedule.letters) == {"F", "X"}
        assert schedule.sigmas[0] == pytest.approx(grid[0]) and schedule.sigmas[-1] == 0
        assert min(full_levels(schedule)) > 0.9 * grid[-2]
    assert Space(25, 3.0, COST).families == FAMILIES[:-1], "without the run's noise levels there are none to choose"


def test_karras_levels_are_the_hosts_grid():
    own = sigmas_karras(DemoModel.load(), 8)
    assert karras_levels([float(own[0]), float(own[-2]), 0.0], 8, 7.0) == pytest.approx(own[:-1].tolist(), rel=1e-5)


def test_a_level_moves_with_the_steps_on_both_sides_and_nothing_else():
    schedule = at_levels([10.0, 5.0, 2.0, 1.0], [10.0, *np.linspace(9, 0.1, 11), 0.0])
    at = [i for i, step in enumerate(schedule.steps()) if step.kind.is_full]
    before, after = schedule.sigmas, with_level(schedule, at[2], 3.0).sigmas
    assert [after[i] for i in at] == [10.0, 5.0, 3.0, 1.0]
    assert before[: at[1] + 1] == after[: at[1] + 1] and before[at[3] :] == after[at[3] :]
    for i in (at[1] + 1, at[2] + 1):  # at the same share of the way, in log sigma
        high, low = (at[1], at[2]) if i < at[2] else (at[2], at[3])
        share, moved = (np.log(grid[i] / grid[high]) / np.log(grid[low] / grid[high]) for grid in (before, after))
        assert share == pytest.approx(moved, rel=1e-5)
    last = with_level(schedule, at[3], 0.5).sigmas
    assert last[at[3] + 1 :] == pytest.approx([level / 2 for level in before[at[3] + 1 :]])


def test_what_the_budget_leaves_is_spent_on_full_steps_but_for_a_front():
    for schedule in _walk(Space(50, 5.0, COST, ("free",)), 100):
        assert Space(50, 5.0, COST).spent(schedule) + 1 > 10 or not {"N", "X"} & set(schedule.letters)
    spent = [Space(50, 5.0, COST).spent(s) for s in _walk(Space(50, 5.0, COST, ("free",), front=True), 300)]
    assert min(spent) < 3 and max(spent) > 9


@pytest.mark.parametrize("family", ["free", "levels"])
def test_genes_drawn_one_by_one_become_a_schedule_within_the_budget(family):
    space, rng = Space(25, 3.0, COST, (family,), sigmas=_grid(25)), np.random.default_rng(1)

    def drawn(gene):
        if isinstance(gene, CategoricalDistribution):
            return rng.choice(gene.choices)
        draw = rng.uniform if isinstance(gene, FloatDistribution) else lambda low, high: int(rng.integers(low, high + 1))
        return draw(gene.low, gene.high)

    for _ in range(100):
        genes = {name: drawn(gene) for name, gene in space.distributions().items()}
        schedule = space.filled(space.decode(genes))
        assert len(schedule) == 25 and space.spent(schedule) <= space.budget
        assert space.spent(schedule) + 1 > space.budget or not {"N", "X"} & set(schedule.letters)


def test_a_budget_that_no_schedule_can_keep_is_refused():
    with pytest.raises(FlexiError, match="possible are 1 to 20"):
        Space(20, 21.0, COST)


def test_a_space_with_reused_guidance_keeps_its_laws():
    space = Space(20, 4.0, COST, reuse_guidance=True)
    letters = ""
    for schedule in [*space.seeds(), *_walk(space, 150)]:
        assert len(schedule) == 20 and space.spent(schedule) <= space.budget
        genes, known = space.encode(schedule), space.distributions()
        assert space.decode(genes) == schedule
        assert all(known[name]._contains(known[name].to_internal_repr(value)) for name, value in genes.items())
        letters += schedule.letters
    assert letters.count("f") > 50 and "p" in letters
    assert "f" not in "".join(s.letters for s in _walk(Space(20, 4.0, COST), 50))


def test_guesses_come_before_all_other_seeds():
    guess = Schedule.parse("FXXXX|FXXXX|FXXXXX|FXX|F")
    assert Space(20, 4.0, COST, guesses=(guess,)).seeds()[0] == guess


@pytest.mark.parametrize("front", [False, True])
def test_the_seeds_hold_deepcache_at_every_interval_and_depth_that_fit(front):
    space = Space(20, 2.5, COST, front=front)
    every = [deepcache(20, interval, depth) for interval in range(2, 21) for depth in space.depths]
    fitting = {str(schedule) for schedule in every if space.spent(schedule) <= space.budget}
    assert len(fitting) > 15 and fitting <= {str(seed) for seed in space.seeds()}


def test_the_papers_space_alone_holds_the_deepcaches_of_equal_segments():
    seeds = Space(20, 2.5, COST, ("paper",)).seeds()
    assert deepcache(20, 5, 1) in seeds and deepcache(20, 10, 2) in seeds
    assert all(len({len(segment) for segment in seed.segments}) <= 2 for seed in seeds)


def test_a_network_that_cannot_be_partial_is_searched_with_full_and_null_steps():
    space = Space(20, 4.0, NetworkCost(1000.0))
    letters = {letter for schedule in [*space.seeds(), *_walk(space, 150)] for letter in schedule.letters}
    assert letters == set("FNX")
    assert all(space.decode(space.encode(s)) == s for s in _walk(space, 50))


def test_settings_that_differ_make_studies_of_other_names(settings):
    others = [replace(settings, **change) for change in ({"seed": 6}, {"finalists": 0}, {"identity": {"weights": "other"}})]
    assert len({each.default_name for each in [settings, *others]}) == 4


def test_an_unknown_part_of_the_space_is_refused():
    with pytest.raises(FlexiError, match="known: paper, paper-x, free"):
        Space(20, 2.0, COST, ("papier",))


def _simulate(space: Space, trials: int, seed: int) -> list[optuna.trial.FrozenTrial]:
    """Evolve against a known optimum: full steps as near as possible to the end."""
    study = optuna.create_study(sampler=EvolutionSampler(space, seed))
    for _ in range(trials):
        trial, schedule = ask_schedule(study, space)
        value = sum(20 - i for i, letter in enumerate(schedule.letters) if letter == "F")
        study.tell(trial, float(value))
    return study.trials


def test_evolution_improves_on_its_seeds_and_repeats_nothing():
    trials = _simulate(Space(20, 4.0, COST, ("free",)), 120, seed=0)
    texts = [t.user_attrs["schedule"] for t in trials]
    assert len(set(texts)) == len(texts)
    assert min(t.value for t in trials) < min(t.value for t in trials[:12])


@pytest.mark.parametrize("families", [("paper",), ("paper-x",), FAMILIES])
def test_evolution_repeats_nothing_under_a_tight_budget_while_the_space_holds_more(families):
    texts = [t.user_attrs["schedule"] for t in _simulate(Space(25, 3.0, COST, families), 150, seed=0)]
    assert len(set(texts)) == len(texts)


def test_evolution_of_one_seed_is_repeatable_and_of_another_is_not():
    space = Space(20, 4.0, COST)
    first, second, other = (_simulate(space, 60, seed) for seed in (0, 0, 1))
    assert [t.params for t in first] == [t.params for t in second]
    assert [t.params for t in first] != [t.params for t in other]


def test_parents_are_the_best_of_all_generations():
    trials = _simulate(Space(20, 4.0, COST, ("free",)), 60, seed=0)
    study = optuna.create_study(sampler=EvolutionSampler(Space(20, 4.0, COST, ("free",)), 0, population=6, parents=3))
    study.add_trials(trials)
    parents = study.sampler.get_parent_population(study, 10)
    assert sorted(t.value for t in parents) == sorted(t.value for t in trials)[:3]


def test_a_low_rfid_does_not_make_up_for_a_paired_error_beyond_the_margin():
    trials = [
        optuna.trial.create_trial(value=rfid, user_attrs={"mse": mse}, params={}, distributions={})
        for rfid, mse in ((0.05, 2.0), (0.06, 1.2), (0.07, 1.0))
    ]
    assert [t.value for t in near_best(trials)] == [0.06, 0.07]


def _texts(result):
    return [str(c.schedule) for c in result.candidates]


def test_a_resumed_search_equals_an_uninterrupted_one(space, fitness, settings, whole, tmp_path):
    parts = open_study(f"sqlite:///{tmp_path}/b.db", "parts", settings)
    run_search(parts, space, fitness, evaluations=6)
    resumed = run_search(open_study(f"sqlite:///{tmp_path}/b.db", "parts", settings), space, fitness, evaluations=15)
    assert _texts(resumed) == _texts(whole)
    assert resumed.best == whole.best


class _Interrupted(Fitness):
    """Presses Ctrl-C in the middle of one candidate."""

    def __init__(self, fitness: Fitness, at: int) -> None:
        self.__dict__.update(fitness.__dict__)
        self.left = at

    def sample(self, schedule: Schedule, count: int, images=None):
        self.left -= images is None
        if self.left == 0:
            raise KeyboardInterrupt
        return super().sample(schedule, count, images)


@pytest.mark.parametrize("at", [5, 13])  # within a generation, and on the first candidate of one
def test_an_interrupted_search_keeps_what_it_found_and_draws_the_lost_candidate_again(
    space, fitness, settings, whole, tmp_path, at
):
    study = open_study(f"sqlite:///{tmp_path}/a.db", "s", settings)
    stopped = run_search(study, space, _Interrupted(fitness, at), evaluations=15)
    assert stopped.interrupted and len(stopped.candidates) == at - 1 and stopped.best is not None
    assert all(trial.state.is_finished() for trial in study.trials)
    resumed = run_search(study, space, fitness, evaluations=15)
    assert _texts(resumed) == _texts(whole) and resumed.best == whole.best


def test_the_best_parent_comes_first_whenever_it_is_asked_for():
    space = Space(20, 4.0, COST, ("free",))
    study = optuna.create_study(sampler=EvolutionSampler(space, 0))
    drawn: list[list[float]] = []
    study.sampler._draw = lambda tried, parents, rng: drawn.append([p.value for p in parents]) or space.random(rng)
    for number in range(24):
        trial, _ = ask_schedule(study, space)
        study.tell(trial, float((number * 7) % 24))
    assert all(values == sorted(values) for values in drawn) and any(len(values) == 3 for values in drawn)


def test_a_killed_run_leaves_no_running_trial_behind(space, fitness, settings, tmp_path):
    study = open_study(f"sqlite:///{tmp_path}/a.db", "s", settings)
    study.ask()  # as a run that was killed here leaves it
    run_search(study, space, fitness, evaluations=2)
    assert [t.state for t in study.trials].count(TrialState.RUNNING) == 0


def test_a_screened_candidate_has_no_fitness_and_is_never_the_best(space, fitness, settings):
    study = open_study("sqlite://", "s", replace(settings, move=False))
    result = run_search(study, space, fitness, evaluations=20)
    screened = [c for c in result.candidates if c.evaluation is None]
    judged = [c for c in result.candidates if c.evaluation is not None]
    assert screened and result.best in judged and best_of(study) == result.best
    least = min(c.evaluation.mse for c in judged)
    near = [c for c in judged if c.evaluation.mse <= PAIRED_MARGIN * least]
    assert result.best.evaluation.rfid == min(c.evaluation.rfid for c in near)


def test_a_study_made_with_other_settings_is_refused(settings, tmp_path):
    open_study(f"sqlite:///{tmp_path}/a.db", "s", settings)
    with pytest.raises(FlexiError, match=r"other settings \(speedup\)"):
        open_study(f"sqlite:///{tmp_path}/a.db", "s", replace(settings, speedup=3.0))


def test_a_storage_that_cannot_be_opened_is_one_clear_error(settings, tmp_path):
    with pytest.raises(FlexiError, match="cannot be used"):
        open_study(f"sqlite:///{tmp_path}/missing/a.db", "s", settings)


def test_the_fitness_of_the_teacher_itself_is_perfect(fitness):
    screened = fitness.sample(Schedule.parse("6*(F)"), 1)
    assert fitness.error(screened) < 1e-10  # to float32 rounding: the screen's batch is smaller than the teacher's
    images = fitness.sample(Schedule.parse("6*(F)"), 3, screened)
    assert fitness.evaluate(images).rfid == pytest.approx(0, abs=1e-6)


def test_later_stages_add_samples_to_those_of_the_earlier(fitness):
    schedule = Schedule.parse("3*(FX)")
    few = fitness.sample(schedule, 1)
    more = fitness.sample(schedule, 3, few)
    assert (more[:1] == few).all()
    assert (more - fitness.sample(schedule, 3)).abs().max() < 1e-4


@pytest.mark.parametrize(("samples", "stages"), [(16, (8, 16)), (32, (8, 32)), (64, (8, 32, 64)), (128, (8, 32, 128))])
def test_stages_grow_to_the_samples_that_are_asked_for(samples, stages):
    assert stages_to(samples) == stages


def test_stages_that_do_not_grow_are_refused(backend):
    with pytest.raises(FlexiError, match="growing numbers of samples"):
        Fitness(backend, (8, 8))


def test_a_sample_does_not_depend_on_what_is_sampled_beside_it(backend):
    schedule = Schedule.parse("3*(FX)")
    together = backend.sample(schedule, 40, 3).latents
    alone = backend.sample(schedule, 42, 1).latents
    assert (together[2] - alone[0]).abs().max() < 1e-4


def test_the_teacher_is_stored_once_and_read_back(backend, tmp_path):
    store = TeacherStore(TeacherSettings(), {"model": "m"}, tmp_path)
    images = backend.teacher(SEARCH_SEEDS, 4)
    store.put(0, images)
    assert (store.get(0, 3) == images[:3]).all()
    assert store.get(0, 5) is None and store.get(1, 3) is None
    assert TeacherStore(TeacherSettings(cfg=2.0), {"model": "m"}, tmp_path).get(0, 3) is None


def test_search_and_judge_never_see_the_same_sample(tmp_path):
    backend = EmbeddedBackend(TeacherSettings(steps=6), tmp_path)
    search, judge = backend.attributes(SEARCH_SEEDS, 64), backend.attributes(JUDGE_SEEDS, 64)
    assert (search != judge).any()
    assert JUDGE_SEEDS - SEARCH_SEEDS > 100_000


def test_judging_all_full_gives_the_teacher_and_null_steps_cost_what_they_say(backend):
    judge = Judge(backend, samples=4)
    same, _ = judge.judge("same", Schedule.parse("6*(F)"))
    assert same.psnr_db == float("inf") and same.rfid == pytest.approx(0, abs=1e-6) and same.speedup_macs == 1
    half, _ = judge.judge("half", Schedule.parse("3*(FX)"))
    assert half.speedup_macs == pytest.approx(2) and half.psnr_low <= half.psnr_db <= half.psnr_high
    assert judge.judge_fewer_steps(3).speedup_macs == 2


def test_baselines_keep_the_budget(space):
    rows = baselines(space)
    assert [name for name, _ in rows][:2] == ["3 of 6, removed", "3 of 6, extrapolated"]
    assert all(space.spent(schedule) <= space.budget for _, schedule in rows)


def test_a_sampler_that_the_embedded_model_lacks_is_refused(tmp_path):
    with pytest.raises(FlexiError, match="it has euler"):
        EmbeddedBackend(TeacherSettings(sampler="sa_solver"), tmp_path)
