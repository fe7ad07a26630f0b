"""Small deterministic pictures with shapes and noise, for tests that need image files and no shared data."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


def draw_image(seed: int) -> Image.Image:
    """One picture of 48 to 96 pixels a side."""
    random = np.random.default_rng(seed)
    width, height = (int(side) for side in random.integers(48, 97, 2))
    base = random.integers(0, 256, 3)
    pixels = np.clip(base + random.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    for _ in range(int(random.integers(1, 5))):
        x, y = random.integers(0, width - 8), random.integers(0, height - 8)
        box = [int(x), int(y), int(x + random.integers(6, width // 2)), int(y + random.integers(6, height // 2))]
        shape = draw.ellipse if random.random() < 0.5 else draw.rectangle
        shape(box, fill=tuple(int(value) for value in random.integers(0, 256, 3)))
    return image


def draw_picture(path: Path, height: int, width: int, *, seed: int) -> None:
    """Write one picture of a given size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_image(seed).resize((width, height)).save(path)


def draw_images(directory: Path, count: int, *, seed: int = 0) -> list[str]:
    """Write JPEG and PNG files, some in subfolders; returns their names relative to `directory`."""
    names = []
    for number in range(count):
        name = f"{'ab'[number % 2]}/{number:05d}.{'png' if number % 5 == 0 else 'jpg'}"
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_image(seed * 100_003 + number).save(path)
        names.append(name)
    return names


def draw_coco(directory: Path, count: int, *, seed: int = 0) -> dict[str, object]:
    """Write `images/` and an `instances.json` that lists them; returns its content."""
    names = draw_images(directory / "images", count, seed=seed)
    images = []
    for number, name in enumerate(names):
        with Image.open(directory / "images" / name) as image:
            size = {"height": image.height, "width": image.width}
        images.append(
            {"id": 1000 + 7 * number, "file_name": name, **size, "license": 1, "source_page": f"page/{number}"}
        )
    content: dict[str, object] = {
        "info": {"description": "drawn", "year": 2026},
        "licenses": [{"id": 1, "name": "none"}],
        "images": images,
        "annotations": [],
        "categories": [{"id": 3, "name": "cat", "supercategory": "animal"}, {"id": 9, "name": "dog"}],
    }
    (directory / "instances.json").write_text(json.dumps(content), encoding="utf-8")
    return content
