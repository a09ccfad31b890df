"""Any small LDM-layout U-Net in one file: weights, what they are, a table of classes (docs/guide/unet-file.md)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..demo.model import BETA_SCHEDULE, PREDICTIONS, SmallModel, training_sigmas
from ..errors import FlexiError
from ..json_text import parse_json
from ..tensor_files import save_tensors
from .unet import SpatialTransformer, UNet
from .unet_config import unet_arguments

CLASS_TABLE = "class_embedding.weight"
_METADATA = ("unet_config", "prediction", "beta_schedule")
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # of the host's checkpoints
_LARGEST_SIDE = 1024
_LONGEST_CONFIG = 100_000  # characters
_MOST_NESTED = 8
_MOST_BYTES = 8 * 2**30
_NAMED = 3  # tensors that a message lists


class FileModel(SmallModel):
    """A U-Net from a file, conditioned on classes or on nothing.

    Args:
        unet, sigmas, prediction, latent_shape: as in `SmallModel`.
        class_table: tokens of the classes, the last of no class [classes + 1, context_dim]; None without conditioning.
        path: of the file.
        beta_schedule: that the noise levels are of.
        precision: in which the file has the weights; they are computed with in float32.
        unet_config: the arguments that the network was made with, also the host's.
    """

    def __init__(
        self,
        unet: UNet,
        sigmas: torch.Tensor,
        prediction: str,
        latent_shape: tuple[int, int, int],
        class_table: torch.Tensor | None,
        path: Path,
        beta_schedule: str,
        precision: str,
        unet_config: dict[str, Any],
    ) -> None:
        super().__init__(unet, sigmas, prediction, latent_shape)
        self.class_table, self.path, self.beta_schedule, self.precision = class_table, path, beta_schedule, precision
        self.unet_config = unet_config

    @classmethod
    def load(cls, path: Path, size: Sequence[int] | None = None) -> FileModel:
        """Return the model of a file.

        Args:
            path: safetensors.
            size: height and width of the latents; by default what the file says.

        Raises:
            FlexiError: the file cannot be read, or is not in the format.
        """
        metadata, shapes = _described(path)
        try:
            arguments = unet_arguments(config := _config(metadata["unet_config"]))
            if metadata["prediction"] not in PREDICTIONS:
                raise FlexiError(f"the prediction is {metadata['prediction']!r}; known: {', '.join(PREDICTIONS)}")
            sigmas = training_sigmas(metadata["beta_schedule"])
            table_shape = shapes.pop(CLASS_TABLE, None)
            with torch.device("meta"):
                unet = UNet(**arguments)
            _check_weights(unet, shapes)
            _check_conditioning(unet, table_shape, arguments["context_dim"])
            height, width = _size(size, metadata, config)
            weights, precision = _weights(path)
        except FlexiError as error:
            raise FlexiError(f"{path}: {error}") from error
        table = weights.pop(CLASS_TABLE, None)
        unet.load_state_dict(weights, assign=True)
        return cls(
            unet.eval().requires_grad_(False),
            sigmas,
            metadata["prediction"],
            (arguments["in_channels"], height, width),
            table,
            path,
            metadata["beta_schedule"],
            precision,
            arguments,
        )

    @classmethod
    def untrained(cls, unet_config: Mapping[str, Any], size: Sequence[int], path: Path) -> FileModel:
        """Return a model whose U-Net has not been trained, eps-predicting, of Stable Diffusion's noise levels, for `save`.

        Args:
            unet_config: the arguments of the host's `UNetModel`.
            size: height and width of the latents.
            path: of the file to be.

        Raises:
            FlexiError: an argument is missing or not known, or the network needs a condition.
        """
        arguments = unet_arguments(unet_config)
        unet = UNet(**arguments)
        _check_conditioning(unet, None, arguments["context_dim"])
        shape = (arguments["in_channels"], *size)
        sigmas = training_sigmas(BETA_SCHEDULE)
        return cls(unet, sigmas, "eps", shape, None, path, BETA_SCHEDULE, "float32", arguments)

    def save(self, path: Path, unet: UNet, **metadata: str) -> None:
        """Write the model's file, in float32.

        Args:
            path: safetensors.
            unet: in place of the model's own.
            metadata: more of it.
        """
        tensors = dict(unet.state_dict())
        if self.class_table is not None:
            tensors[CLASS_TABLE] = self.class_table
        size = " ".join(map(str, self.latent_shape[1:]))
        own = {"unet_config": json.dumps(self.unet_config), "prediction": self.prediction, "sample_size": size}
        save_tensors(tensors, path, {**metadata, **own, "beta_schedule": self.beta_schedule})

    @property
    def classes(self) -> int:
        """How many classes it knows; 0 without conditioning."""
        return 0 if self.class_table is None else len(self.class_table) - 1

    def conditioning(self, prompts: Sequence[int] | None, count: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the token of each class number, and that of no class [count, 1, D]; None and None without conditioning."""
        if self.class_table is None:
            return None, None
        none = [self.classes] * count
        return tuple(self.class_table[list(labels)][:, None] for labels in (none if prompts is None else prompts, none))


