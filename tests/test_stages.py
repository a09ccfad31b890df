"""Runs whose network changes at a noise level: nothing crosses it, and each stage is counted by itself."""

import pytest
import torch

from flexi_core import FlexiError, Schedule
from flexi_core.run.cost import count_macs
from flexi_core.run.plan import make_plan
from flexi_core.run.report import RunReport
from flexi_core.run.run import FULL_DEPTH, Run
from flexi_core.run.timeline import draw_timeline
from flexi_core.stages.bounds import UNITS, Boundary, Stages, with_boundary

TWO = ("high noise", "low noise")


@pytest.fixture(scope="module")
def convolutional(make_unet):
    return make_unet(transformer_depth=[0, 0], transformer_depth_output=[0] * 4, transformer_depth_middle=0)


def laid(text: str, boundary: float):
    """Return the plan of a run whose step i begins at the noise level n - i."""
    schedule = Schedule.parse(text)
    levels = [float(len(schedule) - i) for i in range(len(schedule) + 1)]
    return make_plan(schedule, levels, stages=Stages((boundary,), TWO))


@pytest.mark.parametrize(
    ("text", "boundary", "letters", "cut"),
    [
        ("F|FPPPPP@2|F", 4.0, "FFPPFPPF", (4,)),
        ("F|FPPPPP@2|F", 4.5, "FFPPFPPF", (4,)),  # a step straddles it
        ("FXXX|FXXX", 4.0, "FXXXFXXX", ()),
        ("FXXX|FXXX", 3.0, "FXXXFFXX", (5,)),
        ("FNNNNNNN", 2.0, "FNNNNNFN", (6,)),
        ("F|f|f|f", 2.0, "FfFf", (2,)),
        ("FXXX", 9.0, "FXXX", ()),
        ("FXXX", 0.0, "FXXX", ()),
    ],
)
def test_the_first_step_of_a_stage_is_full_and_segments_end_at_the_boundary(text, boundary, letters, cut):
    plan = laid(text, boundary)
    assert (plan.letters, plan.cut) == (letters, cut)
    stages = [plan.stage(i) for i in range(len(plan.steps))]
    assert stages == sorted(stages)
    for step, stage in zip(plan.steps, stages, strict=True):
        others = {at for other, at in zip(plan.steps, stages, strict=True) if other.segment == step.segment}
        assert others == {stage}, "a segment lies in two stages"


def test_a_cut_segment_keeps_its_depth_and_blend_behind_the_boundary():
    plan = laid("FPPPX@2~0.9", 3.0)
    assert plan.letters == "FPFPX"
    assert plan.steps[3].depth == 2 and plan.steps[4].blend == (0.9,)
    assert [plan.capture_depth(i) for i in (0, 2)] == [2, 2]


