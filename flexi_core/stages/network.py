"""Stage models: one encoder, and a decoder of its own width for each stretch of noise levels (Zhang et al., 2023, Section 4).

Time embedding and input blocks are a base network's; a stage has output blocks and an output layer of its own, and may have a
middle block of its own. The skips are concatenated as they are. The network's own `_forward` runs, on a shallow view of it, in
the embedded runtime and in the host alike; the modules of a decoder are made by the `Parts` of either.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import FlexiError
from ..json_text import parse_json
from ..runtime.unet import GROUPS
from ..runtime.unet_config import unet_arguments
from ..tensor_files import save_tensors
from .bounds import Stages

FORMAT, VERSION = "flexiffusion-stages", 1
MOST_STAGES, MOST_WIDTH = 16, 4096
_LONGEST = 100_000  # characters of a part of the metadata
_MOST_NESTED = 8
_METADATA = ("stages", "unet_config", "base_architecture", "base_weights", "middle")


class Parts(Protocol):
    """Makes the modules of a runtime's decoder; they have the runtime's own classes, which its forward knows."""

    def residual(self, channels: int, out: int) -> nn.Module: ...

    def transformer(self, channels: int, heads: int, dim_head: int, depth: int) -> nn.Module: ...

    def upsample(self, channels: int) -> nn.Module: ...

    def out(self, channels: int, out: int) -> nn.Module: ...

    def block(self, layers: Sequence[nn.Module]) -> nn.Module: ...


# (arguments of the base's U-Net, groups of a normalisation by its channels) -> parts
PartsMaker = Callable[[Mapping[str, Any], Callable[[int], int]], Parts]


def groups_of(width: int, base_width: int) -> Callable[[int], int]:
    """Return how many groups the normalisations of a decoder have, by their channels.

    A decoder of the base's width has the layout's 32. In others there are as many as divide the channels with two or more in a
    group: 32 cannot serve a width of 16, and a group of one channel is blind to its mean.
    """
    if width == base_width:
        return lambda channels: GROUPS
    return lambda channels: max(n for n in range(1, GROUPS + 1) if channels % n == 0 and (channels >= 2 * n or n == 1))


def skip_channels(arguments: Mapping[str, Any]) -> list[int]:
    """Return the channels of each input block's result, which an output block takes as its skip, the last one first."""
    base, mults = arguments["model_channels"], arguments["channel_mult"]
    found = [base]
    for level, mult in enumerate(mults):
        found += [mult * base] * (arguments["num_res_blocks"][level] + (level != len(mults) - 1))
    return found


