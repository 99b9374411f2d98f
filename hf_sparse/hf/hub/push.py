"""Push a saved model to the Hub: weights, config, tokenizer, recipe and card, and nothing else of the folder.

Other files of a Trainer (`training_args.bin`, optimizer states: pickles, which run code when they are opened) are not
uploaded: the names of what is uploaded are listed, not the names of what is not. Links that lead out of the folder are
refused.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils._validators import validate_repo_id
from transformers.utils import logging

from ...errors import CheckpointError, HubError, RecipeError
from ...formats.inspection import inspect
from ...formats.model_folder import check_index, check_link
from ...formats.safetensors_io import reading
from ...utils.atomic_io import require_regular
from ...utils.strict_yaml import dump_yaml
from .. import patches
from ..embedding.module_files import module_files
from .model_card import CARD, card_text, facts_of, read_recipe

logger = logging.get_logger(__name__)

PUSHED = re.compile(
    r"(model|adapter_model)(\.[\w-]+)?(-\d{5}-of-\d{5})?\.safetensors(\.index(\.[\w-]+)?\.json)?"
    r"|(adapter_|generation_)?config\.json|(pre)?processor_config\.json|eval_results\.json|speed\.json"
    r"|tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(txt|json)|merges\.txt"
    r"|(spiece|tokenizer|sentencepiece\.bpe)\.model|chat_template\.(jinja|json)|recipe\.yaml|README\.md|LICENSE(\.txt|\.md)?"
)
"""Names of the files that belong to a model."""

TRANSPORT: type[Exception] = HfHubHTTPError.__mro__[1]
"""The error of the HTTP library that the client is built on, which is not the same in all its versions."""

ADVICE = {
    401: "you are not logged in, or the token is not valid (any more): run `hf auth login`, or set HF_TOKEN",
    403: "your token may not write there: use one with the role 'write', another repository, or --create-pr",
    404: "there is no such repository or revision, or your token may not see it: check the name",
    409: "somebody else changed the repository meanwhile: push again",
    429: "the Hub is asking for fewer requests: wait some minutes and push again",
}
AGAIN = "push again; files that arrived complete are not sent again"


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: bool | str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    keep_card: bool = False,
) -> CommitInfo:
    """Upload the model in a folder in one commit; the repository is made if there is none.

    Args:
        revision: a branch, made if there is none.
        create_pr: open a pull request instead of changing the branch, which has to be there; also for models of others.
        keep_card: leave a card alone that the repository has already.

    Raises:
        CheckpointError: if the folder holds no complete model, or a link that leads out of it. Nothing is sent then.
        RecipeError: for a name that no repository can have.
        HubError: if the Hub refuses or cannot be reached; the message says what to do.
    """
    folder = Path(folder)
    _check_name(repo_id)
    token = _checked_token(token)
    files = contents(folder)
    api = HfApi(library_name="hf_sparse", token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if keep_card and api.file_exists(repo_id, CARD, revision=revision):
            files.pop(CARD, None)  # an adapter's folder may have none
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(name, source) for name, source in files.items()],
            commit_message=commit_message or "Upload sparse model",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    except OfflineModeIsEnabled as error:
        raise HubError(f"cannot push to '{repo_id}': HF_HUB_OFFLINE is set; unset it and push again") from error
    except (TRANSPORT, OSError, RuntimeError, ValueError) as error:
        reason = _explained(error)
        redacted = _redacted(reason)
        # A traceback shows the cause too, with all that the client wrote into it.
        raise HubError(f"cannot push to '{repo_id}': {redacted}") from (error if redacted == reason else None)


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RecipeError(f"'{repo_id}' is not a name of a repository, as in user/name: {error}") from error


def _checked_token(token: bool | str | None) -> bool | str | None:
    """Return a token without the line feed that files end with.

    Raises:
        RecipeError: if it has other characters that no token has; the HTTP library would quote it in its error.
    """
    if not isinstance(token, str):
        return token
    if not re.fullmatch(r"[!-~]+", token.strip()):
        raise RecipeError("`token` must be one word of ASCII characters, got spaces or other characters in it")
    return token.strip()


def _redacted(text: str) -> str:
    """Return text without tokens, which errors of the client may quote."""
    return re.sub(r"(hf_(?:jwt_)?|Bearer\s+)[^\s'\",;)]+", r"\1***", text)


def contents(folder: Path) -> dict[str, Path | bytes]:
    """Return the files of a folder that are pushed, by name: paths, and bytes where a file is redacted.

    Raises:
        CheckpointError: if the folder holds no complete model, or a link that leads out of it.
    """
    inspect(folder)  # a corrupted model is found here, not by those who download it
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise CheckpointError(f"folder {folder} has no config.json: it holds weights, but no model")
    files: dict[str, Path | bytes] = {}
    for path in sorted(_pushed(folder)):
        check_link(path)
        with reading(path):
            require_regular(path)
        files[path.relative_to(folder).as_posix()] = path
    if not any(name.endswith(".safetensors") for name in files):
        raise CheckpointError(f"folder {folder} has no weights with a name that is pushed, such as model.safetensors")
    if any(".safetensors.index." in name for name in files):
        check_index(folder)
    if recipe := read_recipe(folder / "recipe.yaml"):
        files["recipe.yaml"] = dump_yaml(recipe).encode()
    if CARD not in files and "config.json" in files:
        files[CARD] = card_text(facts_of(folder)).encode()
    return files


def _pushed(folder: Path) -> Iterator[Path]:
    """Yield the files of a model, and of the modules of sentence-transformers where it has any."""
    yield from (path for path in folder.iterdir() if PUSHED.fullmatch(path.name))
    yield from module_files(folder)


def _explained(error: BaseException) -> str:
    """Say what happened and what to do. The client wraps what goes wrong in an upload; its reason is what counts."""
    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            status = cause.response.status_code
            advice = ADVICE.get(status, f"the Hub has a problem: {AGAIN}" if status >= 500 else "see the Hub's reason")
            if status == 429 and (seconds := cause.response.headers.get("Retry-After")):
                advice = f"the Hub is asking for fewer requests: wait {seconds} s and push again"
            return f"{status}, {advice}. ({str(cause).strip()})"
    for cause in _causes(error):
        if isinstance(cause, TRANSPORT):
            return f"the connection was lost: {AGAIN}. ({cause})"
    return f"{error}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def push_model(
    self: Any,
    repo_id: str,
    *,
    max_shard_size: int | str | None = "50GB",
    tags: list[str] | None = None,
    **options: Any,
) -> CommitInfo:
    """Push a model as `PreTrainedModel.push_to_hub` does: packed, with a card of its own.

    Args:
        tags: more tags for the card.
        options: of `push_folder`.
    """
    _check_name(repo_id)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / repo_id.split("/")[-1]
        self.save_pretrained(target, max_shard_size=max_shard_size)
        if (target / "config.json").is_file():
            (target / CARD).write_text(card_text(facts_of(target), tags or ()), encoding="utf-8")
        return push_folder(target, repo_id, keep_card=True, **options)


def guard_trainer(trainer: Any) -> None:
    """Make a Trainer push the model and nothing else, once it is trained."""
    patches.put(trainer, "push_to_hub", partial(_push_trained, trainer))
    patches.put(trainer, "_push_from_checkpoint", _push_no_checkpoint)


def _push_no_checkpoint(checkpoint_folder: str) -> None:
    logger.warning_once(
        "checkpoints of a model that is being pruned are not pushed: they hold optimizer states and pickles. Call "
        "trainer.push_to_hub() after training"
    )


def _push_trained(
    trainer: Any,
    commit_message: str | None = "End of training",
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    **card: Any,
) -> CommitInfo | None:
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    trainer.save_model(_internal_call=True)
    if not trainer.is_world_process_zero():
        return None
    repo_id = trainer.hub_model_id or trainer.args.hub_model_id or Path(trainer.args.output_dir).absolute().name
    return push_folder(
        trainer.args.output_dir,
        repo_id,
        private=trainer.args.hub_private_repo if private is None else private,
        revision=revision or trainer.args.hub_revision,
        token=token or trainer.args.hub_token,
        commit_message=commit_message,
    )
