"""A folder that timm loads: `create_model("local-dir:FOLDER", pretrained=True)`, or from a hub once it is there."""

from __future__ import annotations

import json
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from ssam_scale.models.pretrained import config_of
from ssam_scale.trained.network import Trained

from .description import preprocessing

# Of what timm says of an architecture: where its first layer and classifier are, and whether images may have any size.
_OF_ARCHITECTURE = ("fixed_input_size", "first_conv", "classifier")


class TimmFolder:
    """`model.safetensors` and the `config.json` that timm's models have on the hub. A `Format`."""

    is_folder = True
    tolerance = 1e-6
    """The same operations: what is rounded otherwise is not the network's."""

    def check(self) -> None:
        """Nothing that would not be there."""

    def write(self, trained: Trained, place: Path) -> None:
        """See `Format`."""
        model, own = trained.config.model, config_of(trained.network)
        tensors = {name: tensor.contiguous().clone() for name, tensor in trained.network.state_dict().items()}
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        described = {
            "architecture": model.name.partition(".")[0],
            "num_classes": trained.classes,
            "num_features": trained.network.num_features,
            **({"label_names": trained.class_names} if len(trained.class_names) == trained.classes else {}),
            **({"model_args": model.kwargs} if model.kwargs else {}),
            "pretrained_cfg": {
                "custom_load": False,
                "num_classes": trained.classes,
                **preprocessing(trained),
                **{key: own[key] for key in _OF_ARCHITECTURE if key in own},
            },
        }
        (place / "config.json").write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def logits(self, place: Path, images: Tensor) -> Tensor:
        """By timm."""
        with torch.random.fork_rng(devices=[]):
            network = timm.create_model(f"local-dir:{place}", pretrained=True)
        found: Tensor = network.eval()(images)
        return found
