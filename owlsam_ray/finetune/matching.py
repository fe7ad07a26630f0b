"""Match proposed boxes to objects (bipartite), and compute the losses of matched pairs.

Shapes: B images, P proposals per image, Q prompts, N objects of one image. Boxes are cxcywh in units of the detector's
square input unless a name says xyxy.

Source: matching and box losses as in DETR (Carion et al., 2020); focal loss (Lin et al., 2017) over prompts instead of
a softmax over classes as in OWL-ViT (Minderer et al., 2022); more than one proposal per object as in H-DETR (Jia et
al., 2023); the overlap as the class target as in Varifocal Net (Zhang et al., 2021).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from owlsam_ray.errors import TrainingError


@dataclass(frozen=True, slots=True)
class LossWeights:
    """Weights of the three parts, the same in matching and loss."""

    classes: float
    l1: float
    giou: float


def match(
    logits: Tensor,
    boxes: Tensor,
    target_boxes: Sequence[Tensor],
    target_prompts: Sequence[Tensor],
    *,
    weights: LossWeights,
    per_object: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Assign proposals to objects at the least total cost; no proposal twice.

    Args:
        logits: (B, P, Q) float32.
        boxes: (B, P, 4) float32.
        target_boxes: B times (N, 4) float32; N may be 0.
        target_prompts: B times (N,) int64 index into the prompts.
        weights: weights of the cost's parts.
        per_object: proposals for each object, if there are enough.

    Returns:
        image, proposal, object: (M,) int64 each; the object index is within its image. Empty when there are no objects.

    Raises:
        TrainingError: the outputs are not finite.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.no_grad():
        probabilities = logits.sigmoid()
        corners = box_convert(boxes, "cxcywh", "xyxy")
        for image, (wanted, prompts) in enumerate(zip(target_boxes, target_prompts, strict=True)):
            if len(wanted) == 0:
                continue
            cost = (
                weights.l1 * torch.cdist(boxes[image], wanted, p=1)
                - weights.giou * generalized_box_iou(corners[image], box_convert(wanted, "cxcywh", "xyxy"))
                - weights.classes * probabilities[image][:, prompts]
            )  # (P, N)
            if not bool(torch.isfinite(cost).all()):
                raise TrainingError("the model's outputs are not finite")
            times = max(1, min(per_object, len(cost) // len(wanted)))
            rows, columns = linear_sum_assignment(cost.repeat(1, times).cpu().numpy())
            found.append(
                (
                    torch.full((len(rows),), image),
                    torch.from_numpy(rows),
                    torch.from_numpy(columns) % len(wanted),
                )
            )
    if not found:
        nothing = torch.zeros(0, dtype=torch.int64)
        return nothing, nothing, nothing
    images, proposals, objects = zip(*found, strict=True)
    return torch.cat(images), torch.cat(proposals), torch.cat(objects)


def detection_losses(
    logits: Tensor,
    boxes: Tensor,
    target_boxes: Sequence[Tensor],
    target_prompts: Sequence[Tensor],
    *,
    weights: LossWeights,
    per_object: int = 1,
    focal_alpha: float = 0.75,
    focal_gamma: float = 2.0,
    quality_targets: bool = False,
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Focal, L1 and GIoU loss of a batch; arguments as in `match`.

    Args:
        logits: see `match`.
        boxes: see `match`.
        target_boxes: see `match`.
        target_prompts: see `match`.
        weights: weights of the sum.
        per_object: see `match`.
        focal_alpha: weight of positives; negatives have one minus it.
        focal_gamma: how strongly easy pairs are discounted.
        quality_targets: the class target of a matched pair is its IoU instead of 1, so that scores rank boxes by fit.

    Returns:
        `loss`, the weighted sum, and its unweighted parts per matched pair, `loss_class`, `loss_l1` and `loss_giou`;
        and the result of `match`.
    """
    logits, boxes = logits.float(), boxes.float()
    image, proposal, object_ = (
        index.to(logits.device)
        for index in match(logits, boxes, target_boxes, target_prompts, weights=weights, per_object=per_object)
    )
    pairs = max(1, len(image))
    starts = torch.tensor([0, *(len(wanted) for wanted in target_boxes)], device=logits.device).cumsum(0)
    flat = starts[image] + object_
    wanted = torch.cat(list(target_boxes)).to(boxes)[flat]  # (M, 4)
    prompts = torch.cat(list(target_prompts)).to(logits.device)[flat]
    matched = boxes[image, proposal]
    l1 = (matched - wanted).abs().sum(-1)
    overlap = _paired_giou(box_convert(matched, "cxcywh", "xyxy"), box_convert(wanted, "cxcywh", "xyxy"))
    targets = torch.zeros_like(logits)
    targets[image, proposal, prompts] = overlap[1].detach() if quality_targets else 1.0
    focal = focal_loss(logits, targets, alpha=focal_alpha, gamma=focal_gamma).sum() / pairs
    l1_mean, giou = l1.sum() / pairs, (1 - overlap[0]).sum() / pairs
    total = weights.classes * focal + weights.l1 * l1_mean + weights.giou * giou
    parts = {"loss": total, "loss_class": focal.detach(), "loss_l1": l1_mean.detach(), "loss_giou": giou.detach()}
    return parts, (image, proposal, object_)


def focal_loss(logits: Tensor, targets: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Sigmoid focal loss of each element; a target between 0 and 1 is approached from both sides.

    For targets of 0 and 1 this is the loss of Lin et al. (2017).
    """
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    weight = torch.where(targets > 0, alpha, 1 - alpha)
    return weight * (targets - logits.sigmoid()).abs().pow(gamma) * entropy


def _paired_giou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """GIoU and IoU of (M, 4) xyxy boxes, pairwise, (M,) each."""
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    union = (a[:, 2:] - a[:, :2]).prod(-1) + (b[:, 2:] - b[:, :2]).prod(-1) - shared
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(-1)
    iou = shared / union.clamp(min=1e-9)
    return iou - (hull - union) / hull.clamp(min=1e-9), iou
