"""Queries: ensembles and exemplars against the installed transformers."""

import json
import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou
from transformers import (
    AutoTokenizer,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    OwlViTForObjectDetection,
    OwlViTImageProcessor,
)

from owlsam_ray.config.inference import DetectorConfig
from owlsam_ray.config.vocabulary import Exemplar, VocabularyConfig
from owlsam_ray.errors import InputError
from owlsam_ray.inference.detect import select_detections
from owlsam_ray.inference.queries import embed_queries
from owlsam_ray.models.owl import Owl
from owlsam_ray.models.owl_exemplars import choose_patch, exemplar_embedding
from owlsam_ray.models.shipped import WEIGHTS
from owlsam_ray.sources.drawing import CATEGORIES, WITHHELD_SHAPE, Drawing, Split, draw
from owlsam_ray.vocabulary import Query, resolve_vocabulary
from tests.drawn_images import draw_image
from tests.seeded_owlvit import write_tiny

CPU = torch.device("cpu")
OWLVIT = DetectorConfig(weights="unused")
OWLV2 = DetectorConfig(weights="unused", model="owlv2")
Ensemble = Literal["embeddings", "logits"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("owlvit")
    write_tiny(path, seed=4)
    return path


@pytest.fixture(scope="module")
def owlv2_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("owlv2")
    write_tiny(path, seed=4, family="owlv2")
    return path


@pytest.fixture(scope="module")
def photos(shared: Path) -> list[Path]:
    """Three landscapes, three portraits."""
    root = shared / "data" / "coco_mini"
    entries = json.loads((root / "instances.json").read_text())["images"]
    wide = [root / "images" / entry["file_name"] for entry in entries if entry["width"] > entry["height"]]
    tall = [root / "images" / entry["file_name"] for entry in entries if entry["width"] < entry["height"]]
    return wide[:3] + tall[:3]


def pixels_of(file: Path) -> NDArray[np.uint8]:
    return np.array(Image.open(file).convert("RGB"))


def text_queries(*prompts: tuple[str, ...]) -> list[Query]:
    return [Query(label=label, prompts=texts) for label, texts in enumerate(prompts)]


def embed(directory: Path, queries: list[Query], ensemble: Ensemble = "embeddings") -> Tensor:
    return embed_queries(queries, detector_weights=directory, settings=OWLVIT, ensemble=ensemble)


# Texts


ENSEMBLES = [
    ("itap of a cat.", "a bad photo of the cat.", "art of the cat."),
    ("a traffic light",),
    ("the remote", "a remote seen from above"),
]


def official_units(directory: Path, prompts: tuple[str, ...]) -> Tensor:
    """(T, D) from transformers' text tower, normalised as its `forward` does."""
    model = OwlViTForObjectDetection.from_pretrained(directory).eval()
    inputs = AutoTokenizer.from_pretrained(directory)(list(prompts), padding="max_length", return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**inputs, pixel_values=torch.zeros(1, 3, 96, 96))
    units: Tensor = outputs.text_embeds[0]
    return units


def official_logits(directory: Path, batch: Tensor, queries: Tensor) -> Tensor:
    """(B, P, Q) from transformers' class head, which normalises the queries itself."""
    model = OwlViTForObjectDetection.from_pretrained(directory).eval()
    with torch.inference_mode():
        features = model.image_embedder(batch)[0].flatten(1, 2)
        logits: Tensor = model.class_predictor(features, queries.expand(len(batch), -1, -1))[0]
    return logits


@pytest.fixture(scope="module")
def batch(directory: Path) -> Tensor:
    detector = Owl.load(directory, OWLVIT, device=CPU, dtype=torch.float32)
    return torch.stack([detector.preprocess(np.array(draw_image(seed))) for seed in range(3)])


def scores(directory: Path, batch: Tensor, queries: Tensor) -> Tensor:
    return Owl.load(directory, OWLVIT, device=CPU, dtype=torch.float32).detect(batch, queries)[1]


def test_averaged_embeddings_equal_the_average_by_hand(directory: Path, batch: Tensor) -> None:
    found = embed(directory, text_queries(*ENSEMBLES), "embeddings")
    means = torch.stack([official_units(directory, prompts).mean(dim=0) for prompts in ENSEMBLES])
    torch.testing.assert_close(found, means / (means.norm(dim=1, keepdim=True) + 1e-6), rtol=0, atol=1e-6)
    expected = official_logits(directory, batch, means).sigmoid()
    torch.testing.assert_close(scores(directory, batch, found), expected, rtol=0, atol=1e-5)


def test_averaged_logits_equal_runs_of_their_own(directory: Path, batch: Tensor) -> None:
    """Every template is one run of the class head; the mean of their logits is what one query gives."""
    found = embed(directory, text_queries(*ENSEMBLES), "logits")
    expected = []
    for prompts in ENSEMBLES:
        units = official_units(directory, prompts)
        runs = [official_logits(directory, batch, unit[None])[..., 0] for unit in units]
        expected.append(torch.stack(runs).mean(dim=0).sigmoid())
    torch.testing.assert_close(scores(directory, batch, found), torch.stack(expected, dim=-1), rtol=0, atol=1e-5)
    lengths = found.norm(dim=1)
    assert lengths[1] == pytest.approx(1.0, abs=1e-5)
    assert float(lengths[[0, 2]].max()) < 0.999  # not normalised again


def test_the_ensembles_differ_but_for_single_prompts(directory: Path, batch: Tensor) -> None:
    both = [embed(directory, text_queries(*ENSEMBLES), ensemble) for ensemble in ("embeddings", "logits")]
    assert torch.equal(both[0][1], both[1][1])
    first, second = (scores(directory, batch, queries) for queries in both)
    assert float((first - second)[..., [0, 2]].abs().max()) > 1e-3


def test_synonyms_and_own_prompts_give_one_label(directory: Path, batch: Tensor) -> None:
    """Through the class head and the selection: a box has one detection of a label, at its best query."""
    fields: dict[str, Any] = {
        "categories": [
            {"id": 3, "name": "cat", "synonyms": ["kitty", "house cat"]},
            {"id": 4, "name": "cup", "prompts": ["mug", "a cup of tea."]},
        ],
        "templates": ["the {}", "a {}"],
    }
    vocabulary = resolve_vocabulary(VocabularyConfig.model_validate(fields), [])
    found = embed_queries(vocabulary.queries, detector_weights=directory, settings=OWLVIT, ensemble="logits")
    labels = np.array(vocabulary.query_labels)
    assert labels.tolist() == [0, 0, 0, 1, 1]
    table = scores(directory, batch, found)[0].numpy()
    boxes = np.tile(np.array([[0, 0, 9, 9]], np.float32), (len(table), 1))
    config = DetectorConfig(weights="unused", score_floor=0.0)
    selected = select_detections(boxes, table, size_hw=(9, 9), query_labels=labels, settings=config)
    assert len(selected) == 2 * len(table)
    best = sorted([*table[:, :3].max(axis=1).tolist(), *table[:, 3:].max(axis=1).tolist()], reverse=True)
    assert selected.scores.tolist() == best
    assert len(set(selected.prompt_ids.tolist())) > 2  # not always the first query of a label


# Exemplars


def theirs(model: Any, processor: Any, query: NDArray[np.uint8], target: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """(D,) of transformers' `embed_image_query`, and (P,) scores of its `image_guided_detection`."""
    inputs = processor(images=[Image.fromarray(query)], return_tensors="pt")["pixel_values"]
    other = processor(images=[Image.fromarray(target)], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        feature_map = model.image_embedder(inputs)[0]
        embedding = model.embed_image_query(feature_map.flatten(1, 2), feature_map)[0]
        outputs = model.image_guided_detection(pixel_values=other, query_pixel_values=inputs)
    return embedding[0].flatten(), outputs.logits.sigmoid().flatten()


@pytest.mark.parametrize("family", ["owlvit", "owlv2"])
def test_whole_pictures_equal_transformers(
    family: str, directory: Path, owlv2_directory: Path, photos: list[Path]
) -> None:
    path, settings = (directory, OWLVIT) if family == "owlvit" else (owlv2_directory, OWLV2)
    kind, processor_kind = (
        (OwlViTForObjectDetection, OwlViTImageProcessor)
        if family == "owlvit"
        else (Owlv2ForObjectDetection, Owlv2ImageProcessor)
    )
    official, processor = kind.from_pretrained(path).eval(), processor_kind.from_pretrained(path)
    detector = Owl.load(path, settings, device=CPU, dtype=torch.float32)
    queries = [Query(label=0, prompts=(), exemplar=Exemplar(category="thing", image=str(file))) for file in photos]
    found = embed_queries(queries, detector_weights=path, settings=settings, ensemble="embeddings")
    for row, file in enumerate(photos):
        target = pixels_of(photos[row - 1])
        embedding, expected = theirs(official, processor, pixels_of(file), target)
        mine = exemplar_embedding(detector, pixels_of(file), None)
        torch.testing.assert_close(mine, embedding, rtol=0, atol=1e-4)
        mine_scores = detector.detect(detector.preprocess(target)[None], found[row : row + 1])[1]
        torch.testing.assert_close(mine_scores.flatten(), expected, rtol=0, atol=1e-5)
    assert len({tuple(row.tolist()) for row in found}) == len(photos)


def choose_loop(embeddings: Tensor, proposed: Tensor, wanted: Tensor) -> int:
    """One patch after the other, in numbers of Python."""

    def overlap(box: list[float], generalised: bool) -> float:
        x0, y0, x1, y1 = wanted[0].tolist()
        inner = max(0.0, min(x1, box[2]) - max(x0, box[0])) * max(0.0, min(y1, box[3]) - max(y0, box[1]))
        union = (x1 - x0) * (y1 - y0) + (box[2] - box[0]) * (box[3] - box[1]) - inner
        hull = (max(x1, box[2]) - min(x0, box[0])) * (max(y1, box[3]) - min(y0, box[1]))
        return inner / union - ((hull - union) / hull if generalised else 0.0)

    values = [overlap(box, False) for box in proposed.tolist()]
    if max(values) == 0:
        values = [overlap(box, True) for box in proposed.tolist()]
    best = max(values)
    candidates = [i for i, value in enumerate(values) if value >= min(best, 0.8 * best)]
    mean = embeddings.double().mean(dim=0)
    return min(candidates, key=lambda i: float(embeddings[i].double() @ mean))


def test_the_choice_of_a_patch_equals_a_loop() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    chosen = set()
    for round_ in range(200):
        corners = torch.rand(20, 2, 2, generator=generator)
        proposed = torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)
        embeddings = torch.randn(20, 8, generator=generator)
        wanted = torch.tensor([[0.1, 0.2, 0.6, 0.5]]) + (2.0 if round_ % 2 else 0.0)  # every second overlaps nothing
        chosen.add(choose_patch(embeddings, proposed, wanted))
        assert choose_patch(embeddings, proposed, wanted) == choose_loop(embeddings, proposed, wanted)
    assert len(chosen) > 5


def test_the_odd_one_of_the_overlapping_is_chosen() -> None:
    """Two boxes fit; one looks like everything else."""
    proposed = torch.tensor([[0, 0, 1, 1], [0.0, 0, 0.5, 0.5], [0.02, 0, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9]])
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.0]])
    assert choose_patch(embeddings, proposed, torch.tensor([[0, 0, 0.5, 0.5]])) == 2
    assert choose_patch(embeddings, proposed, torch.tensor([[0.65, 0.6, 0.9, 0.9]])) == 3


