"""Models from disk or hub: the student in fp32, with its chat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from zppo.engines.chat import Chat
from zppo.errors import ModelError, SettingsError
from zppo.train.settings import ModelSettings

_FOLDERS: dict[str, Callable[[str], Path]] = {}


def register_models(scheme: str, folder: Callable[[str], Path]) -> None:
    """Makes `<scheme>:<rest>` the name of a model: `folder(rest)` is where its checkpoint lies. Storeys above come in this way."""
    _FOLDERS[scheme] = folder


def resolve_model(name: str) -> str:
    """What `from_pretrained` takes: a registered name's folder, else the name itself."""
    scheme, _, rest = name.partition(":")
    return str(_FOLDERS[scheme](rest)) if rest and scheme in _FOLDERS else name


def read_template(settings: ModelSettings) -> str | None:
    """The recipe's own chat template, None for the tokenizer's. SettingsError where the file cannot be read."""
    if settings.template is None:
        return None
    try:
        return settings.template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"template {settings.template} cannot be read: {error}. Name a text file that holds a chat template"
        ) from error


def load_chat(settings: ModelSettings) -> Chat:
    """Tokenizer and chat template of a checkpoint, with the recipe's template and arguments."""
    return Chat.load(
        resolve_model(settings.model), settings.template_args, read_template(settings), revision=settings.revision
    )


def load_model(
    folder: str | Path, *, dtype: torch.dtype, revision: str | None = None, attention: str | None = None
) -> PreTrainedModel:
    """A causal language model in evaluation mode (no dropout anywhere in a run: old and new log-probs must be comparable).

    Raises:
        ModelError: `transformers` cannot load it; the message names the model and says why.
    """
    extra = {"attn_implementation": attention} if attention else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, revision=revision, **extra)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(
            f"model {str(folder)!r} cannot be loaded: {error}. Name a folder that `save_pretrained` wrote, or a model on the hub that "
            "AutoModelForCausalLM loads"
        ) from error
    model.eval()
    return model


def context_length(model: PreTrainedModel) -> int | None:
    """Positions that the model was made for, None where its configuration does not say."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
