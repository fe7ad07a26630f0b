"""Damaged image files: sound ones, changed by a seeded mutator. Those that chance would not find are in
`tests/crafted_images.py`.

`python -m tests.bad_images SEED COUNT SIDE [FOLDER]` decodes them and tells what became of each; the folder holds
further originals.
"""

import io
import json
import random
import struct
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from tests.image_files import originals


class BadImage(NamedTuple):
    """A file."""

    name: str
    data: bytes


# The mutator


def _flip_bits(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    region = len(data) if chance.random() < 0.6 else min(len(data), 128)
    for _number in range(int(2 ** chance.uniform(0, 7))):
        data[chance.randrange(region)] ^= 1 << chance.randrange(8)


def _replace_run(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    start = chance.randrange(len(data))
    length = min(len(data) - start, int(2 ** chance.uniform(0, 12)))
    kind = chance.randrange(3)
    data[start : start + length] = (
        bytes(length) if kind == 0 else b"\xff" * length if kind == 1 else chance.randbytes(length)
    )


def _move_run(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    """Cut out, repeat, or insert some bytes: all that follows is shifted."""
    start = chance.randrange(len(data))
    run = bytes(data[start : start + int(2 ** chance.uniform(0, 10))])
    kind = chance.randrange(3)
    if kind == 0 and len(run) < len(data):
        del data[start : start + len(run)]
    else:
        data[start:start] = run * chance.choice((1, 2, 50)) if kind == 1 else chance.randbytes(len(run))


def _truncate(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    places = borders(bytes(data)) if chance.random() < 0.5 else [chance.randrange(len(data))]
    del data[max(1, chance.choice(places) + chance.choice((0, 0, -1, 1))) :]


def _other_header(data: bytearray, chance: random.Random, others: Sequence[bytes]) -> None:
    other = chance.choice(others)
    if chance.random() < 0.5:
        length = chance.choice((2, 4, 8, 16, 33, 64, 200))
        data[:length] = other[:length]
    else:
        mine, theirs = chance.choice(borders(bytes(data))), chance.choice(borders(other))
        data[mine:] = other[theirs:]


def _number(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    """An extreme number where the structure is dense."""
    at = max(0, chance.choice(borders(bytes(data))) + chance.randrange(-4, 16)) if chance.random() < 0.7 else 0
    at = min(at or chance.randrange(min(len(data), 200)), len(data) - 1)
    width, order = chance.choice((1, 2, 4, 4)), chance.choice(("<", ">"))
    top = 2 ** (8 * width)
    value = chance.choice((0, 1, top - 1, top // 2, top // 2 - 1, top // 256, 30_000 % top, 65_535 % top))
    data[at : at + width] = struct.pack(order + {1: "B", 2: "H", 4: "I"}[width], value)


def _size(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    """Another width and height in the place where this format has them."""
    sides = (0, 1, 2, 47, 300, 2000, 5000, 14_000, 65_535, 2**24, 2**31 - 1)
    width, height = chance.choice(sides), chance.choice(sides)
    short = struct.pack("<HH", width & 0xFFFF, height & 0xFFFF)
    if data.startswith(b"\x89PNG") and len(data) > 33:
        data[16:24] = struct.pack(">II", width, height)
    elif data.startswith(b"GIF8"):
        data[6:10] = short
        if (frame := data.find(b",")) > 0 and chance.random() < 0.5:
            data[frame + 5 : frame + 9] = short
    elif data.startswith(b"BM"):
        data[18:26] = struct.pack("<Ii", width, chance.choice((1, -1)) * height)
    elif data.startswith(b"RIFF"):
        if data[12:16] == b"VP8X":
            data[24:30] = struct.pack("<I", width & 0xFFFFFF)[:3] + struct.pack("<I", height & 0xFFFFFF)[:3]
        else:
            data[26:30] = short
    elif data.startswith(b"\xff\xd8"):
        frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
        if frame > 0:
            data[frame + 5 : frame + 9] = struct.pack(">HH", height & 0xFFFF, width & 0xFFFF)
    else:
        for tag in (b"\0\1", b"\1\1", b"\x42\1", b"\x43\1", b"\x16\1"):  # width, height, tile sides, rows of a strip
            at = data.find(tag, 8)
            if at > 0 and chance.random() < 0.7:
                data[at + 2 : at + 12] = struct.pack("<HII", 4, 1, chance.choice((width, height)))


def _join(data: bytearray, chance: random.Random, others: Sequence[bytes]) -> None:
    data += chance.choice(others)


MUTATIONS: tuple[Callable[[bytearray, random.Random, Sequence[bytes]], None], ...] = (
    _flip_bits,
    _replace_run,
    _move_run,
    _truncate,
    _other_header,
    _number,
    _size,
    _join,
)


def borders(data: bytes) -> list[int]:
    """Offsets where parts of a file begin, as far as its format tells; never none."""
    found = [0]
    if data.startswith(b"\x89PNG"):
        at = 8
        while at + 8 <= len(data):
            found.append(at)
            at += 12 + int.from_bytes(data[at : at + 4], "big")
    elif data.startswith(b"\xff\xd8"):
        found += [at for at in range(len(data) - 1) if data[at] == 0xFF and data[at + 1] not in (0, 0xFF)]
    elif data.startswith(b"RIFF"):
        at = 12
        while at + 8 <= len(data):
            found.append(at)
            at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
    elif data.startswith(b"GIF8"):
        found += [at for at in range(10, len(data)) if data[at] in b",!;"]
    elif data.startswith(b"II"):
        start = int.from_bytes(data[4:8], "little")
        count = int.from_bytes(data[start : start + 2], "little") if start < len(data) else 0
        found += [start + 2 + 12 * entry for entry in range(min(count, 60) + 1)]
    else:
        found += [2, 14, 18, 54]
    return [at for at in found if at < len(data)] or [0]


def right_checksums(data: bytes) -> bytes:
    """A PNG file whose chunks have the checksums that readers ask for; others as they are."""
    if not data.startswith(b"\x89PNG"):
        return data
    fixed, at = bytearray(data), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        fixed[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(fixed)


def mutated(seed: int, count: int, *, more: Sequence[bytes] = ()) -> Iterator[BadImage]:
    """`count` damaged files: an original, changed in one to three ways; `more`: further originals."""
    chance = random.Random(seed)
    named = [*originals().items(), *((f"real{number}.jpeg", data) for number, data in enumerate(more))]
    contents = [data for _, data in named]
    for number in range(count):
        name, content = named[number % len(named)]
        data = bytearray(content)
        done = []
        for _ in range(chance.choice((1, 1, 2, 3))):
            mutation = chance.choice(MUTATIONS)
            mutation(data, chance, contents)
            done.append(mutation.__name__.strip("_"))
        fixed = right_checksums(bytes(data)) if chance.random() < 0.7 else bytes(data)
        yield BadImage(f"{number:05d}-{'-'.join(done)}-{name}", fixed)


def corpus(seed: int, count: int, *, side: int, more: Sequence[bytes] = ()) -> Iterator[BadImage]:
    """All crafted files, and as many damaged ones as make `count`.

    `side`: of crafted pictures that are large and yet within limits; 0: no crafted ones.
    """
    from tests.crafted_images import crafted

    made = crafted(side) if side else ()
    by_hand = [BadImage(f"{number:03d}-{name}", data) for number, (name, data) in enumerate(made)]
    yield from by_hand
    yield from mutated(seed, count - len(by_hand), more=more)


# What becomes of them


def peak_bytes() -> int:
    """Most memory that this process has had since the last call."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def resident_bytes() -> int:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


def header_pixels(data: bytes, max_pixels: int) -> int:
    """Pixels that a file says it has; 0 when it does not, or has more than that."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = image.width * image.height
    except Exception:  # noqa: BLE001 (some are what is looked for, and Pillow alone is asked here)
        return 0
    return pixels if pixels <= max_pixels else 0


def main(seed: int, count: int, side: int, folder: str | None, *, max_pixels: int) -> None:
    """Decode each file; a line of JSON before (its name) and one after."""
    from owlsam_ray.errors import ImageError
    from owlsam_ray.inference.decode import decode_image

    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module=r"PIL\..*")  # as the package does
    more = [path.read_bytes() for path in sorted(Path(folder).iterdir())[:12]] if folder else []
    decode_image(originals()["rgb.png"], stated_hw=None, max_pixels=max_pixels)  # what is loaded once
    for image in corpus(seed, count, side=side, more=more):
        print(json.dumps({"name": image.name}), flush=True)
        before, began = resident_bytes(), time.process_time()
        peak_bytes()
        try:
            height, width, _ = decode_image(image.data, stated_hw=None, max_pixels=max_pixels).pixels.shape
            outcome = f"ok: {width}x{height}"
        except ImageError as error:
            outcome = error.reason
        spent = {"cpu_s": time.process_time() - began, "peak_mb": (peak_bytes() - before) / 1e6}
        size = {"pixels": header_pixels(image.data, max_pixels), "bytes": len(image.data)}
        print(json.dumps({"outcome": outcome, **size, **spent}), flush=True)


if __name__ == "__main__":
    from owlsam_ray.config.inference import DecodeConfig

    _seed, _count, _side = map(int, sys.argv[1:4])
    main(_seed, _count, _side, sys.argv[4] if sys.argv[4:] else None, max_pixels=DecodeConfig().max_pixels)