def parse_size(text: str) -> tuple[int, int]:
    """Return height and width of `S`, `H W` or `HxW`.

    Raises:
        FlexiError: the text has another form, or a side is not 1 to 1024.
    """
    found = re.fullmatch(r"(\d{1,4})(?:[x ](\d{1,4}))?", text.strip().lower())
    height, width = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= min(height, width) <= max(height, width) <= _LARGEST_SIDE:
        raise FlexiError(f"the size is {text!r}; expected S or HxW in the latents' own pixels, each 1 to {_LARGEST_SIDE}")
    return height, width


def _described(path: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Return a file's metadata and the shapes of its tensors, of which none is read."""
    if not path.is_file():
        raise FlexiError(f"{path}: there is no such file; give a U-Net's safetensors file")
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise FlexiError(f"{path}: {size / 2**30:.1f} GiB; at most {_MOST_BYTES >> 30} GiB are searched without a host")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            shapes = {_plain(name): tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (OSError, SafetensorError) as error:
        raise FlexiError(
            f"{path}: not a safetensors file ({error}); a pickled checkpoint (.pt, .ckpt) is not opened, save it as safetensors"
        ) from error
    if missing := [name for name in _METADATA if name not in metadata]:
        raise FlexiError(f"{path}: its metadata lack {', '.join(missing)}; docs/guide/unet-file.md shows how to write them")
    return metadata, shapes


def _weights(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Return the tensors of a file in float32, and what they were stored in."""
    try:
        with safe_open(path, framework="pt") as file:
            stored = {_plain(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (OSError, SafetensorError) as error:
        raise FlexiError(f"its tensors cannot be read ({error})") from error
    weights = {name: value.float() for name, value in stored.items()}
    if spoiled := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise FlexiError(f"{_named(spoiled)}: some numbers are not finite; the file is damaged")
    return weights, str(stored["input_blocks.0.0.weight"].dtype).removeprefix("torch.")


def _plain(name: str) -> str:
    """Return a tensor's name without what the host's checkpoints put before it."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _config(text: str) -> dict[str, Any]:
    if len(text) > _LONGEST_CONFIG:
        raise FlexiError(f"its unet_config has {len(text)} characters; at most {_LONGEST_CONFIG} are read")
    try:
        config = parse_json(text.encode(errors="replace"), _MOST_NESTED)
    except ValueError as error:
        raise FlexiError(f"its unet_config is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise FlexiError(f"its unet_config is {type(config).__name__}; expected an object, arguments with values")
    return config


def _check_weights(unet: UNet, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors whose names or shapes are not the network's."""
    wanted = unet.state_dict()
    missing, unknown = sorted(wanted.keys() - shapes.keys()), sorted(shapes.keys() - wanted.keys())
    faults = [f"it lacks {_named(missing)}"] if missing else []
    faults += [f"it has {_named(unknown)}, which its unet_config does not"] if unknown else []
    if faults:
        raise FlexiError(f"the tensors are not those of the host's UNetModel: {'; '.join(faults)}")
    for name, shape in shapes.items():
        if shape != wanted[name].shape:
            raise FlexiError(f"{name} has shape {shape}; its unet_config asks for {tuple(wanted[name].shape)}")


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _check_conditioning(unet: UNet, table: tuple[int, ...] | None, context_dim: int | None) -> None:
    """Refuse a class table that the network cannot take, and a network that needs one that is not there."""
    transformers = [
        layer for layer in unet.modules() if isinstance(layer, SpatialTransformer) and len(layer.transformer_blocks)
    ]
    if table is None:
        # As in the host, cross-attention without a context attends to the features themselves, whose width then has to fit.
        if any(layer.proj_in.weight.shape[0] != context_dim for layer in transformers):
            raise FlexiError(f"it has cross-attention to tokens of width {context_dim} and no {CLASS_TABLE}; add the table")
        return
    if not transformers:
        raise FlexiError(f"it has {CLASS_TABLE} and no transformer that takes its tokens; leave the table out")
    if len(table) != 2 or table[0] < 2 or table[1] != context_dim:
        raise FlexiError(f"{CLASS_TABLE} has shape {table}; expected (classes + 1, {context_dim}), the last row uncond")


def _size(asked: Sequence[int] | None, metadata: Mapping[str, str], config: Mapping[str, Any]) -> tuple[int, int]:
    """Return height and width: those asked for, else the file's `sample_size`, else `image_size` of its unet_config."""
    if asked is not None:
        return parse_size(" ".join(map(str, asked)))
    stated = metadata.get("sample_size", config.get("image_size"))
    if stated is None:
        raise FlexiError("it says no size (sample_size in the metadata, or image_size in unet_config); give one, --size")
    return parse_size(" ".join(map(str, stated)) if isinstance(stated, list) else str(stated))
