"""Upload a folder to the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi, get_token

# the first is the one of whichever HTTP library its version uses
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from contract.errors import UserError, first_line
from distill.models.hub import quiet_hub


def check_push(name: str) -> None:
    """Raise UserError for a repository's name that the hub does not take, and without a token."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push {name}: {first_line(error)}: give OWNER/NAME") from error
    if name.count("/") != 1:
        raise UserError(f"--push {name}: give OWNER/NAME, as in the address of a model")
    if not get_token():
        raise UserError(
            f"--push {name} needs a token of the Hugging Face hub: set HF_TOKEN, or run "
            "`hf auth login`"
        )


def push(folder: Path, name: str, private: bool, endpoint: str | None = None) -> str:
    """Upload a folder as the model `name`, which is made if there is none; returns its address.

    Raises UserError that says how to upload later: the folder stays.
    """
    api = HfApi(endpoint=endpoint)
    later = f"{folder} is complete: upload it later with `hf upload {name} {folder}`"
    try:
        with quiet_hub():
            address = api.create_repo(name, exist_ok=True, private=private or None)
            api.upload_folder(
                repo_id=name, folder_path=folder, commit_message="Add the student and its heads"
            )
    except HfHubHTTPError as error:
        refused = error.response is not None and error.response.status_code in (401, 403)
        cause = "its token may not write there" if refused else first_line(error)
        raise UserError(f"--push {name}: {cause}: {later}") from error
    except (HTTPError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(f"--push {name}: no connection ({first_line(error)}): {later}") from error
    return str(address)
