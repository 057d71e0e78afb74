"""The model link: a saved model folder pushed to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi

from transfer import UserError


def push_model(folder: Path, repo_id: str, private: bool | None = None, revision: str | None = None) -> str:
    """Upload exactly the model folder in one commit; returns the link to that commit.

    A repository that does not exist is made, public unless `private`. Raises `UserError` that says how to push again;
    the folder is left as it is.
    """
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message="Upload fine-tuned model"
        )
    except Exception as fault:  # whatever client and network raise, a finished run must not end in a traceback
        raise UserError(
            f"--push_to_hub {repo_id}: {' '.join(str(fault).split())}; the run is finished and its model is whole; "
            f"push again with --do_train false --model_name_or_path {folder} --output_dir {folder.parent}-pushed "
            f"--push_to_hub true --hub_model_id {repo_id}"
        ) from None
    return f"{api.endpoint}/{repo_id}/tree/{commit.oid}"
