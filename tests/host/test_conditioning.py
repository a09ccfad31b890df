"""Every way in which the host's nodes condition a U-Net, under a schedule with all kinds of step."""

import importlib
import inspect

import pytest
import torch

from flexi_core.networks.controlnet import ShallowControl
from flexi_core.networks.unet import NetworkCall, block_count, full_pass, partial_pass
from flexi_core.stages.bounds import Boundary

MIXED = "FPX@2|FPN@3"  # 6 steps, as all of these schedules
FAMILIES = ("sd15_model", "sdxl_model")


@pytest.fixture(scope="module")
def nodes(host):
    return importlib.import_module("nodes")


@pytest.fixture(scope="module")
def noise():
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def sampler_of(host, noise):
    """A function of (positive, negative, options) that returns what `cell` samples with."""

    def make(positive, negative, **options):
        options = {"steps": 6, "noise": noise, **options}
        return lambda model: host.sample(model, positive=positive, negative=negative, **options)

    return make


def rows(report, index):
    """Return how many rows went through the network in a step, by depth; 0 is the whole network."""
    return report._run.records[index].calls


def areas(nodes, prompt):
    area = nodes.ConditioningSetArea().append
    (left,), (right,) = area(prompt(2), 64, 128, 0, 0, 1.0), area(prompt(3), 64, 64, 64, 32, 0.8)
    return prompt(1) + left + right, prompt(9)


def areas_in_percent(nodes, prompt):
    area = nodes.ConditioningSetAreaPercentage().append
    (top,), (bottom,) = area(prompt(2), 1.0, 0.5, 0.0, 0.0, 1.0), area(prompt(3), 1.0, 0.5, 0.0, 0.5, 1.0)
    return top + bottom, prompt(9)


def masks(nodes, prompt, place="default"):
    mask = torch.zeros(64, 64)
    mask[:, :40] = 1
    (left,) = nodes.ConditioningSetMask().append(prompt(2), mask, place, 1.0)
    (right,) = nodes.ConditioningSetMask().append(prompt(3), 1 - mask, place, 0.7)
    return left + right, prompt(9)


def masks_as_areas(nodes, prompt):
    return masks(nodes, prompt, "mask bounds")


def combined(nodes, prompt):
    return nodes.ConditioningCombine().combine(prompt(1), prompt(2))[0], prompt(9)


def concatenated(nodes, prompt):
    """17 tokens do not go into one call with 5: the host would have to pad them too far."""
    return nodes.ConditioningConcat().concat(prompt(1), prompt(2, tokens=9))[0], prompt(9, tokens=5)


def concatenated_and_padded(nodes, prompt):
    """16 tokens and 8 go into one call: the host repeats the 8."""
    return nodes.ConditioningConcat().concat(prompt(1), prompt(2))[0], prompt(9)


def averaged_and_zeroed_out(nodes, prompt):
    (negative,) = nodes.ConditioningZeroOut().zero_out(prompt(9))
    return nodes.ConditioningAverage().addWeighted(prompt(1), prompt(2), 0.6)[0], negative


def default_where_masks_leave_off(nodes, prompt):
    mask = torch.zeros(64, 64)
    mask[:24] = 1
    (top,) = nodes.ConditioningSetMask().append(prompt(2), mask, "default", 1.0)
    combine = importlib.import_module("comfy.hooks").set_default_conds_and_combine  # as ConditioningSetDefaultAndCombine does
    return combine([top], [prompt(3)])[0], prompt(9)


PROMPTS = {
    "area prompts (ConditioningSetArea)": areas,
    "area prompts in percent": areas_in_percent,
    "mask prompts (ConditioningSetMask)": masks,
    "mask prompts, area set to the mask's bounds": masks_as_areas,
    "combined prompts": combined,
    "concatenated prompts, cond and uncond of other lengths in two calls": concatenated,
    "concatenated prompts, cond and uncond of other lengths in one call": concatenated_and_padded,
    "averaged prompts, negative zeroed out": averaged_and_zeroed_out,
    "default prompt where masks leave off": default_where_masks_leave_off,
}


# On both types; the rest on the first alone.
BOTH = ("area prompts (ConditioningSetArea)", "mask prompts (ConditioningSetMask)", *[n for n in PROMPTS if "two calls" in n])


