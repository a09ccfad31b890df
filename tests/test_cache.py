"""Whose deep feature a partial step takes, and that every miss is a full step with its reason."""

import math
from dataclasses import FrozenInstanceError, replace
from threading import Thread

import pytest
import torch
from torch import nn

from flexi_core import Schedule
from flexi_core.networks.unet import NetworkCall, full_pass, partial_pass
from flexi_core.run.cache import CachePolicy, FeatureCache
from flexi_core.run.plan import make_plan
from flexi_core.run.run import FULL_DEPTH, Run

MISS = "no deep feature kept for this conditioning, shape and segment"


def start(text: str, **options: object) -> Run:
    """Return a run whose step i has the noise level n - i."""
    schedule = Schedule.parse(text)
    return Run(make_plan(schedule, [float(len(schedule) - i) for i in range(len(schedule) + 1)]), **options)


def ask(run: Run, unet: nn.Module, call: NetworkCall, step: int) -> torch.Tensor:
    sigma = run.plan.sigmas[step]
    return run.predict(call.x, sigma, lambda: run.forward(unet, call, sigma, unet.forward))


def full(unet: nn.Module, call: NetworkCall) -> torch.Tensor:
    return call.run(unet.forward)


def test_a_partial_step_reuses_its_segments_feature(unet, make_call):
    run = start("FP@2")
    assert torch.equal(ask(run, unet, make_call(), 0), full(unet, make_call()))
    assert torch.equal(ask(run, unet, make_call(), 1), full(unet, make_call()))
    assert not torch.equal(ask(run, unet, make_call(seed=1), 1), full(unet, make_call(seed=1)))
    assert [dict(record.calls) for record in run.records] == [{FULL_DEPTH: 4}, {2: 8}]
    assert not any(record.fallbacks for record in run.records)
    assert run.cache.most_bytes > 0


def test_a_step_counts_as_what_it_really_was(unet, make_call):
    run = start("FPPX@2")
    for step, call in enumerate((make_call(), make_call(), make_call(size=8), make_call(size=8))):
        ask(run, unet, call, step)
    ask(run, unet, make_call(), 3)
    kinds = [{kind.value: count for kind, count in record.kinds.items()} for record in run.records]
    assert kinds == [{"F": 1}, {"P": 1}, {"F": 1}, {"X": 1, "F": 1}]


def test_the_first_full_call_is_kept_without_its_data_for_counting(unet, make_call):
    run = start("FP@2", count_options={"counted": True})
    ask(run, unet, make_call(), 0)
    first = run.first_calls[0]
    network, call = first
    assert network is unet and call.x.is_meta and call.x.shape == make_call().x.shape
    assert call.options == {"counted": True, "cond_or_uncond": [1, 0]}
    ask(run, unet, make_call(size=8), 0)
    assert run.first_calls[0] is first


def test_cond_and_uncond_never_share_a_cache_entry(unet, make_call):
    run = start("FP@2")
    ask(run, unet, make_call(slots=(1, 0)), 0)
    straight = ask(run, unet, make_call(slots=(1, 0), seed=1), 1)
    swapped = ask(run, unet, make_call(slots=(0, 1), seed=1), 1)
    assert not run.records[1].fallbacks
    assert not torch.equal(straight[:2], straight[2:])
    torch.testing.assert_close(swapped, straight.roll(2, dims=0), rtol=1e-5, atol=1e-6)


def test_one_uuid_for_cond_and_uncond_still_makes_two_entries(unet, make_call):
    # Area prompts: the host gives both the same uuid.
    run, plain = start("FP@2"), start("FP@2")
    ask(run, unet, make_call(slots=(1, 0), uuids=("same", "same")), 0)
    ask(plain, unet, make_call(slots=(1, 0)), 0)
    swapped = ask(run, unet, make_call(slots=(0, 1), uuids=("same", "same"), seed=1), 1)
    assert not run.records[1].fallbacks
    assert torch.equal(swapped, ask(plain, unet, make_call(slots=(0, 1), seed=1), 1))