def test_a_level_on_the_boundary_belongs_to_the_stage_below():
    stages = Stages((2.0, 1.0), ("a", "b", "c"))
    assert [stages.at(level) for level in (9.0, 2.001, 2.0, 2.0 * (1 + 1e-5), 1.5, 1.0, 0.0)] == [0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(("bounds", "names"), [((1.0, 2.0), "abc"), ((2.0,), "abc"), ((-1.0,), "ab")])
def test_stages_that_do_not_follow_one_another_are_refused(bounds, names):
    with pytest.raises(FlexiError, match="stages have the boundaries"):
        Stages(bounds, tuple(names))


def flow(sigma: float) -> float:
    return 1000 * sigma


def test_a_boundary_is_a_level_in_every_unit():
    sigmas, ends = [1.0, 0.9, 0.7, 0.4, 0.0], (0.001, 1.0)
    assert Boundary(0.7, "sigma").level(sigmas, flow, ends) == 0.7
    assert Boundary(0.875, "timestep").level(sigmas, flow, ends) == pytest.approx(0.875)
    assert [Boundary(80.0, unit).level(sigmas, flow, ends) for unit in UNITS[3:]] == pytest.approx([0.875, 0.9])
    assert [Boundary(share, UNITS[2]).level(sigmas, flow, ends) for share in (0, 0.5, 0.7, 1)] == [1.0, 0.7, 0.4, 0.0]


def test_a_boundary_that_is_none_is_refused():
    for value, unit in ((-1, "sigma"), (float("nan"), "sigma"), (1.1, "timestep"), (875, "timestep"), (-0.1, UNITS[2])):
        with pytest.raises(FlexiError, match=f"the boundary is {value:g}; as {unit} it is 0"):
            Boundary(value, unit)
    with pytest.raises(FlexiError, match="expected one of timestep"):
        Boundary(0.5, "steps")
    with pytest.raises(FlexiError, match="no share of a whole; give the boundary as sigma"):
        Boundary(0.5).level([80.0, 0.0], lambda sigma: torch.tensor(sigma).log().item() / 4, (0.002, 80.0))


@pytest.mark.parametrize(
    ("level", "found"),
    [
        (8.0, [10.0, 8.0, 5.0, 0.0]),
        (5.5, [10.0, 7.0, 5.5, 0.0]),
        (9.9, [10.0, 9.9, 5.0, 0.0]),
        (1.0, [10.0, 7.0, 1.0, 0.0]),
        (7.0, [10.0, 7.0, 5.0, 0.0]),
        (20.0, [10.0, 7.0, 5.0, 0.0]),
        (0.0, [10.0, 7.0, 5.0, 0.0]),
    ],
)
def test_the_boundary_takes_the_place_of_the_level_next_to_it(level, found):
    assert with_boundary([10.0, 7.0, 5.0, 0.0], level) == found


def test_a_run_of_one_step_keeps_its_ends():
    assert with_boundary([10.0, 0.0], 4.0) == [10.0, 0.0]


def ran(text: str, boundary: float, networks, make_call, values=None) -> tuple[Run, list[torch.Tensor]]:
    """Run a plan over two networks, each in its stage; `values` stand for what a step computes."""
    plan = laid(text, boundary)
    run, answers = Run(plan), []
    for i, sigma in enumerate(plan.sigmas[:-1]):
        network = networks[plan.stage(i)]
        call = make_call(seed=i)

        def compute(sigma=sigma, network=network, call=call):
            return run.forward(network, call, sigma, network.forward)

        answers.append(run.predict(call.x, sigma, compute))
    return run, answers


def test_features_and_predictions_never_cross_the_boundary(unet, convolutional, make_call):
    whole, answers = ran("F|FPPPPX@2|F", 4.0, (unet, convolutional), make_call)
    assert whole.plan.letters == "FFPPFPXF"
    # What is behind the boundary is that of a run which begins there.
    alone, levels = Run(make_plan(Schedule.parse("FPX@2|F"), [4.0, 3.0, 2.0, 1.0, 0.0])), (4.0, 3.0, 2.0, 1.0)
    for i, sigma in enumerate(levels, 4):
        call = make_call(seed=i)

        def compute(call=call, sigma=sigma):
            return alone.forward(convolutional, call, sigma, convolutional.forward)

        assert torch.equal(alone.predict(call.x, sigma, compute), answers[i]), i


def test_a_network_that_changes_unannounced_gets_no_feature_of_another(unet, convolutional, make_call):
    run = Run(make_plan(Schedule.parse("FPP@2"), [3.0, 2.0, 1.0, 0.0]))
    for network, sigma in ((unet, 3.0), (convolutional, 2.0), (convolutional, 1.0)):
        call = make_call()
        run.predict(call.x, sigma, lambda n=network, c=call, s=sigma: run.forward(n, c, s, n.forward))
    assert [set(record.calls) for record in run.records] == [{FULL_DEPTH}, {FULL_DEPTH}, {2}]


def test_each_stage_is_counted_with_its_own_network(unet, convolutional, make_call):
    run, _ = ran("FPPP@1|FPPP@1", 4.0, (unet, convolutional), make_call)
    report = RunReport(run, 1.0)
    high, low = (count_macs(network, make_call()) for network in (unet, convolutional))
    rows = 4
    assert [stage.name for stage in report.stages] == list(TWO)
    assert [stage.macs for stage in report.stages] == [rows * (c.full_macs + 3 * c.macs(1)) for c in (high, low)]
    assert report.macs == sum(stage.macs for stage in report.stages)
    assert report.speedup_macs == pytest.approx(rows * 4 * (high.full_macs + low.full_macs) / report.macs)
    assert [stage.seconds for stage in report.stages] == [sum(s.seconds for s in stage.steps) for stage in report.stages]
    text = str(report)
    assert "High noise, steps 1 to 4: 1 full, 3 partial, " in text and "Low noise, steps 5 to 8: 1 full, 3 partial, " in text


def test_the_report_says_where_a_segment_was_cut_and_which_step_lies_across(unet, make_call):
    cut = str(RunReport(ran("FXXX", 2.0, (unet, unet), make_call)[0], 1.0))
    assert "The network changes within a segment of the schedule: step 3 ran in full for that." in cut
    assert "across" not in cut
    across = str(RunReport(ran("FF|FX", 2.5, (unet, unet), make_call)[0], 1.0))
    assert "Step 2 lies across the boundary at sigma 2.5 and is high noise's." in across and "within a segment" not in across
    none = str(RunReport(ran("FX|FX", 2.0, (unet, unet), make_call)[0], 1.0))
    assert "within a segment" not in none and "across" not in none


def test_the_picture_shows_the_stages_under_the_strip(unet, make_call):
    run, _ = ran("FX|FX", 2.0, (unet, unet), make_call)
    plain = Run(make_plan(Schedule.parse("FX|FX"), run.plan.sigmas))
    plain.records = run.records
    with_stages, without = (draw_timeline(RunReport(each, 1.0)) for each in (run, plain))
    assert with_stages.shape[1] == without.shape[1] + 30
