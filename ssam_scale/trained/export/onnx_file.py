"""A network as ONNX, for ONNX Runtime and whatever else reads it."""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ssam_scale.errors import UserError
from ssam_scale.trained.network import Trained

from .description import described
from .torch_export import reason

_LARGEST = 2**31
"""Bytes of a file of ONNX: protobuf's limit."""


def _is_there(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ModuleNotFoundError:
        return False
    return True


@contextmanager
def _attention_written_out(network: nn.Module) -> Iterator[None]:
    """Within, timm's attention is products and a softmax: not every fused one can be taken apart by the exporter."""
    fused = [module for module in network.modules() if getattr(module, "fused_attn", False) is True]
    for module in fused:
        module.fused_attn = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True  # type: ignore[assignment]


class OnnxFile:
    """An `.onnx` file: `images` float32 [batch, 3, side, side] to `logits` float32 [batch, classes]. A `Format`."""

    is_folder = False
    tolerance = 1e-4
    """fp32 by the kernels of another library."""

    def check(self) -> None:
        """What writes it, and what reads it back."""
        if missing := [name for name in ("onnx", "onnxruntime", "onnxscript") if not _is_there(name)]:
            raise UserError(f"--format onnx: {', '.join(missing)} not installed; pip install 'ssam_scale[onnx]'")

    def write(self, trained: Trained, place: Path) -> None:
        """See `Format`; with the description among the model's metadata."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in trained.network.state_dict().values())
        if size >= _LARGEST:
            raise UserError(f"--format onnx: weights of {size:,} bytes, and a file of ONNX has less than {_LARGEST:,}")
        side = trained.config.data.eval_resolution
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings(), _attention_written_out(trained.network):
                warnings.simplefilter("ignore")  # of what the exporter does inside
                program = torch.onnx.export(
                    trained.network,
                    (torch.zeros(2, 3, side, side),),
                    dynamo=True,
                    verbose=False,
                    input_names=["images"],
                    output_names=["logits"],
                    dynamic_shapes=({0: torch.export.Dim("batch")},),
                )
        except ModuleNotFoundError:
            raise
        except Exception as error:  # of every kind
            raise UserError(f"--format onnx: {reason(error, trained)}") from error
        assert program is not None
        for key, value in described(trained).items():
            program.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
        program.save(place, external_data=False)

    def logits(self, place: Path, images: Tensor) -> Tensor:
        """By ONNX Runtime."""
        import onnxruntime

        session = onnxruntime.InferenceSession(place, providers=["CPUExecutionProvider"])
        [found] = session.run(["logits"], {"images": images.numpy()})
        return torch.from_numpy(found)