@pytest.mark.parametrize("order", [(1, 0), (0, 1)])
def test_a_tile_of_which_one_half_runs_leaves_the_other_tiles_their_own(unet, make_call, order):
    names = {1: "uncond", 0: "cond"}

    def tile(number, slots=(1, 0)):
        return make_call(slots=slots, uuids=tuple(names[slot] for slot in slots), seed=number)

    def evaluate(run, calls, step):
        made, sigma = [], run.plan.sigmas[step]

        def compute():
            made.extend(run.forward(unet, call, sigma, unet.forward) for call in calls)
            return made[0]

        run.predict(calls[0].x, sigma, compute)
        return made

    run, whole = start("FP@2"), start("FP@2")
    for each in (run, whole):
        evaluate(each, [tile(1), tile(2), tile(3)], 0)
    _, *others = evaluate(run, [tile(1, (0,)), tile(2, order), tile(3, order)], 1)
    _, *wanted = evaluate(whole, [tile(1, order), tile(2, order), tile(3, order)], 1)
    assert not run.records[1].fallbacks
    assert all(map(torch.equal, others, wanted))
    if order == (1, 0):  # at its own input a partial step is the full one
        torch.testing.assert_close(others[0], full(unet, tile(2)), rtol=1e-5, atol=1e-6)


def test_one_prompt_twice_in_a_call_makes_two_entries(unet, make_call):
    run = start("FP@2")
    ask(run, unet, make_call(slots=(0, 0), uuids=("same", "same")), 0)
    assert len(run.cache) == 2
    ask(run, unet, make_call(slots=(0, 0), uuids=("same", "same")), 1)
    assert not run.records[1].fallbacks


def test_two_calls_equal_one(unet, make_call):
    together, apart = start("FP@2"), start("FP@2")
    predictions = []
    for step, seed in ((0, 0), (1, 1)):
        one = ask(together, unet, make_call(slots=(1, 0), seed=seed), step)
        two = [ask(apart, unet, make_call(slots=(slot,), seed=seed), step) for slot in (1, 0)]
        predictions.append((one, torch.cat(two)))
    for one, two in predictions:
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    assert not any(record.fallbacks for record in apart.records)
    assert [sum(r.calls.values()) for r in apart.records] == [sum(r.calls.values()) for r in together.records]
    assert [record.network_calls for record in apart.records] == [2, 2]


def test_a_feature_kept_in_one_call_serves_in_two(unet, make_call):
    run = start("FP@2")
    ask(run, unet, make_call(slots=(1, 0)), 0)
    two = torch.cat([ask(run, unet, make_call(slots=(slot,), seed=1), 1) for slot in (1, 0)])
    torch.testing.assert_close(two, ask(run, unet, make_call(slots=(1, 0), seed=1), 1), rtol=1e-5, atol=1e-6)
    assert not run.records[1].fallbacks


def test_a_second_run_starts_empty(unet, make_call):
    first = start("FP@2")
    ask(first, unet, make_call(), 0)
    second = Run(first.plan)
    assert torch.equal(ask(second, unet, make_call(seed=1), 1), full(unet, make_call(seed=1)))
    assert second.records[1].fallbacks == {MISS: 1}


def test_a_released_run_has_no_feature_left(unet, make_call):
    run = start("FP@2")
    ask(run, unet, make_call(), 0)
    run.release()
    ask(run, unet, make_call(seed=1), 1)
    assert run.records[1].fallbacks == {MISS: 1}


def test_the_feature_of_another_segment_is_a_miss(unet, make_call):
    run = start("FP@2|FP@2")
    ask(run, unet, make_call(), 0)
    assert torch.equal(ask(run, unet, make_call(seed=1), 3), full(unet, make_call(seed=1)))
    assert run.records[3].fallbacks == {MISS: 1}


@pytest.mark.parametrize(
    "change",
    [
        {"size": 8},
        {"slots": (0,), "uuids": ("a new prompt",)},
        {"slots": (0, 1), "uuids": ("slot 1", "slot 0")},
    ],
)
def test_another_shape_prompt_or_slot_is_a_miss(unet, make_call, change):
    run = start("FP@2")
    ask(run, unet, make_call(), 0)
    assert torch.equal(ask(run, unet, make_call(**change), 1), full(unet, make_call(**change)))
    assert run.records[1].fallbacks == {MISS: 1}
    assert run.records[1].calls[FULL_DEPTH] == make_call(**change).x.shape[0]


def test_a_call_with_one_unknown_chunk_runs_in_full(unet, make_call):
    run = start("FP@2")
    ask(run, unet, make_call(slots=(0,)), 0)
    assert torch.equal(ask(run, unet, make_call(slots=(1, 0), seed=1), 1), full(unet, make_call(slots=(1, 0), seed=1)))
    assert run.records[1].fallbacks == {MISS: 1}


class Window:
    def __init__(self, *frames: int) -> None:
        self.index_list = list(frames)


