"""Read what a file of corrections says about itself: its run, what reviewers saw of it, and how it was made."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from owlsam_ray.coco_files.document import Document, open_document
from owlsam_ray.config.reduce import ReduceConfig
from owlsam_ray.errors import GuardError, InputError, shown
from owlsam_ray.reduce.corrections.images import ReviewedImages
from owlsam_ray.reduce.corrections.overlay import image_of_id
from owlsam_ray.run.manifest import Manifest
from owlsam_ray.run.proof import ShardRules

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Origin:
    """What the file says about itself."""

    is_of_images: bool
    listed: NDArray[np.int64] | None
    """(N,) ids that reviewers saw, ascending; None: all."""
    made_with_corrections: dict[str, Any] | None
    """The file's own info, if it was made with corrections and the scope is not set explicitly."""


def read_origin(document: Document, settings: ReduceConfig, manifest: Manifest, rules: ShardRules) -> Origin:
    """Determine which run the file belongs to, and its scope.

    Raises:
        InputError: the file does not say, or not in the form that owlsam writes.
        GuardError: it belongs to another run.
    """
    own = _own_info(document)
    if own is None and settings.corrections_base is not None:
        with open_document(settings.corrections_base) as base:
            own = _own_info(base)
    if own is None and settings.corrections_scope == "auto":
        raise InputError(
            f"reduce.corrections {document.url} no longer has the `info` that owlsam wrote: name the file that "
            "reviewers got in reduce.corrections_base, or state what they reviewed in reduce.corrections_scope "
            "(images: the file holds all that is right in its images; annotations: only some annotations of them)"
        )
    if own is None:
        _log.warning("%s does not state its run: it is read as a file of this run", document.url)
        return Origin(settings.corrections_scope == "images", None, None)
    _check_run(document, own, manifest, rules)
    review = own.get("review", {})
    if not isinstance(review, dict):
        raise _damaged(document, "review is not an object")
    scope = settings.corrections_scope
    if scope == "auto":
        scope = "annotations" if review.get("scope") == "annotations" else "images"
    listed = None
    if scope == "annotations" and "listed" in review:
        listed = _listed(document, review["listed"], manifest, rules)
    before = own if settings.corrections_scope == "auto" and "corrections" in own else None
    return Origin(scope == "images", listed, before)


def _check_run(document: Document, own: dict[str, Any], manifest: Manifest, rules: ShardRules) -> None:
    """Refuse the file of another run.

    Raises:
        GuardError: the file belongs to another run.
    """
    stated = (own.get("fingerprint"), own.get("ids_per_image"))
    if stated != (rules.fingerprint, rules.ids_per_image):
        raise GuardError(
            f"reduce.corrections {document.url} corrects other labels (fingerprint {str(stated[0])[:16]} with "
            f"{stated[1]} ids for each image, here {rules.fingerprint[:16]} with {rules.ids_per_image}): its ids mean "
            "other things here"
        )
    for images in _image_lists(own):
        if not manifest.begins_with(images):
            raise GuardError(
                f"reduce.corrections {document.url} is of a run with the same label settings over other images "
                f"({str(images)[:40]}, here {manifest.images_digest()}): its ids mean other things here"
            )


def _image_lists(own: dict[str, Any]) -> list[Any]:
    """Digests of the run's image list when the file was written; one for each task of Label Studio."""
    if isinstance(own.get("image_lists"), list):
        return list(own["image_lists"])
    return [own["image_list"]] if "image_list" in own else []


def _listed(document: Document, listed: Any, manifest: Manifest, rules: ShardRules) -> NDArray[np.int64]:
    """(N,) ids that reviewers saw, ascending.

    Raises:
        InputError: an id is not of this run.
    """
    if not isinstance(listed, list):
        raise _damaged(document, "review.listed is not a list")
    for each in listed:
        if not is_integer(each) or not 1 <= image_of_id(each, rules.ids_per_image)[0] <= manifest.num_images:
            raise _damaged(document, f"review.listed holds {shown(each, 40)}, which is no id of this run")
    return np.unique(np.array(listed, np.int64))


def _damaged(document: Document, what: str) -> InputError:
    return InputError(
        f"info.owlsam_ray of reduce.corrections {document.url} is damaged ({what}): name the file that reviewers got "
        "in reduce.corrections_base, and leave `info` out of this one"
    )


def check_first_round(document: Document, origin: Origin, images: ReviewedImages, manifest: Manifest) -> None:
    """Refuse a file that would discard corrections made before it was written.

    Raises:
        InputError: the file was made with corrections, and covers only some of the run's images, or is not of scope
            `images`.
    """
    if origin.made_with_corrections is None:
        return
    proof = origin.made_with_corrections.get("proof")
    proof = proof if isinstance(proof, dict) else {}
    held = [proof[status] for status in ("ok", "empty") if is_integer(proof.get(status))]
    expected = sum(held) if len(held) == 2 else manifest.num_images
    reviewed = int(np.count_nonzero(images.reviewed & (images.ordinals > 0)))
    if not origin.is_of_images or reviewed < expected:
        raise InputError(
            f"reduce.corrections {document.url} was made with earlier corrections (info.owlsam_ray.corrections), but "
            "holds only some of the run, so the earlier ones would be lost elsewhere: make these changes in the whole "
            "annotations.json that reduce wrote with the earlier ones, and give that; or set "
            "reduce.corrections_scope=images or annotations to do without the earlier ones"
        )


def _own_info(document: Document) -> dict[str, Any] | None:
    own = document.value("info", dict, {}).get("owlsam_ray")
    return own if isinstance(own, dict) and "fingerprint" in own else None


def is_integer(value: Any) -> bool:
    """Whether a value is an integer that an int64 column takes."""
    return type(value) is int and abs(value) < 2**63