@pytest.mark.matrix("Conditioning", "{name}")
@pytest.mark.parametrize(("name", "family"), [(name, family) for name in PROMPTS for family in FAMILIES[: 1 + (name in BOTH)]])
def test_prompts_keep_the_laws(request, nodes, prompt, sampler_of, cell, name, family):
    sample = sampler_of(*PROMPTS[name](nodes, prompt))
    report = cell(request.getfixturevalue(family), sample, MIXED)
    assert "ran in full" not in str(report)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_in_one_call_and_in_calls_of_their_own_give_the_same_latents(
    monkeypatch, nodes, prompt, sampler_of, sd15_model, apply, name
):
    sample = sampler_of(*PROMPTS[name](nodes, prompt))
    model, handle = apply(sd15_model, "F|FPPPP@2")
    together, report = sample(model), handle.report
    monkeypatch.setattr(sd15_model.model, "memory_usage_factor", 1e12)  # the host splits what exceeds its estimate
    apart, report_of_parts = sample(model), handle.report
    calls, calls_of_parts = (sum(s.network_calls for s in r.steps) for r in (report, report_of_parts))
    assert calls_of_parts > calls or name.endswith("in two calls")
    assert report.letters == report_of_parts.letters == "FFPPPP"
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-4 * float(together.abs().max()))


@pytest.fixture(scope="module")
def ranged(nodes, prompt):
    """A prompt of the first half of the noise levels, another of the second half: five tokens, or as many as the first."""

    def make(tokens=8):
        set_range = nodes.ConditioningSetTimestepRange().set_range
        (early,), (late,) = set_range(prompt(1), 0.0, 0.5), set_range(prompt(2, tokens), 0.5, 1.0)
        return early + late, prompt(9)

    return make