def test_context_windows_never_share_a_feature(unet, make_call):
    run = start("FP@2")
    ask(run, unet, make_call(context_window=Window(0, 1, 2)), 0)
    ask(run, unet, make_call(context_window=Window(0, 1, 2)), 1)
    assert not run.records[1].fallbacks
    ask(run, unet, make_call(context_window=Window(1, 2, 3)), 1)
    assert run.records[1].fallbacks == {MISS: 1}


def test_a_full_step_that_a_miss_brought_serves_the_segments_next_partial_step(unet, make_call):
    run = start("FPP@2")
    ask(run, unet, make_call(), 1)
    assert run.records[1].fallbacks == {MISS: 1}
    ask(run, unet, make_call(seed=1), 2)
    assert not run.records[2].fallbacks
    assert run.records[2].calls == {2: 4}


class NoUNet(nn.Module):
    def forward(self, x, timesteps, context=None, y=None, control=None, options=None):
        return x * 2


def test_an_unknown_network_runs_in_full_with_the_reason(make_call):
    run, network = start("FP@2"), NoUNet()
    for step in (0, 1):
        assert torch.equal(ask(run, network, make_call(), step), make_call().x * 2)
    assert run.records[1].fallbacks == {
        "NoUNet has no blocks that can be skipped: neither a U-Net's nor hooks for a transformer's": 1
    }
    assert run.records[1].calls == {FULL_DEPTH: 4}


@pytest.mark.parametrize("depth", [4, 5, 1000])
def test_a_depth_of_all_blocks_or_more_runs_in_full_with_the_reason(unet, make_call, depth):
    run = start(f"FP@{depth}")
    ask(run, unet, make_call(), 0)
    assert torch.equal(ask(run, unet, make_call(seed=1), 1), full(unet, make_call(seed=1)))
    assert run.records[1].fallbacks == {f"depth {depth} needs more than the network's 4 blocks": 1}


def test_a_call_without_the_hosts_keys_is_one_chunk(unet, make_call):
    run, call = start("FP@2"), make_call(slots=(0,))
    call.options.clear()
    ask(run, unet, call, 0)
    ask(run, unet, call, 1)
    assert not run.records[1].fallbacks


def test_a_schedule_without_partial_steps_keeps_nothing(unet, make_call):
    run = start("FX|FNN|F")
    for step in (0, 2, 5):
        assert torch.equal(ask(run, unet, make_call(), step), full(unet, make_call()))
    assert run.cache.most_bytes == 0


def test_partial_steps_do_not_pile_up_features(unet, make_call):
    run = start("4*(FPP@2)")
    held = []
    for step in range(12):
        ask(run, unet, make_call(seed=step), step)
        held.append(run.cache.held_bytes)
    assert set(held) == {run.cache.most_bytes}


def test_the_feature_is_that_of_the_last_full_step(unet, make_call):
    run = start("FPP@2")
    ask(run, unet, make_call(seed=0), 0)
    ask(run, unet, make_call(seed=1), 1)  # a partial step in between keeps no feature of its own
    after = ask(run, unet, make_call(seed=2), 2)
    _, feature = full_pass(unet, make_call(seed=0), unet.forward, 2)
    assert torch.equal(after, partial_pass(unet, make_call(seed=2), 2, feature))


def test_two_calls_of_one_conditioning_in_one_evaluation_keep_a_feature_each(unet, make_call):
    # Perturbed-attention guidance and tiles: the host asks for the same conditioning again, about something else.
    run = start("FP@2")
    sigma, calls = run.plan.sigmas, [make_call(slots=(0,)), make_call(slots=(0,), seed=1)]

    def both(step):
        return lambda: torch.cat([run.forward(unet, call, sigma[step], unet.forward) for call in calls])

    whole = run.predict(torch.zeros(4, 3, 16, 16), sigma[0], both(0))
    again = run.predict(torch.zeros(4, 3, 16, 16), sigma[1], both(1))
    assert not run.records[1].fallbacks and run.records[1].calls == {2: 4}
    assert torch.equal(again, whole)


def test_one_conditioning_that_two_threads_ask_for_at_once_is_full_with_a_reason(unet, make_call):
    run = start("FP@2")
    for step, sigma in enumerate(run.plan.sigmas[:2]):

        def half(sigma: float = sigma) -> torch.Tensor:
            return run.forward(unet, make_call(slots=(0,)), sigma, unet.forward)

        def compute(half=half) -> torch.Tensor:
            other = Thread(target=half)
            other.start()
            other.join()
            return half()

        assert torch.equal(run.predict(make_call(slots=(0,)).x, sigma, compute), full(unet, make_call(slots=(0,))))
        assert run.records[step].calls == {FULL_DEPTH: 4}
    assert run.records[1].fallbacks == {"several threads asked for one conditioning at once": 1}


