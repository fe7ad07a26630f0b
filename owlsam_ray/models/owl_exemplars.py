"""Turn an example image into a query: OwlViT's image-guided detection.

The class head compares boxes with queries in one space, so the class embedding of a box in one image can be the query
for other images. Every patch proposes a box and has an embedding; the task is to choose the patch that represents the
object.

Shapes: P patches, D channels of a query.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from owlsam_ray.models.owl import Owl

_SHARE_OF_BEST = 0.8


def exemplar_embedding(
    detector: Owl, pixels: NDArray[np.uint8], box_xyxy: tuple[float, float, float, float] | None
) -> Tensor:
    """The embedding of the object in a box, or of the object that fills a whole image.

    With a box, and for OwlViT without one (the box is then the whole image): among the patches whose proposed boxes
    have at least 80 % of the best IoU with the box, the one whose embedding is least similar to the mean over all
    patches. Training matches one patch with an object and treats the others as background, so the outlier is the right
    one. If no proposed box overlaps, the one with the best generalised IoU is taken.

    For OWLv2 without a box: the patch with the highest objectness, wherever it is.

    IoU is computed in the detector's square. Where the preprocessing pads, a whole image is only a part of the square,
    and the patches of the padding count in the mean, as in the original, which always pads.

    Args:
        detector: the model for which the query is made.
        pixels: (H, W, 3) RGB uint8.
        box_xyxy: original pixels, inside the image; None: the whole image.

    Returns:
        (D,) float32 on the CPU, as the class head computes it: not of length 1.

    Source: google-research/scenic, projects/owl_vit/notebooks/inference.py (`embed_image_query`, with a box);
    transformers' `OwlViTForObjectDetection.embed_image_query` and `Owlv2ForObjectDetection.embed_image_query` (without
    one; equal to both where `preprocess` is `hf`).
    """
    size_hw = (pixels.shape[0], pixels.shape[1])
    embeddings, boxes_cxcywh, objectness = detector.class_embeddings(detector.preprocess(pixels)[None])
    if box_xyxy is None and objectness is not None:
        return embeddings[0, objectness[0].argmax()].clone()
    proposed = box_convert(boxes_cxcywh[0], "cxcywh", "xyxy")
    # The square in original pixels: the corner of the box that fills it.
    square = detector.unscale(torch.tensor([[0.5, 0.5, 1.0, 1.0]]), size_hw)[0, 2:].repeat(2)
    wanted = torch.tensor([box_xyxy or (0, 0, size_hw[1], size_hw[0])], dtype=torch.float32) / square
    return embeddings[0, choose_patch(embeddings[0], proposed, wanted)].clone()


def choose_patch(embeddings: Tensor, proposed: Tensor, wanted: Tensor) -> int:
    """Choose the patch that represents a box; see `exemplar_embedding`.

    Args:
        embeddings: (P, D) of the patches, P at least 1.
        proposed: (P, 4) xyxy boxes of the patches.
        wanted: (1, 4) xyxy, in the same units.

    Returns:
        Index of a patch, the first of equally good ones.
    """
    overlap = box_iou(wanted, proposed)[0]  # (P,)
    if not overlap.any():
        overlap = generalized_box_iou(wanted, proposed)[0]
    best = overlap.max()
    # Generalised IoU can be negative, and 80 % of it above the best: then only the best box remains.
    candidates = torch.nonzero(overlap >= torch.minimum(best, best * _SHARE_OF_BEST))[:, 0]
    similarity = embeddings[candidates] @ embeddings.mean(dim=0)
    return int(candidates[similarity.argmin()])
