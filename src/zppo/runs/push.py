"""The trained student of a run, on the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from zppo import __version__
from zppo.config.recipe import load_recipe
from zppo.errors import CheckpointError, PushError, one_line
from zppo.names import check_file, check_run_folder
from zppo.runs.files import FINAL, RECIPE, writing
from zppo.runs.log import METRICS, read_lines
from zppo.runs.model_card import on_the_hub, run_card

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

CARD = "README.md"
_WRITTEN_TO_BE_PUSHED = "pipeline_tag:"  # cards of older versions, which name paths and addresses, have none
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_ADAPTER_CONFIG = "adapter_config.json"


def push_run(run: Path, repo: str, *, private: bool = True) -> str:
    """Uploads final/ of a finished run as one commit, with its model card; the repository is made where there is none.

    The card is the one in final/, as it is: it can be edited before. One of an older version is written anew.

    Args:
        repo: name, or owner/name.
        private: of a repository that is made; one that is there stays as it is.

    Returns:
        The address of the repository.

    Raises:
        CheckpointError: the folder holds no finished run, or pointers of git-lfs in place of it.
        PushError: the hub does not take it.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    from zppo.http_client import hub_trouble

    final = run / FINAL
    if not (run / RECIPE).is_file() or not (final / "config.json").is_file():
        raise CheckpointError(f"{run} holds no finished run, there is no {FINAL}/config.json in it: train or `zppo resume` it first")
    check_run_folder(run)
    for path in sorted(final.rglob("*")):
        check_file(path, CheckpointError)
    card = final / CARD
    if not card.is_file() or _WRITTEN_TO_BE_PUSHED not in card.read_text(encoding="utf-8").split("\n---", 1)[0]:
        with writing(card):
            card.write_text(run_card(run.name, load_recipe(run / RECIPE), read_lines(run / METRICS), final), encoding="utf-8")
    unreached = hub_trouble()
    try:
        api = HfApi(library_name="zppo", library_version=__version__)
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.create_commit(made.repo_id, list(_files(final)), commit_message=f"{run.name}, trained with zppo {__version__}")
        return str(made)
    except HFValidationError as error:
        raise PushError(f"{repo!r} is no name of a repository: {one_line(error)}. Write NAME or OWNER/NAME") from error
    except Exception as error:  # no network, no access, a server that fails: many kinds, of two clients
        mends = {401: _LOG_IN, 403: "take a token that may write there"}
        status = getattr(getattr(error, "response", None), "status_code", 0)
        mend = mends.get(status, "try again later") if get_token() else _LOG_IN
        why = unreached if isinstance(error, OfflineModeIsEnabled) else one_line(error)
        raise PushError(
            f"{final} could not be pushed to {repo!r}: {why}. It is whole where it lies; {mend}: `zppo push {run} --repo {repo}`"
        ) from error


def _files(final: Path) -> Iterator[CommitOperationAdd]:
    """Every file of final/; adapters of a local base model do not name its folder."""
    from huggingface_hub import CommitOperationAdd

    for path in sorted(final.rglob("*")):
        if not path.is_file() or path.is_symlink():
            continue
        content: str | bytes = str(path)
        if path.name == _ADAPTER_CONFIG:
            config = json.loads(path.read_text(encoding="utf-8"))
            if not on_the_hub(str(config.get("base_model_name_or_path"))):
                content = json.dumps({**config, "base_model_name_or_path": None}, indent=2).encode()
        yield CommitOperationAdd(path.relative_to(final).as_posix(), content)