def test_a_batch_of_another_size_is_a_miss(unet, make_call):
    run, whole = start("FP@2"), make_call(slots=(0,))
    one = replace(whole, x=whole.x[:1], timesteps=whole.timesteps[:1], context=whole.context[:1])
    ask(run, unet, whole, 0)
    assert torch.equal(ask(run, unet, one, 1), full(unet, one))
    assert run.records[1].fallbacks == {MISS: 1}


def test_a_call_that_does_not_say_whose_rows_it_has_is_full_with_a_reason(unet, make_call):
    run = start("FP@2")
    call = make_call(slots=(1, 0), uuids=("one",))
    for step in (0, 1):
        assert torch.equal(ask(run, unet, call, step), full(unet, call))
    assert run.records[1].fallbacks == {"the call does not say which rows belong to which conditioning": 1}


def test_a_feature_that_does_not_fit_the_limit_is_not_kept_and_its_partial_steps_say_so(unet, make_call):
    run = start("FP@2", policy=CachePolicy(limit_bytes=1000))
    for step in (0, 1):
        assert torch.equal(ask(run, unet, make_call(seed=step), step), full(unet, make_call(seed=step)))
    assert run.cache.held_bytes == 0
    (reason,) = run.records[1].fallbacks
    assert "does not fit into the cache limit of 0 MiB" in reason


def test_the_limit_holds_for_all_features_together(unet, make_call):
    whole = start("FP@2")
    ask(whole, unet, make_call(slots=(1, 0)), 0)
    run = start("FP@2", policy=CachePolicy(limit_bytes=0.75 * whole.cache.most_bytes))
    for slot in (1, 0):  # in two calls: the first one's fits, the second's does not
        ask(run, unet, make_call(slots=(slot,)), 0)
    assert len(run.cache) == 1 and run.cache.held_bytes == whole.cache.most_bytes / 2
    assert [ask(run, unet, make_call(slots=(slot,)), 1) is not None for slot in (1, 0)]
    assert run.records[1].calls == {2: 2, FULL_DEPTH: 2}


def test_the_devices_memory_is_left_alone_where_a_feature_would_fill_it(unet, make_call):
    asked = []
    policy = CachePolicy(free_bytes=lambda device: asked.append(device) or 0.0)
    run = start("FP@2", policy=policy)
    assert torch.equal(ask(run, unet, make_call(), 0), full(unet, make_call()))
    assert torch.equal(ask(run, unet, make_call(), 1), full(unet, make_call()))
    assert asked == [torch.device("cpu")]


def test_a_miss_of_another_conditioning_is_not_blamed_on_the_limit(unet, make_call):
    run = start("FP@2", policy=CachePolicy(limit_bytes=1000))
    ask(run, unet, make_call(slots=(1,)), 0)
    ask(run, unet, make_call(slots=(0,), seed=1), 1)  # was not there at the full step
    assert run.records[1].fallbacks == {MISS: 1}


def test_a_forecast_extrapolates_the_features_of_the_last_full_steps():
    cache, keys = FeatureCache(CachePolicy()), ["uncond", "cond"]

    def at(place: float) -> dict:
        return {"deep": torch.tensor([[1.0], [2.0]]) * place, "none": None, "empty": torch.zeros(2, 0)}

    for segment, place in enumerate((0.0, 3.0, 5.0)):
        cache.store(keys, at(place), segment, 2, place, older=1)
    held, _ = cache.recall(keys, 2, 2, torch.device("cpu"), 7.0)
    forecast, _ = cache.recall(keys, 2, 2, torch.device("cpu"), 7.0, order=1)
    assert torch.equal(held["deep"], at(5.0)["deep"])
    torch.testing.assert_close(forecast["deep"], at(7.0)["deep"])
    assert forecast["none"] is None and forecast["empty"].shape == (2, 0)
    assert len(cache._entries["cond"]) == 2, "no more is kept than the order needs"


def test_a_forecast_with_one_feature_or_another_depth_before_it_is_held():
    cache, feature = FeatureCache(CachePolicy()), {"deep": torch.ones(1, 2)}
    cache.store(["cond"], {"deep": torch.zeros(1, 2)}, 0, 3, 0.0, older=2)
    cache.store(["cond"], feature, 1, 2, 4.0, older=2)
    recalled, _ = cache.recall(["cond"], 1, 2, torch.device("cpu"), 6.0, order=2)
    assert torch.equal(recalled["deep"], feature["deep"])


