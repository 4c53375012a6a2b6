"""Weights that a training starts from: a model's own of timm's hub, or a file, whoever has written it.

A head of another size is new, positions are resampled by timm, and whoever asks is told which tensors were not loaded.
"""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ssam_scale.errors import UserError

_LEAST = 0.5  # of a network's numbers: a file that has fewer of them is another network's


@dataclass(frozen=True)
class Loaded:
    """What became of the tensors of a file of weights.

    Attributes:
        source: where they come from.
        tensors: how many of the network were loaded.
        new: names of those that were not, of the network.
        unused: names of what else the file has.
        colours: mean and deviation of RGB in [0, 1] that images were normalised by; None: it is not known.
    """

    source: str
    tensors: int
    new: tuple[str, ...]
    unused: tuple[str, ...]
    colours: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def note(self, mean: tuple[float, ...], std: tuple[float, ...]) -> str | None:
        """What to know of images that are normalised by these; None: nothing."""
        if self.colours is None or self.colours == (mean, std):
            return None
        theirs = f"data.mean={list(self.colours[0])} and data.std={list(self.colours[1])}"
        return f"weights from {self.source} were trained with {theirs}, and here images are normalised otherwise"

    def __str__(self) -> str:
        parts = [f"{self.tensors} tensors from {self.source}"]
        if self.new:
            parts.append(f"new: {_few(self.new)}")
        if self.unused:
            parts.append(f"not used of it: {_few(self.unused)}")
        return "; ".join(parts)


def load_pretrained(model: nn.Module, place: Path | None) -> Loaded:
    """Overwrite the weights of a model of timm's.

    Args:
        model: on the CPU.
        place: a .safetensors file, one of `torch.save`, or a folder with one of a checkpoint of ours or of a hub; None:
            the weights that timm has for the model's name and tag, from the hub's cache or the hub.

    Raises:
        UserError: there is none, it cannot be read, holds something else, or weights of another network.
    """
    source, tensors = _of_hub(model) if place is None else _of_file(place)
    offset = int(config_of(model).get("label_offset") or 0) if place is None else 0
    given = _filtered(_unwrapped(tensors), model, source)
    own = model.state_dict()
    if offset:  # of a class for what is none of the others
        given = {k: v[offset:] if k in own and len(v) == len(own[k]) + offset else v for k, v in given.items()}
    fitting = {name: given[name] for name, tensor in own.items() if name in given and given[name].shape == tensor.shape}
    _check_it_is_this_network(model, own, given, fitting, source)
    model.load_state_dict(fitting, strict=False)
    new = tuple(name for name in own if name not in fitting and not name.endswith("num_batches_tracked"))
    config = config_of(model)
    colours = (tuple(config["mean"]), tuple(config["std"])) if place is None and config.get("mean") else None
    return Loaded(source, len(fitting), new, tuple(name for name in given if name not in own), colours)


def _of_hub(model: nn.Module) -> tuple[str, Mapping[str, Any]]:
    """The weights of a model's name and tag, and what they are called."""
    from timm.models import load_state_dict_from_hf

    config = config_of(model)
    architecture, tag = config.get("architecture"), config.get("tag")
    name = f"{architecture}.{tag}" if tag and tag != "untrained" else str(architecture)
    hub, url = config.get("hf_hub_id"), str(config.get("url") or "")
    if not hub and not url:
        tags = [known for known in timm.list_pretrained(f"{architecture}.*") if known != name]
        hint = f"there are {', '.join(tags[:4])}" if tags else "give a file: model.pretrained=PATH"
        raise UserError(f"model.pretrained: timm {timm.__version__} has no weights for {name}; {hint}")
    try:
        if hub:
            file = config.get("hf_hub_filename")
            return f"{hub} of the hub", load_state_dict_from_hf(hub, *([file] if file else []), weights_only=True)
        found = torch.hub.load_state_dict_from_url(url, map_location="cpu", progress=False, weights_only=True)
        return f"{url}", found
    except Exception as error:  # of the hub, of the network, of the disk: each library has its own
        reason = str(error).strip().splitlines()
        how = (
            f"`hf download {hub}` where there is one fills $HF_HOME (~/.cache/huggingface), which can be copied here"
            if hub
            else f"{url} belongs into $TORCH_HOME/hub/checkpoints (~/.cache/torch)"
        )
        raise UserError(
            f"model.pretrained: the weights of {name} are not in the cache, and could not be downloaded "
            f"({type(error).__name__}{': ' + reason[0] if reason else ''}); {how}; or give a file: "
            "model.pretrained=PATH"
        ) from error


_IN_FOLDERS = ("model.safetensors", "pytorch_model.bin", "checkpoint.pth")