@pytest.mark.parametrize("preprocess", ["hf", "scenic"])
@pytest.mark.parametrize("family", ["owlvit", "owlv2"])
def test_a_box_in_a_picture(
    family: str, preprocess: str, directory: Path, owlv2_directory: Path, photos: list[Path]
) -> None:
    """The box of a patch finds that patch's neighbourhood: compared in original pixels, whatever the preprocessing."""
    path = directory if family == "owlvit" else owlv2_directory
    settings = DetectorConfig.model_validate({"weights": "unused", "model": family, "preprocess": preprocess})
    detector = Owl.load(path, settings, device=CPU, dtype=torch.float32)
    for file in photos:
        pixels = pixels_of(file)
        height, width, _ = pixels.shape
        outputs = detector.class_embeddings(detector.preprocess(pixels)[None])
        embeddings, boxes = outputs[0][0], outputs[1][0]
        proposed = detector.unscale(boxes, (height, width))
        wanted = (0.1 * width, 0.3 * height, 0.5 * width, 0.9 * height)
        expected = embeddings[choose_loop(embeddings, proposed, torch.tensor([wanted]))]
        torch.testing.assert_close(exemplar_embedding(detector, pixels, wanted), expected, rtol=0, atol=0)
        if family == "owlvit":  # all of the picture, which is not all of a padded square
            everything = choose_loop(embeddings, proposed, torch.tensor([[0, 0, width, height]]))
            assert torch.equal(exemplar_embedding(detector, pixels, None), embeddings[everything])


