"""A timm model from its configuration."""

import difflib

import timm

from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError

from .stages import StagedModel, staged


def build_model(config: Config) -> StagedModel:
    """The configured network, randomly initialised (seed first), on the CPU.

    Raises:
        UserError: timm knows no such model, or the model takes no such arguments.
    """
    name = config.model.name
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise UserError(f"model.name: timm {timm.__version__} knows no model {name!r}{hint}")
    arguments = {
        "num_classes": config.model.num_classes,
        "drop_rate": config.model.drop_rate,
        "drop_path_rate": config.model.drop_path_rate,
        **config.model.kwargs,
    }
    try:
        model = timm.create_model(name, pretrained=False, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"model: timm could not build {name} with {arguments}: {error}") from error
    return staged(model)
