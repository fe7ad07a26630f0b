"""Train a detector: OwlViT or OWLv2 against boxes and the names of their categories.

Shapes: B images of a micro batch, Q prompts of it, L tokens of a prompt, S side of the detector's square input, N
objects of one image.

Source: the training of OWL-ViT (Minderer et al., 2022): bipartite matching, focal loss over the sampled prompts, L1 and
GIoU on the boxes, and a text tower with a hundredth of the learning rate.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from safetensors.torch import save
from torch import Tensor, nn
from torchvision.ops import box_convert

from owlsam_ray.coco_files.regions import Region
from owlsam_ray.config.base import Fraction, Name, PositiveInt, Section
from owlsam_ray.config.inference import DetectorConfig, SuppressConfig
from owlsam_ray.config.vocabulary import Category, check_template
from owlsam_ray.evaluate.average_precision import precision_recall
from owlsam_ray.evaluate.ground_truth import EvaluatedCategory, EvaluatedImage, GroundTruth
from owlsam_ray.evaluate.sizes import ALL, size_ranges
from owlsam_ray.finetune.data import Sample
from owlsam_ray.finetune.detector_module import DetectorModule, load_parts, scratch_parts
from owlsam_ray.finetune.matching import LossWeights, detection_losses, focal_loss
from owlsam_ray.finetune.scratch import OwlVitArchitecture
from owlsam_ray.inference.detect import cap_detections, select_detections
from owlsam_ray.inference.suppress import suppress
from owlsam_ray.models.hub import resolve_weights
from owlsam_ray.records import Detections
from owlsam_ray.storage import write_atomic

Part = Literal["text", "vision", "box_head", "class_head"]
_VALIDATION_BATCH = 16
_SMALL_SIDE = 32.0
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class DetectorTraining(Section):
    """How a detector is trained."""

    weights: Name | None = None
    """An OwlViT or OWLv2 to continue from: a directory in Hugging Face layout, or a hub name."""
    architecture: OwlVitArchitecture | None = None
    """Or the sizes of an OwlViT with random initial weights. Exactly one of the two."""
    template: Name = "a photo of a {}"
    """Prompt of a category; `{}` is replaced by its name. Must equal `vocabulary.templates` of later runs."""
    frozen: tuple[Part, ...] = ()
    """Parts that are not trained."""
    text_lr_scale: Weight = 0.01
    """Learning rate of the text tower relative to that of the image tower; 1 when starting from random weights."""
    heads_lr_scale: Weight = 1.0
    """Learning rate of the heads relative to that of the image tower."""
    max_prompts: PositiveInt = 100
    """Prompts of a micro batch: the categories on its images, and sampled ones that are not on them."""
    matches_per_object: PositiveInt = 1
    """Patches that learn one object. More learn faster, and leave several boxes per object to suppression."""
    quality_targets: bool = False
    """The class target of a patch is the IoU of its box instead of 1: scores then rank boxes by fit."""
    class_weight: Weight = 4.0
    """Weight of the focal loss."""
    l1_weight: Weight = 5.0
    """Weight of the L1 loss of boxes."""
    giou_weight: Weight = 2.0
    """Weight of the GIoU loss of boxes."""
    focal_alpha: Fraction = 0.75
    """Weight of matched pairs in the focal loss; the others have one minus it."""
    focal_gamma: Weight = 2.0
    """How strongly the focal loss discounts what is already right."""
    gradient_checkpointing: bool = False
    """Recompute activations of the towers instead of keeping them: less memory, a third more time."""
    validation_iou: Fraction = 0.6
    """Suppression threshold at validation."""

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if (self.weights is None) == (self.architecture is None):
            raise ValueError("detector needs either weights (to start from) or architecture (for random weights)")
        check_template(self.template)
        return self


class DetectorTask:
    """The `task.Task` that trains a detector."""

    best_metric = "val/box_ap"
    needs_masks = False

    def __init__(self, settings: DetectorTraining, categories: Sequence[Category], *, seed: int) -> None:
        """Load or build the model.

        Args:
            settings: how the detector is trained.
            categories: categories of the training set; labels of samples are indices into them.
            seed: seed of random initial weights.

        Raises:
            WeightsError: the weights do not load.
            InputError: a prompt is longer than the text tower accepts.
        """
        self.settings = settings
        self.categories = tuple(categories)
        prompts = [settings.template.format(category.name) for category in self.categories]
        if settings.architecture is not None:
            self.parts = scratch_parts(settings.architecture, prompts, seed=seed)
        else:
            self.parts = load_parts(resolve_weights(settings.weights or "", setting="detector.weights"))
        self.input_ids, self.attention_mask = self.parts.tokenize(prompts)
        model: Any = self.parts.module.model
        for part in settings.frozen:
            for parameter in _part(self.parts.module, part):
                parameter.requires_grad_(False)
        if settings.gradient_checkpointing:
            # Newer releases of transformers call it activation checkpointing, and warn about the old name.
            newer = getattr(model, "activation_checkpointing_enable", None)
            (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
        self._weights = LossWeights(settings.class_weight, settings.l1_weight, settings.giou_weight)

    @property
    def module(self) -> DetectorModule:
        """The trainable model."""
        return self.parts.module

    def collate(self, samples: Sequence[Sample], rng: np.random.Generator) -> dict[str, Any]:
        """Convert samples to pixels, the prompts of this batch, and targets; see `task.Task`."""
        present = sorted({int(label) for sample in samples for label in sample.labels})
        absent = np.setdiff1d(np.arange(len(self.categories)), present)
        room = max(0, min(self.settings.max_prompts - len(present), len(absent)))
        chosen = np.sort(np.concatenate([present, rng.choice(absent, room, replace=False)])).astype(np.int64)
        place = np.full(len(self.categories), -1)
        place[chosen] = np.arange(len(chosen))
        targets = [self._target_boxes(sample) for sample in samples]
        return {
            "image_ids": [sample.image_id for sample in samples],
            "pixels": torch.stack([self.parts.preprocessing(sample.pixels) for sample in samples]),
            "input_ids": self.input_ids[chosen],
            "attention_mask": self.attention_mask[chosen],
            "boxes": targets,
            "prompts": [torch.from_numpy(place[sample.labels]) for sample in samples],
        }

    def _target_boxes(self, sample: Sample) -> Tensor:
        """(N, 4) float32 cxcywh in units of the detector's square input."""
        height, width = self.parts.preprocessing.frame_hw((sample.pixels.shape[0], sample.pixels.shape[1]))
        scaled = torch.from_numpy(sample.boxes_xyxy) / torch.tensor([width, height, width, height])
        return box_convert(scaled, "xyxy", "cxcywh").float()

    def inputs(self, batch: dict[str, Any]) -> tuple[Any, ...]:
        """See `task.Task`."""
        return batch["pixels"], batch["input_ids"], batch["attention_mask"]

    def loss(self, outputs: dict[str, Tensor], batch: dict[str, Any]) -> dict[str, Tensor]:
        """Focal, L1 and GIoU loss; for OWLv2 also the focal loss of objectness. See `task.Task`."""
        settings = self.settings
        parts, matches = detection_losses(
            outputs["logits"],
            outputs["boxes"],
            batch["boxes"],
            batch["prompts"],
            weights=self._weights,
            per_object=settings.matches_per_object,
            focal_alpha=settings.focal_alpha,
            focal_gamma=settings.focal_gamma,
            quality_targets=settings.quality_targets,
        )
        # A batch without objects still gives every parameter a gradient: other workers wait for it.
        parts["loss"] = parts["loss"] + 0.0 * outputs["boxes"].sum()
        if "objectness" in outputs:
            scores = outputs["objectness"].float()
            targets = torch.zeros_like(scores)
            targets[matches[0], matches[1]] = 1.0
            objectness = focal_loss(scores, targets, alpha=settings.focal_alpha, gamma=settings.focal_gamma).sum()
            objectness = objectness / max(1, len(matches[0]))
            parts["loss"] = parts["loss"] + settings.class_weight * objectness
            parts["loss_objectness"] = objectness.detach()
        return parts

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Separate groups for towers and heads, each with and without weight decay; see `task.Task`."""
        text = {id(parameter) for parameter in _part(self.module, "text")}
        vision = {id(parameter) for parameter in _part(self.module, "vision")}
        groups: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                part = "text" if id(parameter) in text else "vision" if id(parameter) in vision else "heads"
                decays = parameter.ndim >= 2 and "embedding" not in name
                hidden = parameter.ndim == 2 and ".encoder.layers." in name
                groups.setdefault((part, decays, hidden), []).append(parameter)
        scales = {"text": self.settings.text_lr_scale, "vision": 1.0, "heads": self.settings.heads_lr_scale}
        return [
            {"name": part, "params": parameters, "lr_scale": scales[part], "hidden_matrices": hidden}
            | ({} if decays else {"weight_decay": 0.0})
            for (part, decays, hidden), parameters in groups.items()
        ]

    @torch.inference_mode()
    def validate(self, module: nn.Module, samples: Iterable[Sample], *, device: torch.device) -> dict[str, float]:
        """Box AP over all categories, through the selection and suppression of inference; see `task.Task`."""
        if not isinstance(module, DetectorModule):
            raise TypeError(f"validate takes a DetectorModule, not a {type(module).__name__}")
        training = module.training
        module.eval()
        queries = module.embed(self.input_ids.to(device), self.attention_mask.to(device))
        truth: list[Region] = []
        found: list[Region] = []
        sizes: dict[int, EvaluatedImage] = {}
        for batch in _in_groups(samples, _VALIDATION_BATCH):
            pixels = torch.stack([self.parts.preprocessing(sample.pixels) for sample in batch]).to(device)
            outputs = module.propose(pixels, queries)
            boxes, scores = outputs["boxes"].cpu(), outputs["logits"].sigmoid().cpu().numpy()
            for sample, of_image, of_scores in zip(batch, boxes, scores, strict=True):
                detections = self._detect(sample, of_image, of_scores)
                sizes[sample.image_id] = EvaluatedImage((), (sample.pixels.shape[0], sample.pixels.shape[1]))
                truth += _regions(sample.image_id, sample.boxes_xyxy, sample.labels, np.ones(len(sample.labels)))
                found += _regions(sample.image_id, detections.boxes_xyxy, detections.labels, detections.scores)
        module.train(training)
        names = {index: EvaluatedCategory(each.name, "", None) for index, each in enumerate(self.categories)}
        counted = precision_recall(
            GroundTruth("validation", sizes, names, truth, has_masks=False, is_lvis=False),
            found,
            "bbox",
            ranges=size_ranges([_SMALL_SIDE]),
            by_box_area=True,
        )
        small, large = (label for label in counted.ranges if label != ALL)
        return {
            "val/box_ap": counted.ap() or 0.0,
            "val/box_ap50": counted.ap(iou=0.5) or 0.0,
            "val/box_ap_small": counted.ap(size=small) or 0.0,
            "val/box_ap50_small": counted.ap(size=small, iou=0.5) or 0.0,
            "val/box_ap_large": counted.ap(size=large) or 0.0,
            "val/box_ap50_large": counted.ap(size=large, iou=0.5) or 0.0,
        }

    def _detect(self, sample: Sample, boxes: Tensor, scores: NDArray[np.float32]) -> Detections:
        """Convert proposals of one image, (P, 4) and (P, Q), to detections in original pixels."""
        size_hw = (sample.pixels.shape[0], sample.pixels.shape[1])
        found = select_detections(
            self.parts.preprocessing.unscale(boxes, size_hw).numpy(),
            scores,
            size_hw=size_hw,
            query_labels=np.arange(len(self.categories)),
            settings=DetectorConfig(weights="-", score_floor=0.01),
        )
        settings = SuppressConfig(strategy="nms", threshold=self.settings.validation_iou)
        return cap_detections(suppress(found, settings), 100)

    def export(self, state: Mapping[str, Tensor], directory: Path) -> None:
        """Write a directory in Hugging Face layout; see `task.Task`."""
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {
            name.removeprefix("model."): tensor.detach().to("cpu", torch.float32).contiguous()
            for name, tensor in state.items()
        }
        write_atomic(str(directory / "model.safetensors"), save(tensors, metadata={"format": "pt"}))
        self.parts.tokenizer.save_pretrained(directory)
        self.parts.processor.save_pretrained(directory)
        model: Any = self.module.model
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(directory)


def _in_groups(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    """Yield lists of at most `size` samples."""
    iterator = iter(samples)
    while group := list(islice(iterator, size)):
        yield group


def _regions(
    image_id: int, boxes_xyxy: NDArray[np.float32], labels: NDArray[np.int64], scores: NDArray[Any]
) -> list[Region]:
    """Boxes of one image in the form that the evaluation takes."""
    return [
        Region(image_id, label, (x0, y0, x1 - x0, y1 - y0), (x1 - x0) * (y1 - y0), None, score)
        for (x0, y0, x1, y1), label, score in zip(boxes_xyxy.tolist(), labels.tolist(), scores.tolist(), strict=True)
    ]


def _part(module: DetectorModule, part: Part) -> list[nn.Parameter]:
    """Parameters of a part."""
    backbone: Any = module.backbone
    model: Any = module.model
    modules: dict[Part, tuple[nn.Module, ...]] = {
        "text": (backbone.text_model, backbone.text_projection),
        "vision": (backbone.vision_model, model.layer_norm),
        "box_head": (model.box_head,),
        "class_head": (model.class_head,),
    }
    return [parameter for one in modules[part] for parameter in one.parameters()]
