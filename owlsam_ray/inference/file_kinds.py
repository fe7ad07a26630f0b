"""What a file is that is not decoded, from its first bytes: a picture of another format, a video, a document."""

import re

_HEADS = (
    (b"\xff\x0a", "a JPEG XL picture"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture"),
    (b"8BPS", "a Photoshop picture"),
    (b"\x76\x2f\x31\x01", "an OpenEXR picture"),
    (b"#?RADIANCE", "a Radiance HDR picture"),
    (b"\0\0\x01\0", "an icon"),
    (b"AT&TFORM", "a DjVu document"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"\x1a\x45\xdf\xa3", "a video (Matroska or WebM)"),
    (b"FLV\x01", "a video (FLV)"),
    (b"\0\0\x01\xba", "a video (MPEG)"),
    (b"\0\0\x01\xb3", "a video (MPEG)"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "a video (ASF)"),
    (b"OggS", "an Ogg file, of sound or a video"),
    (b"ID3", "a sound file"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
)
_BRANDS = {
    "a HEIC picture": (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"heif"),
    "an AVIF picture that is damaged or cut": (b"avif", b"avis"),
    "a Canon CR3 raw picture": (b"crx ",),
}
"""Of files in ISO's media format, by the brand in their first box; others hold videos."""
_TEXTS = (
    (
        re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*|<!DOCTYPE[^>]*>\s*)*<([\w-]+:)?svg[\s>]", re.S | re.I),
        "an SVG drawing",
    ),
    (
        re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!DOCTYPE html|html|head|body)\b", re.S | re.I),
        "an HTML page",
    ),
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer: its file was never fetched"),
)
_LOOKED_AT = 4096
"""Bytes of a text."""


def other_kind(data: bytes) -> str | None:
    """What a file seems to be that no format of `decode` accepts, for a message; None when nothing tells."""
    if data[4:8] == b"ftyp":
        return next((kind for kind, brands in _BRANDS.items() if data[8:12] in brands), "a video (MP4 or QuickTime)")
    kind = next((kind for head, kind in _HEADS if data.startswith(head)), None)
    text = data[:_LOOKED_AT].removeprefix(b"\xef\xbb\xbf")
    return kind or next((kind for pattern, kind in _TEXTS if pattern.match(text)), None)
