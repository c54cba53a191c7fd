"""Send an adapter or a merged model to a repository of the Hugging Face hub, as one commit."""

from __future__ import annotations

from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token, is_offline_mode

from peftune.adapters.hub.publishable import Publishable
from peftune.console import Console
from peftune.data.sources.hub import one_line_errors
from peftune.errors import UserError


def push(content: Publishable, repository: str, public: bool = False, api: Any = None) -> str:
    """Create the repository where it is not there, private unless `public`, and commit the files; the commit's address.

    The token is what Hugging Face's own login or environment says. `api` is an HfApi. Raises UserError where there is
    no token, the hub cannot be reached or refuses, and for a repository that is public though it was not to be.
    """
    if api is None and is_offline_mode():
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be sent; unset it, or send from another machine")
    if api is None and not get_token():
        raise UserError("no Hugging Face token is here; run hf auth login, or set HF_TOKEN")
    hub = api or HfApi()
    operations = [
        CommitOperationAdd(name, str(f) if not isinstance(f, bytes) else f) for name, f in content.files.items()
    ]
    with one_line_errors(f"repository {repository}: the hub could not be reached, or refused"):
        hub.create_repo(repository, private=not public, repo_type="model", exist_ok=True)
        if not public and not hub.repo_info(repository, repo_type="model").private:
            raise UserError(f"repository {repository}: is public already, and nothing was sent; say that it may be")
        with Console().waiting(f"sending to {repository}"):
            made = hub.create_commit(repository, operations, commit_message=f"Add {content.directory.resolve().name}")
    return str(made.commit_url)