def test_exemplars_beside_and_instead_of_text(directory: Path, tmp_path: Path) -> None:
    draw_image(5).save(tmp_path / "cat.png")
    fields: dict[str, Any] = {
        "categories": ["cat", "dog"],
        "exemplars": [
            {"category": "cat", "image": str(tmp_path / "cat.png"), "box": [3, 4, 40, 30]},
            {"category": "cat", "image": f"file://{tmp_path}/cat.png"},
        ],
    }
    both = resolve_vocabulary(VocabularyConfig.model_validate(fields), [])
    assert both.query_labels == (0, 0, 0, 1)
    found = embed_queries(both.queries, detector_weights=directory, settings=OWLVIT, ensemble="embeddings")
    assert (found.shape, found.dtype, found.device) == ((4, 32), torch.float32, CPU)
    assert not found.is_inference()
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        found[[0, 3]], embed(directory, text_queries(("a photo of a cat",), ("a photo of a dog",))), rtol=0, atol=1e-6
    )
    detector = Owl.load(directory, OWLVIT, device=CPU, dtype=torch.float32)
    for row, box in ((1, (3, 4, 40, 30)), (2, None)):
        raw = exemplar_embedding(detector, np.array(draw_image(5)), box)
        torch.testing.assert_close(found[row], raw / (raw.norm() + 1e-6), rtol=0, atol=0)
    instead = resolve_vocabulary(VocabularyConfig.model_validate(fields | {"exemplars_replace_text": True}), [])
    assert instead.query_labels == (0, 0, 1)
    again = embed_queries(instead.queries, detector_weights=directory, settings=OWLVIT, ensemble="embeddings")
    assert torch.equal(again[:2], found[1:3])


