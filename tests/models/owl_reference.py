"""What the tests of the detectors compare with: transformers' own objects, and how far bf16 may be off."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import (
    AutoTokenizer,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    OwlViTForObjectDetection,
    OwlViTImageProcessor,
    OwlViTProcessor,
)

from owlsam_ray.config.inference import DetectorConfig
from owlsam_ray.models.owl import Owl
from owlsam_ray.models.owl_weights import Family, load_config, ready

CPU = torch.device("cpu")
Picture = NDArray[np.uint8]


class Official:
    """Processor, model and post-processing of transformers."""

    def __init__(self, directory: Path, model: Family) -> None:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        if model == "owlv2":
            self.processor: Any = Owlv2Processor(Owlv2ImageProcessor.from_pretrained(directory), tokenizer)
            self.model: Any = Owlv2ForObjectDetection.from_pretrained(directory).eval()
        else:
            self.processor = OwlViTProcessor(OwlViTImageProcessor.from_pretrained(directory), tokenizer)
            self.model = OwlViTForObjectDetection.from_pretrained(directory).eval()

    @torch.inference_mode()
    def detect(self, picture: Picture, prompts: list[str]) -> tuple[dict[str, Tensor], Tensor]:
        """Every patch's best prompt after post-processing; (Q, D) embeddings of the prompts, of length 1."""
        inputs = self.processor(text=[prompts], images=Image.fromarray(picture), return_tensors="pt")
        outputs = self.model(**inputs)
        found = self.processor.post_process_grounded_object_detection(
            outputs, threshold=-1.0, target_sizes=[picture.shape[:2]]
        )
        return found[0], outputs.text_embeds[0].clone()


def bf16_deviation(directory: Path, model: Family, picture: Picture) -> None:
    """Check that a tower in bf16 is as far from fp32 as its roundings explain, neither further nor at once equal.

    bf16 keeps 8 bits, so that a rounding is wrong by at most u = 2^-9 of the value. What a patch's features pass
    through is rounded n = 10 L + 6 times in a tower of L layers: each layer's two halves round norm, first product,
    attention or activation, second product and sum; before and after come patch product, sum, two norms, and two
    tokens' product. Errors are independent and the residual stream keeps the size of what is added, so they add up
    like a random walk: about u·sqrt(n) of the embedding's length. Twice that is allowed, a tenth demanded. Heads are
    in float32 and turn it into a change of (cosine + shift) of that size; a score's slope is scale / 4, which is at
    most 1 here, as is a box's slope.
    """
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        mine = Owl.load(directory, DetectorConfig(model=model, weights="-"), device=CPU, dtype=dtype)
        batch = mine.preprocess(picture)[None]
        embeddings, boxes, _ = mine.class_embeddings(batch)
        queries = ready(torch.randn(5, embeddings.shape[-1], generator=torch.Generator().manual_seed(0)))
        outputs.append((embeddings, boxes, mine.detect(batch, queries)[1]))
    assert all(tensor.dtype == torch.float32 for tensor in outputs[1])
    exact, rounded = outputs
    roundings = 10 * load_config(directory).vision_config.num_hidden_layers + 6
    expected = 2**-9 * roundings**0.5
    relative = float((exact[0] - rounded[0]).norm() / exact[0].norm())
    means = [float((one - other).abs().mean()) for one, other in zip(exact[1:], rounded[1:], strict=True)]
    print(f"embeddings {relative:.4f}, expected {expected:.4f}; boxes and scores {means}")
    assert 0.1 * expected < relative < 2 * expected
    assert all(0 < mean < 2 * expected for mean in means)
