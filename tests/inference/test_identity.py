"""The same labels however the work is cut: actors, shards, batches, batch mates."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from owlsam_ray.config.load import load_config
from owlsam_ray.config.run import RunConfig
from owlsam_ray.inference.decode import decode_image
from owlsam_ray.inference.detect import cap_detections, select_detections
from owlsam_ray.inference.load import open_engine
from owlsam_ray.inference.queries import EmbeddedQueries
from owlsam_ray.inference.segment import decode_boxes, pad_batch
from owlsam_ray.inference.suppress import suppress
from owlsam_ray.models.arithmetic import fix_arithmetic, restored_arithmetic
from owlsam_ray.models.load import find_models
from owlsam_ray.models.mobile_sam import MobileSam
from owlsam_ray.models.owl import Owl
from owlsam_ray.models.owl_text import embed_texts
from owlsam_ray.models.owl_weights import ready
from owlsam_ray.models.sam_frame import boxes_to_sam_frame, input_size_hw
from owlsam_ray.ops.masks import decode_rle, segments_from_logits
from owlsam_ray.parallel.allocation import allocate
from owlsam_ray.records import EncodedImage, Prediction
from owlsam_ray.schema import predictions_to_table
from owlsam_ray.vocabulary import resolve_vocabulary
from tests.runs import CATEGORIES, TinyRun, coco_bytes
from tests.seeded_owlvit import write_tiny as write_tiny_owl
from tests.seeded_sam import write_tiny as write_tiny_sam


@pytest.mark.slow
def test_one_actor_and_large_shards_give_the_bytes_of_small_ones(tiny: TinyRun, uninterrupted: bytes) -> None:
    """With one actor and shards of 8: see `test_pipeline`."""
    run = tiny.root / "large-shards"
    assert tiny.call("annotate", run, **{"resources.shard_size": 64})["shards"] == 5
    assert coco_bytes(tiny, run) == uninterrupted


def test_the_labels_are_worth_comparing(uninterrupted: bytes) -> None:
    tree = json.loads(uninterrupted)
    assert len(tree["images"]) > 300
    assert len(tree["annotations"]) > 1500
    assert len({annotation["category_id"] for annotation in tree["annotations"]}) == 4
    assert len({annotation["area"] for annotation in tree["annotations"]}) > 200


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    """The models give the same bits only with the number of threads that the engine sets."""
    with restored_arithmetic():
        fix_arithmetic(2)
        yield


@pytest.fixture(scope="module")
def images(tiny: TinyRun) -> list[EncodedImage]:
    folder = tiny.root / "data" / "images"
    tree = json.loads((tiny.root / "data" / "instances.json").read_text())
    return [EncodedImage(image["id"], (folder / image["file_name"]).read_bytes()) for image in tree["images"][:42]]


@pytest.fixture(scope="module")
def queries(tiny: TinyRun) -> torch.Tensor:
    return ready(embed_texts(tiny.root / "owlvit", [f"a {name}" for name in CATEGORIES]))


def annotate(
    tiny: TinyRun,
    queries: torch.Tensor,
    shards: Sequence[Sequence[EncodedImage]],
    *,
    settings: Sequence[str] = (),
    **batches: int,
) -> list[Prediction]:
    """Label several shards at once with one engine."""
    sizes = [f"resources.{name}={value}" for name, value in batches.items()]
    config: RunConfig = load_config([tiny.run_file], overrides=[*settings, *sizes])
    with (
        open_engine(
            config,
            allocate(config.resources, num_cpus=2, num_gpus=0),
            models=find_models(config.detector, config.segment),
            queries=EmbeddedQueries(resolve_vocabulary(config.vocabulary, []), queries),
        ) as engine,
        ThreadPoolExecutor(len(shards)) as pool,
    ):
        results = list(pool.map(lambda shard: engine.annotate(shard)[0], shards))
    return [row for rows in results for row in rows]


def test_rows_do_not_depend_on_batch_mates(tiny: TinyRun, images: list[EncodedImage], queries: torch.Tensor) -> None:
    """Whatever stands beside an image in a batch, and at whichever place: the same bits."""
    whole = annotate(tiny, queries, [images])
    rng = np.random.default_rng(5)
    for _ in range(3):
        order = rng.permutation(len(images))
        cuts = np.sort(rng.choice(np.arange(1, len(images)), 3, replace=False))
        parts = [[images[index] for index in part] for part in np.split(order, cuts)]
        mixed = {row.image_id: row for row in annotate(tiny, queries, parts)}
        again = predictions_to_table([mixed[row.image_id] for row in whole])
        assert again.equals(predictions_to_table(whole))


@pytest.mark.parametrize(
    "settings",
    [
        ["detector.model=owlv2", "detector.objectness=multiply", "segment.model=sam", "segment.masks=most_stable"],
        ["detector.preprocess=scenic", "detector.image_size=128", "segment.masks=best_of_three", "tiling.size=64"],
        ["suppress={strategy: soft_nms, threshold: null}", "segment.prompt=box_and_center", "tiling.size=48"],
        [
            "suppress={strategy: merge, across_labels: true}",
            "segment.fill_holes=9",
            "segment.min_area=40",
        ],
    ],
)
def test_other_choices_do_not_depend_on_batch_mates_either(
    tiny: TinyRun, images: list[EncodedImage], queries: torch.Tensor, tmp_path: Path, settings: list[str]
) -> None:
    if "detector.model=owlv2" in settings:
        write_tiny_owl(tmp_path / "owlv2", family="owlv2", side=128)
        write_tiny_sam(tmp_path / "sam")
        settings = [*settings, f"detector.weights={tmp_path / 'owlv2'}", f"segment.weights={tmp_path / 'sam'}"]
    whole = annotate(tiny, queries, [images[:24]], settings=settings)
    assert sum(len(row.detections) for row in whole) > 24
    order = np.random.default_rng(7).permutation(24)
    parts = [[images[index] for index in part] for part in np.split(order, [5, 11])]
    mixed = {row.image_id: row for row in annotate(tiny, queries, parts, settings=settings)}
    again = predictions_to_table([mixed[row.image_id] for row in whole])
    assert again.equals(predictions_to_table(whole))
    plain = predictions_to_table(annotate(tiny, queries, [images[:24]]))
    assert not plain.equals(again), "these settings change nothing"


def assert_close(row: Prediction, other: Prediction) -> int:
    """Matched boxes agree; a detection may be missing when its score is within 1e-5 of what ends the list."""
    assert row.size_hw == other.size_hw
    assert row.size_hw is not None
    matched = 0
    for mine, yours in ((row, other), (other, row)):
        edge = min((float(p.detections.scores.min()) for p in (mine, yours) if len(p.detections)), default=0.0)
        for index, score in enumerate(mine.detections.scores):
            same = (
                (yours.detections.labels == mine.detections.labels[index])
                & (np.abs(yours.detections.scores - score) <= 1e-5)
                & (np.abs(yours.detections.boxes_xyxy - mine.detections.boxes_xyxy[index]).max(axis=1) <= 1e-3)
            )
            if not same.any():
                assert abs(score - 0.3) <= 1e-5 or abs(score - edge) <= 1e-5, f"image {mine.image_id}, box {index}"
                continue
            one, two = mine.segments[index], yours.segments[int(np.flatnonzero(same)[0])]
            assert one is not None
            assert two is not None
            a, b = (decode_rle(segment.rle_counts, row.size_hw) for segment in (one, two))
            union = (a | b).sum()
            assert union == 0 or (a & b).sum() / union >= 0.999
            assert abs(one.predicted_iou - two.predicted_iou) <= 1e-4
            matched += 1
    return matched


def test_batches_of_1_4_and_7_agree(tiny: TinyRun, images: list[EncodedImage], queries: torch.Tensor) -> None:
    reference = annotate(tiny, queries, [images], detector_batch=4, segmenter_batch=4, decoder_batch=16)
    boxes = sum(len(row.detections) for row in reference)
    assert boxes > 100
    for batch, decoder_batch in ((1, 8), (7, 24)):
        rows = annotate(
            tiny, queries, [images], detector_batch=batch, segmenter_batch=batch, decoder_batch=decoder_batch
        )
        matched = sum(assert_close(row, other) for row, other in zip(reference, rows, strict=True))
        assert matched >= 2 * boxes - 4


@pytest.mark.slow
def test_two_actors_on_ray_give_the_bytes_of_one_process(undisturbed_on_ray: Path, uninterrupted: bytes) -> None:
    assert (undisturbed_on_ray / "coco" / "annotations.json").read_bytes() == uninterrupted


def test_files_add_nothing_to_the_engine(
    tiny: TinyRun, images: list[EncodedImage], queries: torch.Tensor, uninterrupted: bytes
) -> None:
    tree = json.loads(uninterrupted)
    for row in annotate(tiny, queries, [images]):
        annotations = [entry for entry in tree["annotations"] if entry["image_id"] == row.image_id]
        assert [entry["score"] for entry in annotations] == pytest.approx(row.detections.scores.tolist(), abs=1e-7)
        counts = [segment.rle_counts.decode() for segment in row.segments if segment is not None]
        assert [entry["segmentation"]["counts"] for entry in annotations] == counts


def test_the_engine_equals_one_image_after_another(
    tiny: TinyRun, images: list[EncodedImage], queries: torch.Tensor
) -> None:
    """The slow twin of the engine: no threads, nothing shared between images."""
    config = load_config([tiny.run_file])
    allocation = allocate(config.resources, num_cpus=2, num_gpus=0)
    device = torch.device("cpu")
    detector = Owl.load(tiny.root / "owlvit", config.detector, device=device, dtype=torch.float32)
    segmenter = MobileSam.load(str(tiny.root / "mobile_sam"), device=device, dtype=torch.float32)
    expected = []
    for image in images[:12]:
        assert image.data is not None
        pixels = decode_image(image.data, stated_hw=None, max_pixels=10**6).pixels
        size_hw = (pixels.shape[0], pixels.shape[1])
        boxes, scores = detector.detect(pad_batch([detector.preprocess(pixels)], allocation.detector_batch), queries)
        found = select_detections(
            detector.unscale(boxes[0], size_hw).numpy(),
            scores[0].numpy(),
            size_hw=size_hw,
            query_labels=np.arange(4),
            settings=config.detector,
        )
        found = cap_detections(suppress(found, config.suppress), config.detector.max_detections)
        in_frame = boxes_to_sam_frame(found.boxes_xyxy, size_hw=size_hw, image_size=segmenter.image_size)
        embeddings = segmenter.encode(pad_batch([segmenter.preprocess(pixels)], allocation.segmenter_batch))
        (masks,) = decode_boxes(
            segmenter,
            embeddings,
            [in_frame],
            input_sizes_hw=[input_size_hw(size_hw, segmenter.image_size)],
            batch_size=allocation.decoder_batch,
            settings=config.segment,
        )
        distinct = segments_from_logits(
            masks.logits,
            masks.predicted_iou,
            size_hw=size_hw,
            input_hw=input_size_hw(size_hw, segmenter.image_size),
            image_size=segmenter.image_size,
        )
        segments = [distinct[index] for index in masks.index.tolist()]
        expected.append(Prediction(image.image_id, size_hw, found, tuple(segments)))
    assert predictions_to_table(annotate(tiny, queries, [images[:12]])).equals(predictions_to_table(expected))


def test_stored_queries_are_the_text_towers(tiny: TinyRun, uninterrupted: bytes, queries: torch.Tensor) -> None:
    stored = load_file(Path(tiny.root) / "uninterrupted" / "query_embeddings.safetensors")["queries"]
    assert torch.equal(stored, queries)