def test_a_picture_finds_what_no_word_does(tmp_path: Path) -> None:
    """The demo's detector never learned the word heart. One picture of a thing names hearts, and the rest still."""
    weights, settings = WEIGHTS / "detector", DetectorConfig(weights=str(WEIGHTS / "detector"))
    texts = [Query(label=label, prompts=(category.name,)) for label, category in enumerate(CATEGORIES)]
    shown: dict[int, Query] = {}
    for index in range(1000, 1150):
        drawing = draw(2, Split.TEST, index)
        for label, box in zip(drawing.labels.tolist(), boxes_of(drawing), strict=True):
            if label not in shown and min(box[2] - box[0], box[3] - box[1]) >= 30:
                file = tmp_path / f"{index}.png"
                Image.fromarray(drawing.pixels).save(file)
                shown[label] = exemplar_query(file, box)
    assert len(shown) == len(CATEGORIES)
    detector = Owl.load(weights, settings, device=CPU, dtype=torch.float32)
    right: dict[str, list[bool]] = {f"{kind} {what}": [] for kind in ("text", "picture") for what in ("heart", "other")}
    for kind, queries in (("text", texts), ("picture", [shown[label] for label in range(len(CATEGORIES))])):
        embeddings = embed_queries(queries, detector_weights=weights, settings=settings, ensemble="embeddings")
        for index in range(60):
            drawing = draw(2, Split.TEST, index)
            boxes, table = detector.detect(detector.preprocess(drawing.pixels)[None], embeddings)
            found = detector.unscale(boxes[0], (drawing.pixels.shape[0], drawing.pixels.shape[1]))
            overlaps = box_iou(torch.tensor(boxes_of(drawing)), found)
            for label, overlap in zip(drawing.labels.tolist(), overlaps, strict=True):
                patch = (overlap * table[0].amax(dim=1)).argmax()  # fits, and is sure of something
                what = "heart" if CATEGORIES[label].name.endswith(WITHHELD_SHAPE) else "other"
                right[f"{kind} {what}"].append(int(table[0, patch].argmax()) == label)
    share = {name: sum(values) / len(values) for name, values in right.items()}
    print(share, {name: len(values) for name, values in right.items()})
    assert share["text heart"] < 0.05
    assert share["picture heart"] > 0.2  # one of 42 by chance
    assert share["picture other"] > 0.8