@pytest.mark.matrix("Conditioning", "timestep ranges: a prompt comes in at a partial step")
@pytest.mark.parametrize("tokens", [8, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_that_comes_in_at_a_partial_step_runs_it_in_full(request, ranged, sampler_of, cell, family, tokens):
    does = "the partial step at which the prompt comes in runs in full, the next are partial again"
    report = cell(request.getfixturevalue(family), sampler_of(*ranged(tokens)), "F|FPPPP@2", ran="FFPFPP", does=does)
    assert report.steps[3].fallbacks == ("no deep feature kept for this conditioning, shape and segment",)
    assert "1 evaluation ran in full: no deep feature kept" in str(report)


@pytest.mark.parametrize("family", FAMILIES)
def test_step_that_a_new_prompt_runs_in_full_equals_one_that_is_scheduled(request, ranged, sampler_of, apply, family):
    model, sample = request.getfixturevalue(family), sampler_of(*ranged())
    fallen_back, scheduled = apply(model, "F|FPPPP@2")[0], apply(model, "F|FP@2|FPP@2")[0]
    assert torch.equal(sample(fallen_back), sample(scheduled))


@pytest.mark.matrix("Conditioning", "timestep ranges: prompts come in at full steps and go at any")
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_that_come_in_at_full_steps_run_partially(request, nodes, ranged, prompt, sampler_of, cell, family):
    passing = nodes.ConditioningSetTimestepRange().set_range(prompt(3), 0.0, 0.7)[0]
    positive, negative = ranged()
    report = cell(request.getfixturevalue(family), sampler_of(positive + passing, negative), "F|FP@2|FPX@2")
    assert "ran in full" not in str(report)


@pytest.mark.matrix("Conditioning", "cfg 1: the positive prompt alone")
@pytest.mark.parametrize("family", FAMILIES)
def test_cfg_1_keeps_the_laws(request, prompt, sampler_of, cell, family):
    report = cell(request.getfixturevalue(family), sampler_of(prompt(1), prompt(9), cfg=1.0), MIXED)
    assert sum(rows(report, 0).values()) == 1


@pytest.mark.matrix("Conditioning", "SDXL sizes and crops")
def test_sizes_of_sdxl_keep_the_laws(prompt, sampler_of, cell, sdxl_model):
    sizes = {"width": 1024, "height": 768, "crop_w": 64, "crop_h": 0, "target_width": 512, "target_height": 512}
    positive, negative = ([[tokens, {**more, **sizes}] for tokens, more in prompt(seed)] for seed in (1, 9))
    cell(sdxl_model, sampler_of(positive, negative), MIXED)
    assert not torch.equal(sampler_of(positive, negative)(sdxl_model), sampler_of(prompt(1), prompt(9))(sdxl_model))


@pytest.fixture(scope="module")
def guided(host, noise, sd15_model):
    """A function of a function (model -> guider of the host) that returns what `cell` samples with."""
    samplers = host.comfy.samplers

    def make(guider_of):
        def sample(model):
            sigmas = host.sigmas(model, "normal", 6)
            euler, start = samplers.sampler_object("euler"), torch.zeros_like(noise)
            return guider_of(model).sample(noise, start, euler, sigmas, disable_pbar=True, seed=0)

        return sample

    return make


@pytest.mark.matrix("Conditioning", "DualCFGGuider, {style}")
@pytest.mark.parametrize("style", ["regular", "nested"])
def test_dual_cfg_guider_keeps_the_laws(prompt, guided, cell, sd15_model, extra, style):
    node, prompts = extra("custom_sampler", "DualCFGGuider"), (prompt(1), prompt(2), prompt(9))
    styled = "style" in inspect.signature(node).parameters
    if style != "regular" and not styled:
        pytest.skip("this host's DualCFGGuider has one style")
    sample = guided(lambda model: node(model, *prompts, 3.0, 2.0, *([style] if styled else []))[0])
    report = cell(sd15_model, sample, MIXED)
    assert sum(rows(report, 0).values()) == 3


@pytest.mark.matrix("Conditioning", "PerpNegGuider")
def test_perp_neg_guider_keeps_the_laws(prompt, guided, cell, sd15_model, extra):
    node, prompts = extra("perpneg", "PerpNegGuider"), (prompt(1), prompt(9), prompt(8))
    report = cell(sd15_model, guided(lambda model: node(model, *prompts, 3.0, 1.0)[0]), MIXED)
    assert sum(rows(report, 0).values()) == 3


@pytest.mark.matrix("Conditioning", "PerpNeg (the old node, with a call of its own)")
def test_perp_neg_node_keeps_the_laws(prompt, sampler_of, cell, sd15_model, extra):
    (model,) = extra("perpneg", "PerpNeg")(sd15_model, prompt(8), 1.0)
    report = cell(model, sampler_of(prompt(1), prompt(9)), MIXED)
    assert report.steps[1].network_calls == 2
    assert rows(report, 1) == {2: 3}


@pytest.mark.matrix("Conditioning", "perturbed-attention guidance: a second call of the positive prompt")
def test_perturbed_attention_has_a_feature_of_its_own(prompt, sampler_of, cell, apply, sd15_model, extra):
    (model,) = extra("pag", "PerturbedAttentionGuidance")(sd15_model, 2.0)
    sample = sampler_of(prompt(1), prompt(9))
    report = cell(model, sample, MIXED)
    assert rows(report, 1) == {2: 3}
    asked = []

    def watch(executor, *args):
        asked.append(executor(*args))
        return asked[-1]

    patched, _ = apply(model, "F|FPPPP@2")
    patched.add_wrapper_with_key(importlib.import_module("comfy.patcher_extension").WrappersMP.CALC_COND_BATCH, "watch", watch)
    sample(patched)
    assert len(asked) == 12
    for guided, perturbed in zip(asked[::2], asked[1::2], strict=True):
        apart = (guided[0] - perturbed[0]).abs().max() / guided[0].abs().max()
        assert apart > 1e-6, "a partial step took the other call's feature"  # rounding alone is 5e-8


@pytest.fixture(scope="module")
def lora_hook(host, extra, sd15_model, repatched):
    """A function of (layer, strength by percent) that returns a LoRA of that layer as HOOKS, from a file by the host's node."""
    save_file = importlib.import_module("safetensors.torch").save_file
    weights = sd15_model.model.state_dict()

    def make(layer, strengths):
        rows, columns = weights[f"diffusion_model.{layer}.weight"].flatten(1).shape
        rng = torch.Generator().manual_seed(5)
        key = "lora_unet_" + layer.replace(".", "_")
        lora = {
            f"{key}.lora_up.weight": torch.randn(rows, 4, generator=rng) * 0.5,
            f"{key}.lora_down.weight": torch.randn(4, columns, generator=rng) * columns**-0.5,
        }
        path = host.base / "models" / "loras" / f"{key}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(lora, path)
        (hooks,) = extra("hooks", "CreateHookLoraModelOnly")(path.name, 1.0)
        frames = None
        for percent, strength in strengths.items():
            (frames,) = extra("hooks", "CreateHookKeyframe")(strength, percent, frames)
        return extra("hooks", "SetHookKeyframes")(hooks, frames)[0]

    return make


@pytest.fixture(scope="module")
def hooked(extra):
    """A function that hangs HOOKS on a CONDITIONING."""
    return lambda cond, hooks: extra("hooks", "ConditioningSetProperties")(cond, 1.0, "default", hooks=hooks)[0]


DEEP, SHALLOW = "middle_block.1.transformer_blocks.0.attn2.to_v", "output_blocks.5.1.transformer_blocks.0.attn2.to_v"
FRAMES = {"one strength": {0.0: 1.0}, "two keyframes": {0.0: 0.3, 0.6: 1.0}}


@pytest.mark.matrix("Conditioning", "LoRA hook on a prompt, {frames}")
@pytest.mark.parametrize("layer", [DEEP, SHALLOW])
@pytest.mark.parametrize("frames", FRAMES)
def test_lora_hook_keeps_the_laws(prompt, sampler_of, cell, sd15_model, lora_hook, hooked, frames, layer):
    bare = sampler_of(prompt(1), prompt(9))
    before = bare(sd15_model)
    sample = sampler_of(hooked(prompt(1), lora_hook(layer, FRAMES[frames])), prompt(9))
    report = cell(sd15_model, sample, MIXED)
    assert "ran in full" not in str(report)
    assert not torch.equal(sample(sd15_model), before), "the LoRA changes nothing"
    assert torch.equal(bare(sd15_model), before), "the hook's weights stayed"


@pytest.mark.matrix("Conditioning", "LoRA hooks on two masked prompts")
def test_two_lora_hooks_keep_the_laws(nodes, prompt, sampler_of, cell, sd15_model, lora_hook, hooked):
    positive, negative = masks(nodes, prompt)
    hooks = lora_hook(DEEP, {0.0: 1.0}), lora_hook(SHALLOW, {0.0: 1.0, 0.4: 0.5})
    sample = sampler_of([hooked([cond], hook)[0] for cond, hook in zip(positive, hooks, strict=True)], negative)
    report = cell(sd15_model, sample, MIXED)
    assert report.steps[1].network_calls == 3


@pytest.mark.parametrize("percent", [0.0, 0.5])
def test_keyframed_hook_of_a_shallow_layer_reaches_partial_steps(
    prompt, sampler_of, apply, sd15_model, lora_hook, hooked, percent
):
    model, handle = apply(sd15_model, "F|FPPPP@1")
    hook = lora_hook(SHALLOW, {0.0: 0.0, percent: 1.0} if percent else {0.0: 1.0})
    never = lora_hook(SHALLOW, {0.0: 0.0})
    latents = [sampler_of(hooked(prompt(1), hooks), prompt(9))(model) for hooks in (hook, never)]
    assert handle.report.letters == "FFPPPP"
    assert not torch.equal(*latents)


@pytest.mark.matrix("Conditioning", "hook with an attention patch on a prompt")
def test_attention_patch_of_a_hook_keeps_the_laws(host, prompt, sampler_of, cell, apply, sd15_model, hooked):
    comfy_hooks, seen = host.comfy.hooks, []
    if not hasattr(comfy_hooks.TransformerOptionsHook, "on_apply_hooks"):
        pytest.skip("this host's TransformerOptionsHook has no on_apply_hooks, which the host itself calls")

    def louder(q, k, v, extra_options):
        seen.append((extra_options["block"], list(extra_options["cond_or_uncond"])))
        return q, k, v * 1.5

    hooks = comfy_hooks.HookGroup()
    scope = comfy_hooks.EnumHookScope.HookedOnly
    hooks.add(comfy_hooks.TransformerOptionsHook({"patches": {"attn2_patch": [louder]}}, scope))
    sample = sampler_of(hooked(prompt(1), hooks), prompt(9))
    cell(sd15_model, sample, MIXED)
    seen.clear()
    sample(apply(sd15_model, "F|FPPPP@1")[0])
    blocks = len([block for block, _ in seen if block == ("output", 5)])
    assert blocks == 6, "the shallowest block is patched in every step, under its own number"
    assert {tuple(slots) for _, slots in seen} == {(0,)}, "the patch reached the negative prompt"
    assert len(seen) == 2 * 11 + 4, "the network has 11 transformers, a partial step of depth 1 one"


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def control_net(host, generated):
    """A function of (model, seed, options) that returns the host's CONTROL_NET of the model's layout, weights generated."""
    cldm = importlib.import_module("comfy.cldm.cldm")
    controlnet = importlib.import_module("comfy.controlnet")

    def make(model, seed=11, **options):
        config = {**model.model.model_config.unet_config, "hint_channels": 3}
        del config["out_channels"], config["transformer_depth_output"]
        network = cldm.ControlNet(**config, device=torch.device("cpu"))
        return controlnet.ControlNet(generated(network, seed), load_device=torch.device("cpu"), **options)

    return make


@pytest.fixture(scope="module")
def adapter(host, generated):
    """The host's T2I-Adapter for `sd15_model`, loaded by the host from generated weights."""
    network = importlib.import_module("comfy.t2i_adapter.adapter").Adapter(
        cin=192, channels=[32, 64, 128, 128], nums_rb=2, ksize=1, sk=True, use_conv=False, xl=False
    )
    return importlib.import_module("comfy.controlnet").load_t2i_adapter(generated(network, 21).state_dict())


@pytest.fixture(scope="module")
def controlled(nodes, prompt, image):
    """A function of (control, strength, percents, prompts) that returns a positive and a negative under a control net."""

    def make(control, strength=0.5, start=0.0, end=1.0, prompts=None):
        prompts = prompts or (prompt(1), prompt(9))
        return nodes.ControlNetApplyAdvanced().apply_controlnet(*prompts, control, image, strength, start, end)

    return make


CONTROLS = {
    "ControlNet (ControlNetApplyAdvanced)": lambda on, net, **_: on(net()),
    "ControlNet from 20 to 60 percent": lambda on, net, **_: on(net(), 0.7, 0.2, 0.6),
    "two chained control nets, one to 40 percent": lambda on, net, **_: on(net(), prompts=on(net(seed=12), 0.4, 0.0, 0.4)),
    "ControlNet on the positive prompt alone": lambda on, net, prompt, **_: (on(net())[0], prompt(9)),
    "ControlNet with falling strength": lambda on, net, rising, **_: on(net(strength_type=rising), 0.8),
    "ControlNet with averaged residuals": lambda on, net, **_: on(net(global_average_pooling=True)),
}
BOTH_CONTROLS = tuple(CONTROLS)[:3]


@pytest.mark.matrix("Conditioning", "{name}")
@pytest.mark.parametrize(
    ("name", "family"), [(name, family) for name in CONTROLS for family in FAMILIES[: 1 + (name in BOTH_CONTROLS)]]
)
def test_control_nets_keep_the_laws(request, prompt, sampler_of, cell, control_net, controlled, name, family):
    model = request.getfixturevalue(family)
    rising = importlib.import_module("comfy.controlnet").StrengthType.LINEAR_UP
    conds = CONTROLS[name](controlled, lambda **options: control_net(model, **options), prompt=prompt, rising=rising)
    sample = sampler_of(*conds)
    report = cell(model, sample, MIXED)
    assert "ran in full" not in str(report)
    assert not torch.equal(sample(model), sampler_of(prompt(1), prompt(9))(model)), "the control net changes nothing"


@pytest.mark.parametrize("text", ["6*(F)", "FPX@2|FPX@2", "FPPPPP@2"])
def test_a_control_net_over_a_joined_pair_is_that_of_two_windows(
    host, noise, apply, sd15_model, typed_model, control_net, controlled, text
):
    """Its shallow blocks run on partial steps of both networks; steps of no network leave it out."""
    other = typed_model("SD15", sd15_model.model.model_config.unet_config)
    rng = torch.Generator().manual_seed(8)
    for value in other.model.diffusion_model.parameters():
        value.data.mul_(1 + 0.1 * torch.randn(value.shape, generator=rng))
    positive, negative = controlled(control_net(sd15_model))
    options = {"steps": 6, "positive": positive, "negative": negative}
    level = float(host.sigmas(sd15_model, "normal", 6)[3])
    joined, _ = host.adapter.join_models(sd15_model, other, Boundary(level, "sigma"))
    model, handle = apply(joined, text)
    made = host.sample(model, noise=noise, **options)
    first, second = (apply(each, text)[0] for each in (sd15_model, other))
    half = host.sample(first, noise=noise, last_step=3, **options)
    whole = host.sample(second, noise=half * 0, latent_image=half, start_step=3, disable_noise=True, **options)
    # The latent is scaled on its way between two nodes, which rounds.
    assert (made - whole).abs().max() < 1e-4 * made.abs().max(), str(handle.report)
    assert handle.report.letters[3] == "F" and len(handle.report.stages) == 2
    plain, _ = controlled(control_net(sd15_model), strength=0.0)
    assert not torch.equal(made, host.sample(model, noise=noise, **{**options, "positive": plain, "negative": plain}))


@pytest.mark.matrix("Conditioning", "ControlNet by the old node, which fills in the negative prompt")
def test_old_control_node_keeps_the_laws(nodes, prompt, image, sampler_of, cell, sd15_model, control_net):
    (positive,) = nodes.ControlNetApply().apply_controlnet(prompt(1), control_net(sd15_model), image, 0.5)
    cell(sd15_model, sampler_of(positive, prompt(9)), MIXED)


@pytest.mark.matrix("Conditioning", "T2I-Adapter{place}")
@pytest.mark.parametrize("place", ["", " after a ControlNet", " before a ControlNet"])
def test_t2i_adapter_keeps_the_laws(prompt, sampler_of, cell, sd15_model, control_net, adapter, controlled, place):
    nets = {"": [adapter], " after a ControlNet": [control_net(sd15_model), adapter]}.get(place)
    prompts = prompt(1), prompt(9)
    for net in nets or [adapter, control_net(sd15_model)]:
        prompts = controlled(net, 0.6, prompts=prompts)
    cell(sd15_model, sampler_of(*prompts), MIXED)


@pytest.mark.matrix("Conditioning", "T2I-Adapter from 50 percent on: it starts at a partial step")
def test_t2i_adapter_that_starts_late_keeps_the_laws(sampler_of, cell, sd15_model, adapter, controlled):
    cell(sd15_model, sampler_of(*controlled(adapter, 0.6, 0.5, 1.0)), "F|FPPPP@3")


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chained", [False, True])
def test_shallow_control_net_gives_the_whole_ones_residuals(request, prompt, control_net, controlled, family, chained):
    model, sampling = request.getfixturevalue(family), request.getfixturevalue(family).model.model_sampling
    prompts = controlled(control_net(model, seed=12), 0.4) if chained else None
    control = controlled(control_net(model), 0.7, prompts=prompts)[0][0][1]["control"]
    control.pre_run(model.model, sampling.percent_to_sigma)
    rng = torch.Generator().manual_seed(1)
    x, sigma = torch.randn(4, 4, 16, 16, generator=rng) * 5, torch.full((4,), 5.0)
    cond = {"c_crossattn": torch.cat([prompt(1)[0][0], prompt(9)[0][0]]).repeat_interleave(2, 0)}
    if model.model.adm_channels:
        cond["y"] = torch.randn(4, model.model.adm_channels, generator=rng)
    whole = control.get_control(x, sigma, cond, 2, {})
    n = block_count(model.model.diffusion_model)
    assert len(whole["output"]) == n and len(whole["middle"]) == 1
    for depth in range(1, n + 2):
        shallow = ShallowControl(control, depth).get_control(x, sigma, cond, 2, {})
        assert len(shallow["output"]) == n
        for i, (few, all_of_them) in enumerate(zip(shallow["output"], whole["output"], strict=True)):
            assert torch.equal(few, all_of_them) if i < depth else few is None, (depth, i)
        assert (shallow["middle"][0] is None) is (depth < n)
        again = shallow.whole()
        assert all(torch.equal(a, b) for name in whole for a, b in zip(again[name], whole[name], strict=True))
    control.cleanup()


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_partial_steps_run_the_control_nets_shallow_blocks_alone(sampler_of, apply, sd15_model, control_net, controlled, depth):
    net = control_net(sd15_model)
    calls = []
    parts = [*net.control_model.input_blocks, net.control_model.middle_block, net.control_model.middle_block_out]
    for number, part in enumerate(parts):
        part.register_forward_hook(lambda *_, number=number: calls.append(number))
    sample = sampler_of(*controlled(net))
    n = block_count(sd15_model.model.diffusion_model)
    model, handle = apply(sd15_model, f"F|FPPPP@{depth}")
    sample(model)
    assert handle.report.letters == "FFPPPP"
    assert [calls.count(number) for number in range(n + 2)] == [6] * depth + [2] * (n + 2 - depth)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("chained", "text", "limit_mib", "reason"),
    [
        (False, "F|FPPPP@9", 0, "depth 9 needs more than the network's 6 blocks"),
        (False, "F|FPPPP@2", 1e-6, "does not fit into the cache limit"),
        (True, "F|FPPPP@2", 1e-6, "does not fit into the cache limit"),
    ],
)
def test_partial_steps_that_all_miss_equal_plain_sampling_under_a_control_net(
    request, sampler_of, apply, control_net, adapter, controlled, family, chained, text, limit_mib, reason
):
    model = request.getfixturevalue(family)
    before = adapter if family == "sd15_model" else control_net(model, seed=12)
    sample = sampler_of(*controlled(control_net(model), prompts=controlled(before, 0.4) if chained else None))
    patched, handle = apply(model, text, "map", "auto", limit_mib)
    assert torch.equal(sample(patched), sample(model))
    assert handle.report.letters == "F" * 6
    assert reason in str(handle.report)


def test_prompt_that_comes_in_under_a_control_net_gets_every_residual(
    ranged, sampler_of, apply, sd15_model, control_net, controlled
):
    sample = sampler_of(*controlled(control_net(sd15_model), prompts=ranged()))
    model, handle = apply(sd15_model, "F|FPPPP@2")
    assert torch.equal(sample(model), sample(apply(sd15_model, "F|FP@2|FPP@2")[0]))
    assert handle.report.letters == "FFPFPP"


@pytest.fixture(scope="module")
def seen_image(host):
    """A function of (seed, width) that returns a CLIP_VISION_OUTPUT."""

    def make(seed, width):
        output = importlib.import_module("comfy.clip_vision").Output()
        output.image_embeds = torch.randn(1, width, generator=torch.Generator().manual_seed(seed))
        return output

    return make


@pytest.mark.matrix("Conditioning", "unCLIP on SD2.1-unCLIP, images: {images}")
@pytest.mark.parametrize("images", [1, 2])
def test_unclip_keeps_the_laws(nodes, prompt, sampler_of, cell, typed_model, sdxl_model, seen_image, images):
    config = {**sdxl_model.model.model_config.unet_config, "adm_in_channels": 128}
    unclip = importlib.import_module("comfy.supported_models").SD21UnclipL
    model = typed_model("SD21UnclipL", config, noise_aug_config={**unclip.noise_aug_config, "timestep_dim": 64})
    positive = prompt(1)
    for seed in range(images):
        (positive,) = nodes.unCLIPConditioning().apply_adm(positive, seen_image(seed, 64), 0.8, 0.1)
    sample = sampler_of(positive, prompt(9))
    cell(model, sample, MIXED)
    assert not torch.equal(sample(model), sampler_of(prompt(1), prompt(9))(model)), "the image changes nothing"


@pytest.mark.matrix("Conditioning", "unCLIP on SDXL")
def test_unclip_on_sdxl_keeps_the_laws(nodes, prompt, sampler_of, cell, sdxl_model, seen_image):
    (positive,) = nodes.unCLIPConditioning().apply_adm(prompt(1), seen_image(0, 1280), 1.0, 0.2)
    sample = sampler_of(positive, prompt(9))
    cell(sdxl_model, sample, MIXED)
    assert not torch.equal(sample(sdxl_model), sampler_of(prompt(1), prompt(9))(sdxl_model))


@pytest.fixture(scope="module")
def gligen(host, generated, sd15_model):
    """A GLIGEN of the host with a gated attention for each transformer of `sd15_model`, weights generated."""
    module = importlib.import_module("comfy.gligen")
    places = [part for part in sd15_model.model.diffusion_model.modules() if hasattr(part, "transformer_blocks")]
    widths = [place.norm.num_channels for place in places]
    gates = [module.GatedSelfAttentionDense(width, 32, 4, width // 4) for width in widths]
    network = generated(module.Gligen(gates, module.PositionNet(32, 32), 32), 31)
    cpu = torch.device("cpu")
    return host.comfy.model_patcher.ModelPatcher(network, load_device=cpu, offload_device=cpu)


@pytest.fixture(scope="module")
def boxes():
    rng = torch.Generator().manual_seed(4)  # embedding, height, width, y, x, in latent pixels
    return [(torch.randn(1, 32, generator=rng), 8, 8, 0, 0), (torch.randn(1, 32, generator=rng), 8, 6, 8, 4)]


@pytest.mark.matrix("Conditioning", "GLIGEN boxes")
def test_gligen_keeps_the_laws(prompt, sampler_of, cell, sd15_model, gligen, boxes):
    positive = [[tokens, {**more, "gligen": ("position", gligen, boxes)}] for tokens, more in prompt(1)]
    sample = sampler_of(positive, prompt(9))
    cell(sd15_model, sample, MIXED)
    assert not torch.equal(sample(sd15_model), sampler_of(prompt(1), prompt(9))(sd15_model))


@torch.no_grad()
def test_gligen_finds_its_own_transformers_on_partial_steps(prompt, noise, sd15_model, gligen, boxes):
    network = sd15_model.model.diffusion_model
    patch = gligen.model.set_position(noise.shape, boxes, noise.device)

    def call(**patches):
        options = {"cond_or_uncond": [0], "patches": patches}
        return NetworkCall(noise, torch.full((1,), 500.0), prompt(1)[0][0], options=options)

    assert not torch.equal(call(middle_patch=[patch]).run(network._forward), call().run(network._forward))
    for depth in range(1, block_count(network)):
        full, feature = full_pass(network, call(middle_patch=[patch]), network._forward, depth)
        assert torch.equal(partial_pass(network, call(middle_patch=[patch]), depth, feature), full), depth


@pytest.fixture(scope="module")
def windowed(extra, sd15_model):
    """A function of a context schedule that returns `sd15_model` seeing 12 of 32 columns of the latent at a time."""
    context = extra("context_windows", "ContextWindowsManualNode")
    plain_noise = {"freenoise": False} if "freenoise" in inspect.signature(context).parameters else {}

    def make(schedule):
        return context(sd15_model, 12, 4, schedule, 1, schedule == "looped_uniform", "pyramid", 3, **plain_noise)[0]

    return make


@pytest.mark.matrix("Conditioning", "context windows, {schedule}")
@pytest.mark.parametrize("schedule", ["standard_static", "batched"])
def test_context_windows_that_stay_keep_the_laws(prompt, sampler_of, cell, windowed, schedule):
    sample = sampler_of(prompt(1), prompt(9), noise=torch.randn(1, 4, 16, 32, generator=torch.Generator().manual_seed(0)))
    report = cell(windowed(schedule), sample, MIXED)
    assert "ran in full" not in str(report)
    assert report.steps[1].network_calls > 1


@pytest.mark.matrix("Conditioning", "context windows, {schedule}")
@pytest.mark.parametrize("schedule", ["standard_uniform", "looped_uniform"])
def test_context_windows_that_move_run_new_ones_in_full(prompt, sampler_of, cell, windowed, schedule):
    sample = sampler_of(prompt(1), prompt(9), noise=torch.randn(1, 4, 16, 32, generator=torch.Generator().manual_seed(0)))
    does = "a partial step to which the windows have moved runs in full"
    report = cell(windowed(schedule), sample, "F|FPPPN@2", ran="FFPPFN", does=does)
    assert report.steps[4].fallbacks == ("no deep feature kept for this conditioning, shape and segment",)
