"""Matching against brute force, losses against torchvision's."""

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss

from owlsam_ray.errors import TrainingError
from owlsam_ray.finetune.matching import LossWeights, detection_losses, focal_loss, match

WEIGHTS = LossWeights(classes=2.0, l1=5.0, giou=2.0)


def random_case(seed: int, *, proposals: int = 6, objects: tuple[int, ...] = (3, 0, 1)) -> list[Any]:
    print(f"seed {seed}")
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(objects), proposals, 4, generator=random)
    boxes = 0.1 + 0.5 * torch.rand(len(objects), proposals, 4, generator=random)
    wanted = [0.1 + 0.5 * torch.rand(count, 4, generator=random) for count in objects]
    prompts = [torch.randint(0, 4, (count,), generator=random) for count in objects]
    return [logits, boxes, wanted, prompts]


def cost_of(logits: Tensor, boxes: Tensor, wanted: Tensor, prompts: Tensor) -> NDArray[np.float64]:
    """(P, N) the plain way."""
    cost = np.zeros((len(boxes), len(wanted)))
    for p, box in enumerate(boxes):
        for n, target in enumerate(wanted):
            l1 = float((box - target).abs().sum())
            corners = (box_convert(each[None], "cxcywh", "xyxy") for each in (box, target))
            giou = float(generalized_box_iou(*corners))
            cost[p, n] = 5 * l1 - 2 * giou - 2 * float(logits[p, prompts[n]].sigmoid())
    return cost


@pytest.mark.parametrize("seed", range(5))
def test_matching_is_the_cheapest_of_all(seed: int) -> None:
    logits, boxes, wanted, prompts = random_case(seed)
    image, proposal, object_ = match(logits, boxes, wanted, prompts, weights=WEIGHTS)
    assert image.tolist().count(1) == 0
    for index, count in ((0, 3), (2, 1)):
        cost = cost_of(logits[index], boxes[index], wanted[index], prompts[index])
        best = min(permutations(range(6), count), key=lambda rows: sum(cost[row, n] for n, row in enumerate(rows)))
        of_image = image == index
        found = dict(zip(object_[of_image].tolist(), proposal[of_image].tolist(), strict=True))
        assert [found[n] for n in range(count)] == list(best)


def test_each_object_gets_several_proposals_and_no_proposal_two_objects() -> None:
    logits, boxes, wanted, prompts = random_case(1, proposals=9, objects=(3,))
    _, proposal, object_ = match(logits, boxes, wanted, prompts, weights=WEIGHTS, per_object=3)
    assert sorted(object_.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(set(proposal.tolist())) == 9


def test_more_objects_than_proposals_leaves_some_without() -> None:
    logits, boxes, wanted, prompts = random_case(2, proposals=2, objects=(5,))
    _, proposal, object_ = match(logits, boxes, wanted, prompts, weights=WEIGHTS, per_object=4)
    assert sorted(proposal.tolist()) == [0, 1]
    assert len(set(object_.tolist())) == 2


def test_nothing_to_match() -> None:
    logits, boxes, wanted, prompts = random_case(3, objects=(0, 0))
    assert [len(part) for part in match(logits, boxes, wanted, prompts, weights=WEIGHTS)] == [0, 0, 0]
    parts, _ = detection_losses(logits.requires_grad_(), boxes, wanted, prompts, weights=WEIGHTS)
    assert parts["loss"] > 0
    assert parts["loss_l1"] == 0


def test_outputs_that_are_not_finite_are_told() -> None:
    logits, boxes, wanted, prompts = random_case(4)
    boxes[0, 0, 0] = float("nan")
    with pytest.raises(TrainingError, match="not finite"):
        match(logits, boxes, wanted, prompts, weights=WEIGHTS)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_focal_loss_is_torchvisions_for_whole_targets(gamma: float) -> None:
    random = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(7, 11, generator=random)
    targets = (torch.rand(7, 11, generator=random) > 0.7).float()
    ours = focal_loss(logits, targets, alpha=0.75, gamma=gamma)
    torch.testing.assert_close(ours, sigmoid_focal_loss(logits, targets, alpha=0.75, gamma=gamma))


def test_soft_targets_are_best_where_the_score_is_the_target() -> None:
    logits = torch.linspace(-6, 6, 1201)
    losses = focal_loss(logits, torch.full_like(logits, 0.7), alpha=0.75, gamma=2.0)
    assert logits[losses.argmin()].sigmoid() == pytest.approx(0.7, abs=0.005)


@pytest.mark.parametrize("quality", [False, True])
def test_losses_are_those_of_a_loop(quality: bool) -> None:
    logits, boxes, wanted, prompts = random_case(6, objects=(2, 3))
    parts, (image, proposal, object_) = detection_losses(
        logits, boxes, wanted, prompts, weights=WEIGHTS, quality_targets=quality
    )
    l1 = giou_loss = 0.0
    targets = torch.zeros_like(logits)
    for i, p, n in zip(image.tolist(), proposal.tolist(), object_.tolist(), strict=True):
        l1 += float((boxes[i, p] - wanted[i][n]).abs().sum())
        a, b = (box_convert(each[None], "cxcywh", "xyxy") for each in (boxes[i, p], wanted[i][n]))
        giou_loss += 1 - float(generalized_box_iou(a, b))
        low, high = torch.maximum(a[0, :2], b[0, :2]), torch.minimum(a[0, 2:], b[0, 2:])
        shared = float((high - low).clamp(min=0).prod())
        area = float((a[0, 2:] - a[0, :2]).prod() + (b[0, 2:] - b[0, :2]).prod())
        targets[i, p, prompts[i][n]] = shared / (area - shared) if quality else 1.0
    classes = float(focal_loss(logits, targets, alpha=0.75, gamma=2.0).sum())
    assert float(parts["loss_class"]) == pytest.approx(classes / 5, rel=1e-5)
    assert float(parts["loss_l1"]) == pytest.approx(l1 / 5, rel=1e-5)
    assert float(parts["loss_giou"]) == pytest.approx(giou_loss / 5, rel=1e-5)
    assert float(parts["loss"]) == pytest.approx((2 * classes + 5 * l1 + 2 * giou_loss) / 5, rel=1e-5)


def test_gradient_reaches_boxes_and_logits() -> None:
    logits, boxes, wanted, prompts = random_case(7)
    logits.requires_grad_()
    boxes.requires_grad_()
    parts, (image, proposal, _) = detection_losses(logits, boxes, wanted, prompts, weights=WEIGHTS)
    parts["loss"].backward()
    assert logits.grad is not None
    assert bool((logits.grad != 0).all())
    assert boxes.grad is not None
    touched = boxes.grad.abs().sum(-1) > 0
    assert set(zip(*(index.tolist() for index in touched.nonzero(as_tuple=True)), strict=True)) == set(
        zip(image.tolist(), proposal.tolist(), strict=True)
    )