def make_decoder(parts_of: PartsMaker, arguments: Mapping[str, Any], width: int, own_middle: bool) -> nn.Module:
    """Return a decoder, with weights to be loaded, as a module whose children take the places of the base's.

    Args:
        parts_of: the runtime's.
        arguments: of the base's U-Net (`unet_arguments`).
        width: of its shallowest level; the levels below are multiplied as the base's are.
        own_middle: whether it has a middle block, of the base's width.

    Raises:
        FlexiError: attention heads do not fit into the width.
    """
    base, mults = arguments["model_channels"], arguments["channel_mult"]
    parts = parts_of(arguments, groups_of(width, base))

    def transformer(channels: int, depth: int) -> nn.Module:
        heads, head = arguments["num_heads"], arguments["num_head_channels"]
        heads, head = (heads, channels // heads) if head == -1 else (channels // head, head)
        if heads * head != channels or not heads:
            raise FlexiError(f"a decoder of width {width} has {channels} channels, which attention heads of {head} do not fit")
        return parts.transformer(channels, heads, head, depth)

    skips, ch = skip_channels(arguments), mults[-1] * base
    made = nn.Module()
    if own_middle:
        own = parts_of(arguments, groups_of(base, base))
        middle = [own.residual(ch, ch)]
        if (depth := arguments["transformer_depth_middle"]) >= 0:
            heads, head = arguments["num_heads"], arguments["num_head_channels"]
            heads, head = (heads, ch // heads) if head == -1 else (ch // head, head)
            middle += [own.transformer(ch, heads, head, depth), own.residual(ch, ch)]
        made.middle_block = own.block(middle)
    depths, blocks = list(arguments["transformer_depth_output"]), []
    for level, mult in reversed(list(enumerate(mults))):
        for i in range(arguments["num_res_blocks"][level] + 1):
            layers = [parts.residual(ch + skips.pop(), mult * width)]
            ch = mult * width
            if depth := depths.pop():
                layers.append(transformer(ch, depth))
            if level and i == arguments["num_res_blocks"][level]:
                layers.append(parts.upsample(ch))
            blocks.append(parts.block(layers))
    made.output_blocks = nn.ModuleList(blocks)
    made.out = parts.out(ch, arguments["out_channels"])
    return made


def with_decoder(network: nn.Module, decoder: nn.Module) -> nn.Module:
    """Return a shallow view of a network whose deep-to-shallow half is a decoder; the network stays as it is."""
    view = copy.copy(network)
    view._modules = {**network._modules, **decoder._modules}
    return view


@dataclass(frozen=True)
class StageFile:
    """What a stage file says; see `load_stages`.

    Args:
        path: of the file.
        stages: its boundaries and names.
        widths: of the decoders, from high noise to low.
        own_middle: whether each stage has a middle block.
        arguments: of the base's U-Net.
        base: fingerprints of the base, "architecture" and "weights".
        licence: of the decoders.
    """

    path: Path
    stages: Stages
    widths: tuple[int, ...]
    own_middle: bool
    arguments: Mapping[str, Any] = field(repr=False)
    base: Mapping[str, str]
    licence: str = ""

    def check_base(self, architecture: str, weights: str) -> None:
        """Refuse another base than the one that the decoders were trained on.

        Raises:
            FlexiError: a fingerprint differs.
        """
        for what, found in (("architecture", architecture), ("weights", weights)):
            if self.base[what] != found:
                raise FlexiError(
                    f"{self.path}: its decoders are for a base of other {what} ({self.base[what]}, this one's are {found}); "
                    "give the model that they were trained on"
                )

    def decoders(self, parts_of: PartsMaker) -> list[nn.Module]:
        """Return the decoders with their weights.

        Raises:
            FlexiError: a tensor is missing, superfluous, or of another shape.
        """
        try:
            with torch.device("meta"):
                made = [make_decoder(parts_of, self.arguments, width, self.own_middle) for width in self.widths]
            wanted = {f"stages.{i}.{name}": value.shape for i, m in enumerate(made) for name, value in m.state_dict().items()}
            with safe_open(self.path, framework="pt") as file:
                given = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no dict)
                wrong = sorted(name for name in {*wanted, *given} if wanted.get(name) != given.get(name))
                if wrong:
                    name = wrong[0]
                    raise FlexiError(
                        f"{len(wrong)} tensors do not fit its widths, {name} first: expected "
                        f"{list(wanted[name]) if name in wanted else 'none'}, it has "
                        f"{list(given[name]) if name in given else 'none'}"
                    )
                for i, decoder in enumerate(made):
                    own = {name: file.get_tensor(f"stages.{i}.{name}") for name in decoder.state_dict()}
                    decoder.load_state_dict({name: value.float() for name, value in own.items()}, assign=True)
        except FlexiError as error:
            raise FlexiError(f"{self.path}: {error}") from error
        except (OSError, SafetensorError) as error:
            raise FlexiError(f"{self.path}: cannot be read ({error})") from error
        return [decoder.eval().requires_grad_(False) for decoder in made]


def save_stages(
    path: Path,
    stages: Stages,
    decoders: Sequence[nn.Module],
    unet_config: Mapping[str, Any],
    base: Mapping[str, str],
    licence: str = "",
) -> None:
    """Write a stage file (docs/guide/stages.md).

    Args:
        path: .safetensors.
        stages: boundaries and names.
        decoders: one for each, from high noise to low.
        unet_config: of the base, as the host's `UNetModel` takes it.
        base: fingerprints of the base, "architecture" and "weights".
        licence: in words.
    """
    ends = [None, *stages.boundaries, 0.0]
    described = [
        {"name": name, "below": ends[i], "above": ends[i + 1], "width": decoders[i].out[0].num_channels}
        for i, name in enumerate(stages.names)
    ]
    # Copies: decoders may share what they have not trained.
    tensors = {f"stages.{i}.{name}": value.clone() for i, m in enumerate(decoders) for name, value in m.state_dict().items()}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "stages": json.dumps(described),
        "unet_config": json.dumps(dict(unet_config)),
        "base_architecture": base["architecture"],
        "base_weights": base["weights"],
        "middle": "own" if hasattr(decoders[0], "middle_block") else "shared",
        "licence": licence,
    }
    save_tensors(tensors, path, metadata)


