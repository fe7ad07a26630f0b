"""Identify files that cannot be decoded by their first bytes: other image formats, videos, documents."""

import re

_HEADS = (
    (b"\xff\x0a", "a JPEG XL file"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL file"),
    (b"8BPS", "a Photoshop file"),
    (b"\x76\x2f\x31\x01", "an OpenEXR file"),
    (b"#?RADIANCE", "a Radiance HDR file"),
    (b"\0\0\x01\0", "an icon"),
    (b"AT&TFORM", "a DjVu document"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"\x1a\x45\xdf\xa3", "a video (Matroska or WebM)"),
    (b"FLV\x01", "a video (FLV)"),
    (b"\0\0\x01\xba", "a video (MPEG)"),
    (b"\0\0\x01\xb3", "a video (MPEG)"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "a video (ASF)"),
    (b"OggS", "an Ogg file (sound or video)"),
    (b"ID3", "a sound file"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
)
_BRANDS = {
    "a HEIC file": (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"heif"),
    "an AVIF file that is damaged or truncated": (b"avif", b"avis"),
    "a Canon CR3 raw file": (b"crx ",),
}
"""Kinds of ISO media files by the brand in their first box; files with other brands are videos."""
_TEXTS = (
    (
        re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*|<!DOCTYPE[^>]*>\s*)*<([\w-]+:)?svg[\s>]", re.S | re.I),
        "an SVG drawing",
    ),
    (
        re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!DOCTYPE html|html|head|body)\b", re.S | re.I),
        "an HTML page",
    ),
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer whose file was never fetched"),
)
_LOOKED_AT = 4096
"""Bytes at the start of a file that are searched for text patterns."""


def other_kind(data: bytes) -> str | None:
    """Describe, for a message, a file that `decode` does not accept; None if its kind is unknown."""
    if data[4:8] == b"ftyp":
        return next((kind for kind, brands in _BRANDS.items() if data[8:12] in brands), "a video (MP4 or QuickTime)")
    kind = next((kind for head, kind in _HEADS if data.startswith(head)), None)
    text = data[:_LOOKED_AT].removeprefix(b"\xef\xbb\xbf")
    return kind or next((kind for pattern, kind in _TEXTS if pattern.match(text)), None)