def boxes_of(drawing: Drawing) -> list[tuple[float, float, float, float]]:
    """Tight half-open boxes of what is on a picture."""
    found = []
    for mask in drawing.masks:
        y, x = np.nonzero(mask)
        found.append((float(x.min()), float(y.min()), float(x.max() + 1), float(y.max() + 1)))
    return found


def test_boxes_are_in_the_upright_picture(directory: Path, tmp_path: Path) -> None:
    """A picture that its EXIF data turns: the query is that of the turned pixels."""
    picture = draw_image(6).resize((90, 50))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn clockwise
    picture.save(tmp_path / "turned.png", exif=exif)
    picture.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    found = embed(
        directory, [exemplar_query(tmp_path / name, (5, 60, 45, 88)) for name in ("turned.png", "upright.png")]
    )
    assert torch.equal(found[0], found[1])


def exemplar_query(file: Path | str, box: tuple[float, float, float, float] | None = None) -> Query:
    return Query(label=0, prompts=(), exemplar=Exemplar(category="cat", image=str(file), box=box))


def test_the_model_is_loaded_once_and_only_for_exemplars(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    load = Owl.load

    def counted(path: Path, settings: DetectorConfig, *, device: torch.device, dtype: torch.dtype) -> Owl:
        loaded.append(path)
        return load(path, settings, device=device, dtype=dtype)

    monkeypatch.setattr(Owl, "load", staticmethod(counted))
    embed(directory, text_queries(("a cat",)))
    assert loaded == []
    draw_image(1).save(tmp_path / "a.png")
    embed(directory, [exemplar_query(tmp_path / "a.png"), exemplar_query(tmp_path / "a.png", (0, 0, 9, 9))])
    assert loaded == [directory]


@pytest.mark.parametrize(
    ("name", "box", "words"),
    [
        ("gone.png", None, "does not exist: a relative path"),
        ("folder", None, "cannot be read"),
        ("text.png", None, "cannot be decoded: not_an_image"),
        ("empty.png", None, "cannot be decoded: empty_file"),
        ("good.png", (0, 0, 60.5, 10), "60 x 40 pixels when upright, but its box [0.0, 0.0, 60.5, 10.0] exceeds it"),
        ("good.png", (10, 10, 20, 41), "exceeds it"),
        ("good.png", (-1, 10, 20, 40), "exceeds it"),
    ],
)
def test_exemplars_that_cannot_be_used(
    name: str, box: tuple[float, float, float, float] | None, words: str, directory: Path, tmp_path: Path
) -> None:
    draw_image(1).resize((60, 40)).save(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError) as caught:
        embed(directory, [*text_queries(("a cat",)), exemplar_query(tmp_path / name, box)])
    assert f"vocabulary.exemplars: the image {tmp_path / name} of 'cat'" in str(caught.value)
    assert words in str(caught.value)


def test_a_box_may_touch_the_border(directory: Path, tmp_path: Path) -> None:
    draw_image(1).resize((60, 40)).save(tmp_path / "good.png")
    found = embed(
        directory, [exemplar_query(tmp_path / "good.png", (0, 0, 60, 40)), exemplar_query(tmp_path / "good.png")]
    )
    assert torch.equal(found[0], found[1])
