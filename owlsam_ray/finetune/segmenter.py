"""Train a segmenter: jittered box prompts, losses on points, mask metrics, and a directory to load.

Shapes: B images, M boxes of all of them, P points per box, S side of the sam frame, m = S / 4.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from owlsam_ray.config.base import Name, PositiveInt, Section
from owlsam_ray.errors import TrainingError
from owlsam_ray.finetune.data import Sample
from owlsam_ray.finetune.mask_losses import (
    NEAR_POINTS,
    dice_loss,
    draw_points,
    estimated_iou,
    focal_loss,
    logits_at,
)
from owlsam_ray.finetune.segmenter_module import SegmenterModule, random_parts
from owlsam_ray.models.mobile_sam import image_to_sam_frame, read_mobile_sam, save_mobile_sam
from owlsam_ray.models.mobile_sam_layout import MobileSamConfig, MobileSamModules, module_name, official_name
from owlsam_ray.models.sam_frame import boxes_to_sam_frame, input_size_hw
from owlsam_ray.ops.masks import logits_to_masks

NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
_SMALL_SIDE = 32.0
_PREFIX = "parts."


class SegmenterSettings(Section):
    """How MobileSAM is trained."""

    weights: Name | None = None
    """Initial weights, as in `segment.weights` of a run. Alternatively, give `architecture`."""
    architecture: MobileSamConfig | None = None
    """Sizes of a model with random initial weights."""
    image_size: Annotated[int, Field(ge=16, multiple_of=16)] | None = None
    """Side of the sam frame, if it is to differ from that of the weights. No tensor depends on it, so a training may
    begin with small images, which cost less, and continue with large ones."""
    freeze_encoder: bool = False
    """Keep the image encoder fixed; prompt encoder and mask decoder are trained."""
    freeze_prompt_encoder: bool = False
    """Keep the embeddings of the box corners fixed."""
    encoder_lr_scale: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    """Learning rate of the image encoder relative to that of the other parts."""
    box_jitter: NonNegative = 0.1
    """Jitter of prompt boxes: each side moves by a normal deviate of this times the box's width or height, limited by
    `box_jitter_px`."""
    box_jitter_px: NonNegative = 20.0
    """Largest jitter of a side, in original pixels."""
    max_boxes_per_image: PositiveInt = 16
    """Most objects of an image that one step uses, drawn again in each step; bounds memory."""
    focal_weight: NonNegative = 20.0
    """Weight of the focal loss."""
    focal_gamma: NonNegative = 2.0
    """How strongly the focal loss discounts what is already right; 0 makes it plain cross entropy."""
    dice_weight: NonNegative = 1.0
    """Weight of the Dice loss."""
    iou_weight: NonNegative = 1.0
    """Weight of the squared error of the predicted IoU."""

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if (self.weights is None) == (self.architecture is None):
            raise ValueError("give either weights to start from, or an architecture to start from random weights")
        if self.image_size is not None and self.architecture is not None:
            raise ValueError("image_size goes with weights; an architecture has its own")
        return self


class SegmenterTask:
    """The `Task` that trains MobileSAM."""

    best_metric = "val/miou"
    needs_masks = True

    def __init__(self, settings: SegmenterSettings, *, seed: int) -> None:
        """Load or build the model.

        Args:
            settings: how the segmenter is trained.
            seed: seed of random initial weights, if no others are given.

        Raises:
            WeightsError: `settings.weights` is missing, damaged, or of another layout.
        """
        self._settings = settings
        if settings.weights is not None:
            config, state = read_mobile_sam(Path(settings.weights))
            self._config = config.model_copy(update={"image_size": settings.image_size or config.image_size})
            parts = MobileSamModules(self._config)
            parts.load_state_dict({module_name(name): tensor for name, tensor in state.items()})
        else:
            self._config = settings.architecture or MobileSamConfig()
            parts = random_parts(self._config, seed=seed)
        self.module = SegmenterModule(
            parts,
            image_size=self._config.image_size,
            freeze_encoder=settings.freeze_encoder,
            freeze_prompt_encoder=settings.freeze_prompt_encoder,
        )

    def collate(self, samples: Sequence[Sample], rng: np.random.Generator) -> dict[str, Any]:
        """See `Task.collate`.

        Returns:
            image_ids: B ints; pixels: (B, 3, S, S) float32; image_index: (M,) int64 and boxes: (M, 4) float32 in the
            sam frame, jittered; points: (M, P, 2) float32, -1 … 1 over the sam frame; targets: (M, P) bool;
            point_pixels: (M, P) float32. Objects without a pixel, which cutout may leave, are skipped.
        """
        side = self._config.image_size
        boxes, points, targets, pixels, owners = [], [], [], [], []
        for image, sample in enumerate(samples):
            height, width = sample.pixels.shape[:2]
            exact, masks = self._draw_objects(sample, rng)
            prompts = self._jitter(exact, (height, width), rng)
            around = np.concatenate([np.minimum(exact, prompts)[:, :2], np.maximum(exact, prompts)[:, 2:]], axis=1)
            drawn = draw_points(masks, around, rng)
            filled = input_size_hw((height, width), side)
            scale = np.array([filled[1] / width, filled[0] / height]) * (2 / side)
            boxes.append(boxes_to_sam_frame(prompts, size_hw=(height, width), image_size=side))
            points.append((drawn.centres_xy * scale - 1).astype(np.float32))
            targets.append(drawn.targets)
            pixels.append(drawn.pixels)
            owners.append(np.full(len(exact), image))
        return {
            "image_ids": [sample.image_id for sample in samples],
            "pixels": torch.stack([image_to_sam_frame(sample.pixels, image_size=side) for sample in samples]),
            "image_index": torch.from_numpy(np.concatenate(owners)),
            "boxes": torch.from_numpy(np.concatenate(boxes)),
            "points": torch.from_numpy(np.concatenate(points)),
            "targets": torch.from_numpy(np.concatenate(targets)),
            "point_pixels": torch.from_numpy(np.concatenate(pixels)),
        }

    def _draw_objects(self, sample: Sample, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Draw the objects of this step; return their boxes and masks in the sample's order."""
        boxes, masks = _objects(sample)
        if len(boxes) <= self._settings.max_boxes_per_image:
            return boxes, masks
        kept = np.sort(rng.choice(len(boxes), self._settings.max_boxes_per_image, replace=False))
        return boxes[kept], masks[kept]

    def _jitter(
        self, boxes_xyxy: NDArray[np.float32], size_hw: tuple[int, int], rng: np.random.Generator
    ) -> NDArray[np.float32]:
        """Move each side of each box, and clip to the image; a box that would vanish stays unchanged."""
        settings = self._settings
        sides = np.tile(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], 2)
        shift = np.clip(
            rng.standard_normal(boxes_xyxy.shape, np.float32) * settings.box_jitter * sides,
            -settings.box_jitter_px,
            settings.box_jitter_px,
        )
        moved = np.clip(boxes_xyxy + shift, 0, np.array([size_hw[1], size_hw[0]] * 2)).astype(np.float32)
        whole = (moved[:, 2:] - moved[:, :2] >= 1).all(axis=1, keepdims=True)
        return np.where(whole, moved, boxes_xyxy)

    def inputs(self, batch: dict[str, Any]) -> tuple[Any, ...]:
        """See `Task.inputs`."""
        return batch["pixels"], batch["image_index"], batch["boxes"]

    def loss(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See `Task.loss`.

        The single mask is trained, since inference uses it by default, and the best-fitting one of the three. Predicted
        IoU is trained on all four: `best_of_three` chooses by it, so it must be low for masks that do not fit. Losses
        are means over objects. Parts: `focal`, `dice` and `iou_error` of the single mask, `miou`, `miou_best_of_three`.
        """
        low_res, predicted_iou = outputs
        settings = self._settings
        if len(low_res) == 0:
            zero = low_res.sum() * 0.0 + predicted_iou.sum() * 0.0
            return {"loss": zero}
        with torch.autocast(low_res.device.type, enabled=False):
            targets = batch["targets"][:, None].float()
            logits = logits_at(low_res, batch["points"])
            focal = focal_loss(logits, targets, gamma=settings.focal_gamma)
            dice = dice_loss(logits[..., :NEAR_POINTS], targets[..., :NEAR_POINTS])
            masks = settings.focal_weight * focal + settings.dice_weight * dice
            actual = estimated_iou(logits.detach(), targets, batch["point_pixels"][:, None])
            error = (predicted_iou.float() - actual).square().mean(dim=1)
            best = masks[:, 1:].min(dim=1).values
            loss = (masks[:, 0] + best + settings.iou_weight * error).mean()
        return {
            "loss": loss,
            "focal": focal[:, 0].detach().mean(),
            "dice": dice[:, 0].detach().mean(),
            "iou_error": error.detach().mean(),
            "miou": actual[:, 0].mean(),
            "miou_best_of_three": actual[:, 1:].amax(dim=1).mean(),
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        """See `Task.parameter_groups`. Tokens and attention biases have no weight decay either."""
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        tokens = {id(layer.weight) for layer in self.module.modules() if isinstance(layer, nn.Embedding)}
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                continue
            part = "encoder" if name.startswith((f"{_PREFIX}encoder.", f"{_PREFIX}neck.")) else "decoder"
            decays = parameter.ndim > 1 and id(parameter) not in tokens and not name.endswith("attention_biases")
            groups.setdefault((part, decays), []).append(parameter)
        return [
            {
                "params": parameters,
                "lr_scale": self._settings.encoder_lr_scale if part == "encoder" else 1.0,
                "name": part if decays else f"{part} without decay",
                **({} if decays else {"weight_decay": 0.0}),
            }
            for (part, decays), parameters in groups.items()
        ]

    def validate(self, module: nn.Module, samples: Iterable[Sample], *, device: torch.device) -> dict[str, float]:
        """See `Task.validate`: the single mask of exact boxes, at the original size, as inference makes it.

        Returns:
            val/miou and val/dice over all objects; val/miou_small over those whose box has sqrt(w · h) < 32 pixels,
            val/miou_large over the others, if there are any; val/iou_error, the error of the predicted IoU.

        Raises:
            TrainingError: there is no object with a mask.
        """
        if not isinstance(module, SegmenterModule):
            raise TypeError(f"validate takes a SegmenterModule, not a {type(module).__name__}")
        rows: list[tuple[float, float, float, float]] = []
        was_training = module.training
        module.eval()  # also drops attention biases that the encoder cached before its weights changed
        try:
            with torch.no_grad():
                for sample in samples:
                    rows += self._measure(module, sample, device)
        finally:
            module.train(was_training)
        if not rows:
            raise TrainingError("the validation samples have no object with a mask: give others")
        side, iou, dice, error = np.array(rows).T
        small = side < _SMALL_SIDE
        parts = {"val/miou_small": iou[small], "val/miou_large": iou[~small]}
        return {
            "val/miou": float(iou.mean()),
            "val/dice": float(dice.mean()),
            "val/iou_error": float(error.mean()),
            **{name: float(values.mean()) for name, values in parts.items() if len(values)},
        }

    def _measure(
        self, module: SegmenterModule, sample: Sample, device: torch.device
    ) -> list[tuple[float, float, float, float]]:
        """For each object of one image: side in pixels, IoU, Dice, error of the predicted IoU."""
        side, (exact, wanted_masks) = self._config.image_size, _objects(sample)
        if len(exact) == 0:
            return []
        size_hw = (sample.pixels.shape[0], sample.pixels.shape[1])
        boxes = torch.from_numpy(boxes_to_sam_frame(exact, size_hw=size_hw, image_size=side)).to(device)
        frame = image_to_sam_frame(sample.pixels, image_size=side)[None].to(device)
        low_res, predicted = module(frame, torch.zeros(len(exact), dtype=torch.int64, device=device), boxes)
        found = logits_to_masks(low_res[:, 0], size_hw=size_hw, input_hw=input_size_hw(size_hw, side), image_size=side)
        rows: list[tuple[float, float, float, float]] = []
        for box, mask, wanted, quality in zip(exact, found, wanted_masks, predicted[:, 0].tolist(), strict=True):
            shared, total = np.count_nonzero(mask & wanted), np.count_nonzero(mask) + np.count_nonzero(wanted)
            iou = float(shared / (total - shared))
            length = float(np.sqrt((box[2] - box[0]) * (box[3] - box[1])))
            rows.append((length, iou, float(2 * shared / total), abs(quality - iou)))
        return rows

    def export(self, state: Mapping[str, Tensor], directory: Path) -> None:
        """See `Task.export`; `MobileSam.load` reads the directory.

        Raises:
            WeightsError: the state is not that of this task's module; nothing is written.
        """
        official = {official_name(name.removeprefix(_PREFIX)): tensor for name, tensor in state.items()}
        save_mobile_sam(official, self._config, directory)


def _objects(sample: Sample) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Boxes (N, 4) and masks (N, H, W) of the objects that have pixels and a nonempty box."""
    if sample.masks is None:
        raise ValueError(f"the segmenter learns from masks, and image {sample.image_id} was loaded without")
    sides = sample.boxes_xyxy[:, 2:] - sample.boxes_xyxy[:, :2]
    kept = sample.masks.any(axis=(1, 2)) & (sides > 0).all(axis=1)
    return sample.boxes_xyxy[kept], sample.masks[kept]