def load_stages(path: Path) -> StageFile:
    """Return what a stage file says; its weights are read by `StageFile.decoders`.

    Raises:
        FlexiError: it cannot be read, is of another format or a newer version, or its stages leave a gap, overlap, or have
            widths that are none.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise FlexiError(f"{path}: cannot be read as a stage file ({error})") from error
    try:
        if metadata.get("format") != FORMAT:
            raise FlexiError(f"its format is {metadata.get('format', 'missing')!r}; expected {FORMAT!r}")
        if metadata.get("version") != str(VERSION):
            raise FlexiError(f"its version is {metadata.get('version')!r}; this pack reads {VERSION}: update the node pack")
        if missing := [name for name in _METADATA if name not in metadata]:
            raise FlexiError(f"its metadata lack {', '.join(missing)}; docs/guide/stages.md")
        if metadata["middle"] not in ("shared", "own"):
            raise FlexiError(f"its middle is {metadata['middle']!r}; expected shared or own")
        arguments = unet_arguments(_parsed(metadata, "unet_config", dict))
        stages, widths = _stages(_parsed(metadata, "stages", list))
    except FlexiError as error:
        raise FlexiError(f"{path}: {error}") from error
    base = {"architecture": metadata["base_architecture"], "weights": metadata["base_weights"]}
    return StageFile(Path(path), stages, widths, metadata["middle"] == "own", arguments, base, metadata.get("licence", ""))


def _parsed(metadata: Mapping[str, str], name: str, kind: type) -> Any:
    text = metadata[name]
    try:
        value = parse_json(text.encode(), _MOST_NESTED) if len(text) <= _LONGEST else None
    except ValueError as error:
        raise FlexiError(f"its {name} is no JSON ({error})") from error
    if not isinstance(value, kind):
        raise FlexiError(f"its {name} is no JSON {kind.__name__}, or longer than {_LONGEST} characters")
    return value


def _stages(described: Sequence[Any]) -> tuple[Stages, tuple[int, ...]]:
    if not 1 <= len(described) <= MOST_STAGES:
        raise FlexiError(f"it has {len(described)} stages; expected 1 to {MOST_STAGES}")
    last, names, bounds, widths = math.inf, [], [], []
    for i, stage in enumerate(described):
        if not isinstance(stage, dict) or not {"name", "below", "above", "width"} <= stage.keys():
            raise FlexiError(f"stage {i + 1} lacks name, below, above or width")
        below, above, width = math.inf if stage["below"] is None else stage["below"], stage["above"], stage["width"]
        if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in (below, above)):
            raise FlexiError(f"stage {i + 1} lies below {below!r} and above {above!r}; expected noise levels")
        if below != last:
            kind = "a gap" if below < last else "an overlap"
            raise FlexiError(f"stage {i + 1} begins below {below:g}, where the stages before end at {last:g}: {kind}")
        if not 0 <= above < below or (above == 0) != (i == len(described) - 1):
            raise FlexiError(f"stage {i + 1} lies below {below:g} and above {above:g}; stages fall, the last one to 0")
        if not isinstance(width, int) or isinstance(width, bool) or not 1 <= width <= MOST_WIDTH:
            raise FlexiError(f"stage {i + 1} has the width {width!r}; expected 1 to {MOST_WIDTH} channels")
        last = above
        names.append(str(stage["name"]))
        bounds.append(float(above))
        widths.append(width)
    return Stages(tuple(bounds[:-1]), tuple(names)), tuple(widths)
