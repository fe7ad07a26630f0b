"""Records: what becomes of a fetched image."""

import pytest

from owlsam_ray.errors import FailureClass, ImageError
from owlsam_ray.records import EncodedImage


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", memoryview(b"\xff\xd8")])
def test_bytes_are_the_data_of_an_image(data: bytes | memoryview) -> None:
    image = EncodedImage.of(data, image_id=7, height=480, width=640, note="size_changed: …")
    assert image == EncodedImage(7, data, stated_hw=(480, 640), note="size_changed: …")
    assert image.data is data


def test_an_error_is_the_failure_of_an_image() -> None:
    error = ImageError("fetch_timeout: no answer within 3 s", FailureClass.TRANSIENT)
    image = EncodedImage.of(error, image_id=7, height=480, width=640)
    assert image == EncodedImage(
        7, None, stated_hw=(480, 640), failure=("fetch_timeout: no answer within 3 s", FailureClass.TRANSIENT)
    )


@pytest.mark.parametrize(("height", "width"), [(None, None), (480, None), (None, 640)])
def test_half_a_size_is_none(height: int | None, width: int | None) -> None:
    assert EncodedImage.of(b"", image_id=7, height=height, width=width).stated_hw is None