def _of_file(place: Path) -> tuple[str, Mapping[str, Any]]:
    """What a file holds, and its name."""
    path = place
    if place.is_dir():
        inside = [place / name for name in _IN_FOLDERS if (place / name).is_file()]
        if not inside:
            hint = ""
            if list(place.glob("model.rank_*.safetensors")):
                hint = f"; `ssam-scale consolidate {place}` makes one of this sharded checkpoint"
            raise UserError(f"model.pretrained {place}: a folder without {' or '.join(_IN_FOLDERS)}{hint}")
        path = inside[0]
    if not path.is_file():
        raise UserError(f"model.pretrained {place}: no such file")
    try:
        if path.suffix == ".safetensors":
            return str(path), load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"model.pretrained {path}: holds more than tensors, and what else a file may do when it is read is not "
            "risked; save its weights alone: torch.save(model.state_dict(), PATH)"
        ) from error
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"model.pretrained {path}: cannot be read as weights ({reason}); copy it again") from error
    if not isinstance(found, Mapping):
        raise UserError(f"model.pretrained {path}: holds a {type(found).__name__}, and tensors by name are needed")
    return str(path), found


# What trainers keep weights under, the best first: averaged ones before raw ones, DINO's teacher before its student.
_WRAPPINGS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict", "model", "teacher", "student")
# What wrappers put before the names of all tensors that count.
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "network.")


def _unwrapped(found: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by their names in the network, as far as that is the same for all networks."""
    while inner := next((found[key] for key in _WRAPPINGS if isinstance(found.get(key), Mapping)), None):
        found = inner
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    changed = True
    while changed and tensors:
        changed = False
        for prefix in _PREFIXES:
            # Where what is left has a name in it: "model.0.weight" of a `Sequential` is not a wrapped "0.weight".
            those = [name for name in tensors if name.startswith(prefix) and not name[len(prefix) :][0].isdigit()]
            if len(those) > len(tensors) // 2:
                kept = {name.removeprefix(prefix): tensors[name] for name in those}
                tensors = {**{name: value for name, value in tensors.items() if name not in those}, **kept}
                changed = True
    return _from_torchvisions_vit(tensors)


_OF_TORCHVISIONS_VIT = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$|^pos_embedding$", "pos_embed"),
    (r"^(?:encoder\.)?layers\.encoder_layer_(\d+)\.ln_(\d)\.", r"blocks.\1.norm\2."),
    (r"^(?:encoder\.)?layers\.encoder_layer_(\d+)\.self_attention\.in_proj_(weight|bias)$", r"blocks.\1.attn.qkv.\2"),
    (r"^(?:encoder\.)?layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"^(?:encoder\.)?layers\.encoder_layer_(\d+)\.mlp\.(?:0|linear_1)\.", r"blocks.\1.mlp.fc1."),
    (r"^(?:encoder\.)?layers\.encoder_layer_(\d+)\.mlp\.(?:3|linear_2)\.", r"blocks.\1.mlp.fc2."),
    (r"^(?:encoder\.)?ln\.", "norm."),
    (r"^heads\.head\.", "head."),
)


def _from_torchvisions_vit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names, where these are torchvision's of a vision transformer; its ResNets have timm's."""
    if "conv_proj.weight" not in tensors:
        return tensors
    result = {}
    for name, tensor in tensors.items():
        for pattern, timms in _OF_TORCHVISIONS_VIT:
            name = re.sub(pattern, timms, name)
        result[name] = tensor
    return result


def _filtered(tensors: dict[str, Tensor], model: nn.Module, source: str) -> dict[str, Tensor]:
    """By what timm does to files of other makers for this family: other names, resampled positions."""
    module = sys.modules[type(model).__module__]
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if {name: tensor.shape for name, tensor in tensors.items()} == own:
        return tensors
    for name in ("checkpoint_filter_fn", "_filter_fn", "_checkpoint_filter_fn"):
        if (filter_fn := getattr(module, name, None)) is not None:
            try:
                return dict(filter_fn(dict(tensors), model))
            except (KeyError, RuntimeError, ValueError, AssertionError, TypeError, IndexError, AttributeError) as error:
                raise UserError(
                    f"model.pretrained {source}: timm takes it for no weights of {type(model).__name__} "
                    f"({type(error).__name__}: {error})"
                ) from error
    return tensors


def _check_it_is_this_network(
    model: nn.Module,
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    fitting: Mapping[str, Tensor],
    source: str,
) -> None:
    share = sum(tensor.numel() for tensor in fitting.values()) / max(1, sum(tensor.numel() for tensor in own.values()))
    heads = _heads(model)
    other_shape = [
        f"{name} {_shape(given[name])} here {_shape(tensor)}"
        for name, tensor in own.items()
        if name in given and name not in fitting and not name.startswith(heads)
    ]
    if share >= _LEAST and not other_shape:
        return
    if other_shape:
        why = f"{len(other_shape)} tensors have other shapes: {_few(other_shape)}"
    else:
        why = f"it has {share:.0%} of the network's numbers; it begins with {_few(tuple(given)[:3]) or 'nothing'}"
    raise UserError(f"model.pretrained {source}: weights of another network ({why}); set model.name to that")


def config_of(model: nn.Module) -> dict[str, Any]:
    """What timm says of a model's weights."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return dict(config)


def _heads(model: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names of the classifiers' tensors."""
    classifiers = config_of(model).get("classifier") or ()
    names = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    return tuple(f"{name}." for name in (*names, "head", "fc", "classifier"))


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a number"


def _few(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