def test_an_evaluation_again_in_a_segment_takes_the_place_of_its_feature():
    cache = FeatureCache(CachePolicy())
    for segment, place in ((0, 0.0), (1, 4.0), (1, 4.0)):
        cache.store(["cond"], {"deep": torch.full((1, 1), place)}, segment, 2, place, older=1)
    recalled, _ = cache.recall(["cond"], 1, 2, torch.device("cpu"), 6.0, order=1)
    torch.testing.assert_close(recalled["deep"], torch.full((1, 1), 6.0))


def test_a_forecast_weighs_each_half_by_its_own_full_steps():
    cache, cpu = FeatureCache(CachePolicy()), torch.device("cpu")
    for segment, place, keys in ((0, 0.0, ["uncond", "cond"]), (1, 4.0, ["cond"]), (2, 8.0, ["uncond", "cond"])):
        cache.store(keys, {"deep": torch.full((len(keys), 1), place)}, segment, 2, place, older=1)
    recalled, _ = cache.recall(["uncond", "cond"], 2, 2, cpu, 9.0, order=1)
    torch.testing.assert_close(recalled["deep"], torch.full((2, 1), 9.0))


def test_older_features_give_way_to_a_new_one_under_a_limit():
    cache = FeatureCache(CachePolicy(limit_bytes=6))
    for segment in range(3):
        cache.store(["cond"], {"deep": torch.full((1, 1), float(segment))}, segment, 2, float(segment), older=1)
        recalled, reason = cache.recall(["cond"], segment, 2, torch.device("cpu"), segment + 0.5, order=1)
        assert reason == "" and recalled["deep"].item() == segment


def mebibytes(count: int) -> dict:
    return {"deep": torch.zeros(1, count << 20, dtype=torch.uint8), "ended": None}


def test_a_feature_that_just_fills_the_limit_is_kept_and_one_beyond_it_is_told_in_mebibytes():
    cache, cpu = FeatureCache(CachePolicy(limit_bytes=3 << 20)), torch.device("cpu")
    cache.store(["one"], mebibytes(3), 0, 2)
    assert cache.held_bytes == cache.most_bytes == 3 << 20
    cache.store(["one"], mebibytes(2), 0, 2)
    cache.store(["other"], mebibytes(2), 0, 2)
    assert cache.held_bytes == 2 << 20 and cache.most_bytes == 3 << 20 and len(cache) == 1
    _, reason = cache.recall(["one", "other"], 0, 2, cpu)
    assert "(2 MiB beside 2 MiB kept) does not fit into the cache limit of 3 MiB" in reason
    cache.clear()
    for segment, size in enumerate((1, 2)):
        cache.store(["one"], mebibytes(size), segment, 2, older=1)
    assert cache.held_bytes == 3 << 20, "the older one stays where both fit"


def test_a_forecast_from_features_of_another_size_is_held():
    cache = FeatureCache(CachePolicy())
    for segment, size in enumerate((2, 2, 3)):
        cache.store(["cond"], {"deep": torch.full((1, size), float(segment))}, segment, 2, float(segment), older=2)
    recalled, _ = cache.recall(["cond"], 2, 2, torch.device("cpu"), 3.0, order=2)
    assert torch.equal(recalled["deep"], torch.full((1, 3), 2.0))


class Elsewhere(torch.Tensor):
    """A tensor that says where it is brought to, in place of a device's."""

    brought: list[str]

    def to(self, place: str) -> torch.Tensor:
        self.brought.append(place)
        return self.as_subclass(torch.Tensor)


@pytest.mark.parametrize(
    ("place", "free", "brought"),
    [("auto", 16, []), ("auto", 15, ["cpu"]), ("gpu", 0, []), ("ram", math.inf, ["cpu"]), ("auto", math.inf, [])],
)
def test_a_feature_is_kept_in_ram_where_that_is_asked_or_it_takes_more_than_a_quarter_of_what_is_free(place, free, brought):
    cache = FeatureCache(CachePolicy(place=place, free_bytes=lambda device: free))
    feature = torch.zeros(1, 4, dtype=torch.uint8).as_subclass(Elsewhere)
    feature.brought = []
    cache.store(["cond"], {"deep": feature, "ended": None}, 0, 2)
    assert feature.brought == brought and cache.held_bytes == 4


def test_a_cache_policy_is_a_value():
    with pytest.raises(FrozenInstanceError):
        CachePolicy().place = "ram"
