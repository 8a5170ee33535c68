"""A finished run's model → a repository on the Hugging Face hub: private unless asked otherwise, as the last step."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from . import adapters, models, ranks
from .certify import evidence
from .config import RunConfig
from .errors import UserError
from .folder import ADAPTER, MODEL
from .tiny import TINY


class Push(NamedTuple):
    """Where a model is to be uploaded.

    Args:
        repo: "owner/name", or "name" for one's own account.
        public: whether everybody may see it.
        adapter: whether to upload the adapter, in place of the model with it merged in.
    """

    repo: str
    public: bool = False
    adapter: bool = False


def check(push: Push, config: RunConfig) -> None:
    """Refuse, before anything slow starts, what could not or must not be uploaded once the run is done.

    Raises:
        UserError: the repository has no valid name, nobody is logged in, the run saves no such model, the adapter is of
            a model that only the cache has, or the model would reveal texts of a private run.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # of its lazy list

    where = f"push_to_hub {push.repo}"
    try:
        validate_repo_id(push.repo)
    except ValueError as error:
        raise UserError(f"push_to_hub {push.repo!r}: is no name of a repository ({error}); give owner/name") from None
    if not config.save_model or config.fast:
        raise UserError(f"{where}: the run saves no model; leave out --save-model false and --fast, or this")
    if config.private and push.public:
        raise UserError(f"{where}: the run is private, and so is its model; leave out --push-public, or --private")
    if config.private and config.model == TINY:
        raise UserError(f"{where}: the run is private, and the tokenizer of {TINY!r} holds words of its rows")
    adapted = bool(config.lora_rank) or adapters.base_of(config.model) is not None
    merges = not config.load_in_4bit if config.merge is None else config.merge
    if adapted and (push.adapter or not merges) and models.base_is_cached(config.as_dict()):
        raise UserError(
            f"{where}: the adapter's base model is in the cache of this machine alone, so nobody else could use the "
            "adapter; upload the merged model, with --merge true and without --push-adapter"
        )
    if get_token() is None:
        raise UserError(f"{where}: nobody is logged in to the hub; run `hf auth login`, or set HF_TOKEN")


@ranks.by_first
def push(push: Push, out: str | Path) -> str:
    """Upload the model of a finished run, with its card and tokenizer and nothing else; its address.

    Args:
        out: the run's folder; if it has several parts, the last part's model is uploaded.

    Raises:
        UserError: there is no such model, the repository is public and should not be, or the upload failed; the run's
            files are unchanged.
    """
    import huggingface_hub

    own = evidence.find(out)[-1].own
    kinds = [ADAPTER] if push.adapter else [MODEL, ADAPTER]
    folder = next((own / kind for kind in kinds if (own / kind).is_dir()), None)
    if folder is None:
        mend = "leave out --push-adapter" if push.adapter else "run it again with --overwrite"
        raise UserError(f"push_to_hub {push.repo}: {own} holds no {kinds[0]}; {mend}")
    try:
        url = huggingface_hub.create_repo(push.repo, private=not push.public, exist_ok=True)
        repo = getattr(url, "repo_id", push.repo)  # with its owner
        if not push.public and not huggingface_hub.HfApi().model_info(repo).private:
            raise UserError(
                f"push_to_hub {push.repo}: a public repository has that name; give --push-public true, or another"
            )
        huggingface_hub.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="A model by dualoptim, with its card"
        )
    except UserError:
        raise
    except Exception as error:  # a network, the hub or its client may raise anything
        raise UserError(
            f"push_to_hub {push.repo}: the upload failed ({type(error).__name__}: {str(error)[:200]}); all of it is in "
            f"{out}; try again with the same command and --resume"
        ) from None
    return str(url)
