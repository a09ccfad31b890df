"""What the pack costs in the host, and what its steps save, on networks of real size with random weights.

    python benchmarks/overhead.py --comfyui ~/comfy/ComfyUI                    # SD1.5 at 32x32 latents, CPU
    python benchmarks/overhead.py --network sd15 --size 64 --device cuda --dtype bf16

Five things in one process: all steps full with the node against no node (paired, alternating); the cost of a null step; the
cost of a partial step at every depth against its share of MACs; what a control net costs on partial steps; whole schedules,
measured speed-up over predicted. Tables are written to docs/results/.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from flexi_core import FlexiError, Schedule
from flexi_core.files import replace_file
from flexi_core.run.cost import predicted_speedup

RESULTS = Path(__file__).parents[1] / "docs" / "results"
CHECKOUT = Path.home() / "comfy" / "ComfyUI"
NETWORKS = {
    "sd15": ("SD15", {
        "model_channels": 320, "channel_mult": (1, 2, 4, 4), "num_res_blocks": [2, 2, 2, 2], "context_dim": 768,
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1] * 9 + [0] * 3,
        "transformer_depth_middle": 1, "num_heads": 8, "num_head_channels": -1, "use_linear_in_transformer": False,
    }),
    "sdxl": ("SDXL", {
        "model_channels": 320, "channel_mult": (1, 2, 4), "num_res_blocks": [2, 2, 2], "context_dim": 2048,
        "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10, "num_heads": -1, "num_head_channels": 64, "use_linear_in_transformer": True,
        "num_classes": "sequential", "adm_in_channels": 2816,
    }),
}  # fmt: skip
SCHEDULES = ("5*(FX)", "2*(FPPNN@3)", "2*(FPPPP@1)", "2*(F)|FPX@2|FPPXX@4", "F|FXXXXXXXX")  # 10 steps each
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_err = Console(stderr=True)


def main(
    comfyui: Annotated[Path, typer.Option(help="A ComfyUI checkout.")] = CHECKOUT,
    network: Annotated[str, typer.Option(help=f"One of {', '.join(NETWORKS)}.")] = "sd15",
    size: Annotated[int, typer.Option(help="Height and width of the latent.")] = 32,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "fp32",
    pairs: Annotated[int, typer.Option(min=1, help="Paired runs for the overhead.")] = 8,
    cfg: Annotated[float, typer.Option(help="Guidance scale; 1 runs the conditional half alone.")] = 1.0,
) -> None:
    """Measure, print and write the tables."""
    if network not in NETWORKS or dtype not in DTYPES:
        raise FlexiError(f"networks: {', '.join(NETWORKS)}; dtypes: {', '.join(DTYPES)}")
    bench = Bench(comfyui, network, size, device, DTYPES[dtype], cfg)
    text = "\n".join(
        [
            f"# {network}, {size}x{size} latent, {dtype} on {device_name(device)}",
            "",
            f"Made by `{' '.join(['python benchmarks/overhead.py', *sys.argv[1:]])}`.",
            *bench.overhead(pairs),
            *bench.null_step(),
            *bench.partial_steps(),
            *bench.control_net(),
            *bench.schedules(),
        ]
    )
    print(text)
    RESULTS.mkdir(exist_ok=True)
    with replace_file(RESULTS / f"overhead-{network}-{size}-{dtype}-{device}.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


class Bench:
    """A model in the host, and the tables about it."""

    def __init__(self, comfyui: Path, network: str, size: int, device: str, dtype: torch.dtype, cfg: float) -> None:
        if not (comfyui / "comfy" / "samplers.py").is_file():
            raise FlexiError(f"{comfyui} is no ComfyUI checkout; give one with --comfyui")
        sys.path.insert(0, str(comfyui))
        from comfy.cli_args import args

        args.cpu, args.use_pytorch_cross_attention = device == "cpu", True  # read when the host is imported
        import comfy.model_patcher
        import comfy.sample
        import comfy.supported_models

        from flexi_core import host

        self._host, self._comfy, self._device, self._cfg = host, comfy, torch.device(device), cfg
        kind, layout = NETWORKS[network]
        layout = {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "use_spatial_transformer": True,
            "legacy": False,
            **layout,
        }
        self._layout = layout
        config = getattr(comfy.supported_models, kind)({**layout, "dtype": dtype})
        config.set_inference_dtype(dtype, None)
        with torch.no_grad():
            inner = config.get_model({}, device=self._device).eval()
            generator = torch.Generator(self._device).manual_seed(0)
            for value in inner.diffusion_model.parameters():
                value.normal_(0, 0.02, generator=generator)
        self._model = comfy.model_patcher.ModelPatcher(inner, load_device=self._device, offload_device=self._device)
        rng = torch.Generator().manual_seed(1)
        pooled = {"pooled_output": torch.randn(1, 1280, generator=rng)} if kind == "SDXL" else {}
        tokens = (torch.randn(1, 77, layout["context_dim"], generator=rng) for _ in range(2))
        self._prompts = [[[context, pooled]] for context in tokens]
        self._noise = torch.randn(1, 4, size, size, generator=rng)

    def overhead(self, pairs: int) -> list[str]:
        """All steps full, with the node and without it."""
        patched, _ = self._host.apply_schedule(self._model, Schedule.parse("4*(F)"))
        ratios, with_node, without = [], [], []
        self._time(self._model, 2)
        for i in range(pairs):
            _err.print(f"all-full against no node: pair {i + 1} of {pairs}")
            order = (patched, self._model) if i % 2 else (self._model, patched)
            seconds = {id(model): self._time(model, 4) for model in order}
            with_node.append(seconds[id(patched)])
            without.append(seconds[id(self._model)])
            ratios.append(with_node[-1] / without[-1] - 1)
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        return [
            "",
            "## All steps full with the node against no node",
            "",
            "| | 4 steps, s (median) | more time: median | least to most |",
            "|-|-|-|-|",
            f"| no node | {statistics.median(without):.3f} | | |",
            f"| node | {statistics.median(with_node):.3f} | {middle:+.2%} | {low:+.2%} to {high:+.2%} of {pairs} pairs |",
        ]

    def null_step(self) -> list[str]:
        """An extrapolated step costs no network; a removed one costs nothing."""
        one, many = (self._run(text)[0] for text in ("F", "F|F" + "X" * 48))
        full = statistics.median(s.seconds for s in self._run("4*(F)")[1].steps)
        per_step = (many - one - full) / 48
        return [
            "",
            "## A null step",
            "",
            "| full step, ms | extrapolated step, ms | of a full step |",
            "|-|-|-|",
            f"| {1000 * full:.1f} | {1000 * per_step:.2f} | {per_step / full:.2%} |",
        ]

    def partial_steps(self) -> list[str]:
        """Every depth."""
        lines = ["", "## A partial step", "", "| depth | share of MACs | share of time | cache, MiB |", "|-|-|-|-|"]
        self._cost = self._run("2*(F)")[1].cost
        for depth in self._cost.partial_macs:
            _err.print(f"partial steps: depth {depth}")
            _, report = self._run(f"F|FPPP@{depth}")
            full = min(step.seconds for step in report.steps[:2])
            partial = min(step.seconds for step in report.steps[2:])
            share = self._cost.share(depth)
            lines.append(f"| {depth} | {share:.1%} | {partial / full:.1%} | {report.cache_mib:.1f} |")
        return lines

    def control_net(self) -> list[str]:
        """A control net of the network's own layout: every block on full steps, the first ones on partial steps."""
        from flexi_core.networks.controlnet import ShallowControl

        layout = {key: value for key, value in self._layout.items() if key not in ("out_channels", "transformer_depth_output")}
        import comfy.cldm.cldm
        import comfy.controlnet
        import comfy.ops

        dtype = self._model.model.get_dtype()
        network = comfy.cldm.cldm.ControlNet(
            hint_channels=3, **layout, dtype=dtype, device=self._device, operations=comfy.ops.disable_weight_init
        )
        with torch.no_grad():
            for value in network.parameters():
                value.normal_(0, 0.02)
        control = comfy.controlnet.ControlNet(network, load_device=self._device)
        control.set_cond_hint(torch.rand(1, 3, 8 * self._noise.shape[-1], 8 * self._noise.shape[-1]))
        sampling = self._model.get_model_object("model_sampling")
        control.pre_run(self._model.model, sampling.percent_to_sigma)
        x, sigma = self._noise.to(self._device), torch.ones(1, device=self._device)
        cond = {"c_crossattn": self._prompts[0][0][0].to(self._device)}
        if "adm_in_channels" in self._layout:
            cond["y"] = torch.zeros(1, self._layout["adm_in_channels"], device=self._device)

        def seconds(net: Any) -> float:
            best = float("inf")
            for _ in range(3):
                self._wait()
                began = time.perf_counter()
                with torch.inference_mode():
                    net.get_control(x, sigma, cond, 1, {})
                self._wait()
                best = min(best, time.perf_counter() - began)
            return best

        seconds(control)
        whole = seconds(control)
        lines = [
            "",
            "## A control net",
            "",
            "| on a | ms | of a full step's |",
            "|-|-|-|",
            f"| full step | {1000 * whole:.1f} | 100% |",
        ]
        for depth in range(1, min(len(network.input_blocks), 7)):
            shallow = seconds(ShallowControl(control, depth))
            lines.append(f"| partial step, depth {depth} | {1000 * shallow:.1f} | {shallow / whole:.1%} |")
        return lines

    def schedules(self) -> list[str]:
        """Whole runs."""
        lines = ["", "## Whole schedules", "", "| schedule | predicted | measured | measured / predicted |", "|-|-|-|-|"]
        for text in SCHEDULES:
            _err.print(f"schedule {text}")
            schedule = Schedule.parse(text)
            ratios = []
            for _ in range(3):
                full, fast = self._run(f"{len(schedule)}*(F)")[0], self._run(text)[0]
                ratios.append(full / fast)
            predicted, measured = predicted_speedup(schedule, self._cost), statistics.median(ratios)
            cell = text.replace("|", "\\|")  # a table's own mark
            lines.append(f"| `{cell}` | {predicted:.2f}x | {measured:.2f}x | {measured / predicted:.3f} |")
        return lines

    def _run(self, text: str) -> tuple[float, Any]:
        schedule = Schedule.parse(text)
        model, handle = self._host.apply_schedule(self._model, schedule)
        return self._time(model, len(schedule)), handle.report

    def _time(self, model: Any, steps: int) -> float:
        self._wait()
        began = time.perf_counter()
        with torch.inference_mode():
            self._comfy.sample.sample(
                model, self._noise, steps, self._cfg, "euler", "normal", *self._prompts, torch.zeros_like(self._noise),
                disable_pbar=True, seed=0,
            )  # fmt: skip
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def device_name(device: str) -> str:
    """Return what the tables were measured on."""
    return torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"


if __name__ == "__main__":
    try:
        typer.run(main)
    except FlexiError as error:
        raise SystemExit(str(error)) from error
