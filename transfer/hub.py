"""The model link: a saved model folder pushed to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from transfer import UserError


def push_model(folder: Path, repo_id: str, private: bool | None = None, revision: str | None = None) -> str:
    """Upload exactly the model folder in one commit; returns the link to that commit.

    A repository that does not exist is made, public unless `private`. Raises `UserError` naming the command's part
    that failed; the folder is left as it is.
    """
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message="Upload fine-tuned model"
        )
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError, ValueError) as fault:
        reason = " ".join(str(fault).split())
        raise UserError(
            f"--push_to_hub {repo_id}: {reason}; the run is finished and its model is in {folder}: push again with "
            f"--do_train false --model_name_or_path {folder} --push_to_hub --hub_model_id {repo_id}"
        ) from None
    return f"{api.endpoint}/{repo_id}/tree/{commit.oid}"
