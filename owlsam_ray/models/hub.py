"""Find the weights of a model in Hugging Face layout: a local directory, or the hub's cache."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from owlsam_ray.errors import WeightsError, shown


def resolve_weights(weights: str, *, setting: str) -> Path:
    """The local directory of some weights: a directory unchanged, a hub name resolved through the hub's cache.

    Args:
        weights: as in the run file: a directory, `org/model`, or `org/model@revision`.
        setting: name of the setting that holds it (`detector.weights`), for messages.

    Raises:
        WeightsError: there is no such directory, and the hub cannot be reached or does not know the name; or the hub
            has no safetensors for it.
    """
    path = Path(weights)
    if path.is_dir():
        return path
    if weights.startswith(("/", ".", "~")) or path.exists():
        raise WeightsError(f"{setting} {weights} is not a directory in Hugging Face layout")
    name, _, revision = weights.partition("@")
    try:
        # Pickles are not even downloaded: they may contain code.
        found = Path(
            snapshot_download(name, revision=revision or None, allow_patterns=["*.json", "*.txt", "*.safetensors"])
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(
            f"{setting} {shown(weights)} is not a local directory, and the hub does not provide it ({reason}). "
            "Download it once on a machine with network access, and give the directory."
        ) from None
    if not any(found.glob("*.safetensors")):
        raise WeightsError(
            f"{setting} {shown(weights)}: the hub has no safetensors for it, and a pickle is not loaded, since it "
            "may hold code. Convert it once with from_pretrained(…).save_pretrained(…) (see the README), or name a "
            "revision that has safetensors: org/model@revision"
        )
    return found
