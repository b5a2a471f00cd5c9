"The size by the header is the size after decoding, wherever a word on orientation stands in a file."

import io
import itertools
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin, features

from vlm_lora_lab.data.files import Inline
from vlm_lora_lab.data.slicing import load_image, picture_size
from vlm_lora_lab.errors import InputError

WIDE = Image.fromarray(np.random.RandomState(0).randint(0, 256, (8, 20, 3), dtype=np.uint8))
ORIENTATIONS = range(1, 9)


def exif(n):
    words = Image.Exif()
    words[0x0112] = n
    return words.tobytes()


def xmp(n, element=False):
    said = f"><tiff:Orientation>{n}</tiff:Orientation></rdf:Description>" if element else f' tiff:Orientation="{n}"/>'
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/"{said}</rdf:RDF></x:xmpmeta>'
    ).encode()


def saved(kind, image=WIDE, **more):
    file = io.BytesIO()
    pages = {"append_images": [i.copy() for i in more["append_images"]]} if "append_images" in more else {}
    image.copy().save(file, kind, **more | pages)  # Pillow leaves words of one format on a picture that it has saved
    return file.getvalue()


def block(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(before=(), behind=()):
    "A PNG with blocks in front of its pixels and behind them."
    data = saved("PNG")
    first, last = data.index(b"IDAT") - 4, data.index(b"IEND") - 4
    return (
        data[:first]
        + b"".join(block(*b) for b in before)
        + data[first:last]
        + b"".join(block(*b) for b in behind)
        + data[last:]
    )


def raw_profile(n, kind=b"zTXt"):
    "EXIF as ImageMagick wrote it before there was a block for it."
    data = exif(n)
    text = f"\nexif\n{len(data):8}\n{data.hex()}\n".encode()
    return kind, b"Raw profile type exif\0" + (b"\0" + zlib.compress(text) if kind == b"zTXt" else text)


def png_xmp(n, element=False):
    return b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(n, element)


def webp(*blocks):
    "A WebP with EXIF or XMP at its end, behind the pixels, which is where the format wants them."
    data = saved("WEBP", exif=exif(1))
    at = data.index(b"EXIF")
    flags = {b"EXIF": 8, b"XMP ": 4}
    head = bytearray(data[:at])
    head[20] = (head[20] & ~12) | sum(flags[k] for k, _ in blocks)
    body = bytes(head) + b"".join(k + struct.pack("<I", len(d)) + d + b"\0" * (len(d) % 2) for k, d in blocks)
    return body[:4] + struct.pack("<I", len(body) - 8) + body[8:]


def agree(data):
    "Both sizes; raises when they differ, in memory, in a file, or of a picture that Pillow has opened."
    by_header, decoded = picture_size(Inline(data)), load_image(Inline(data)).size
    lazy = Image.open(io.BytesIO(data))
    assert by_header == decoded == picture_size(lazy) == load_image(lazy).size == picture_size(lazy), (
        by_header,
        decoded,
    )
    assert decoded == ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size
    return decoded


def upright(n):
    return (8, 20) if n > 4 else (20, 8)


PLACES = {
    "JPEG EXIF": lambda n: saved("JPEG", exif=exif(n)),
    "JPEG XMP": lambda n: saved("JPEG", xmp=xmp(n)),
    "JPEG XMP element": lambda n: saved("JPEG", xmp=xmp(n, True)),
    "MPO": lambda n: saved("MPO", exif=exif(n), save_all=True, append_images=[WIDE.rotate(90, expand=True)]),
    "PNG eXIf": lambda n: png([(b"eXIf", exif(n)[6:])]),
    "PNG eXIf behind": lambda n: png(behind=[(b"eXIf", exif(n)[6:])]),
    "PNG XMP": lambda n: png([png_xmp(n)]),
    "PNG XMP element": lambda n: png([png_xmp(n, True)]),
    "PNG XMP behind": lambda n: png(behind=[png_xmp(n)]),
    "PNG raw profile": lambda n: png([raw_profile(n)]),
    "PNG raw profile behind": lambda n: png(behind=[raw_profile(n)]),
    "PNG raw profile as text behind": lambda n: png(behind=[raw_profile(n, b"tEXt")]),
    "WebP EXIF": lambda n: saved("WEBP", exif=exif(n)),
    "WebP EXIF behind": lambda n: webp((b"EXIF", exif(n))),
    "WebP XMP behind": lambda n: webp((b"XMP ", xmp(n))),
    "TIFF tag": lambda n: saved("TIFF", tiffinfo={274: n}),
    "TIFF tag, compressed": lambda n: saved("TIFF", tiffinfo={274: n}, compression="tiff_lzw"),
    "TIFF tag, pages": lambda n: saved("TIFF", tiffinfo={274: n}, save_all=True, append_images=[WIDE]),
    "TIFF XMP": lambda n: saved("TIFF", tiffinfo={700: xmp(n)}),
    "AVIF EXIF": lambda n: saved("AVIF", exif=exif(n)),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_word_on_orientation_is_found_wherever_it_stands(place):
    if place.startswith("AVIF") and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    for n in ORIENTATIONS:
        assert agree(PLACES[place](n)) == upright(n), n


def test_words_that_disagree_are_settled_alike():
    "EXIF against XMP, in front against behind; whichever Pillow follows, header and pixels follow it."
    for a, b in itertools.product((1, 3, 6, 8), (1, 5, 6)):
        e, x = (b"eXIf", exif(a)[6:]), png_xmp(b)
        late = (b"eXIf", exif(b)[6:])
        for data in (
            png([e, x]),
            png([x, e]),
            png([e], [x]),
            png([x], [e]),
            png([e], [late]),
            png(behind=[e, x]),
            png([raw_profile(a)], [late]),
            saved("JPEG", exif=exif(a), xmp=xmp(b)),
            webp((b"EXIF", exif(a)), (b"XMP ", xmp(b))),
            saved("TIFF", tiffinfo={274: a, 700: xmp(b)}),
            saved("TIFF", tiffinfo={274: a}, exif=exif(b)),
        ):
            agree(data)


def test_moving_pictures_and_pages():
    other = WIDE.transpose(Image.Transpose.ROTATE_90).resize(WIDE.size)
    for n in (1, 6):
        for kind, more in (
            ("GIF", {}),
            ("WEBP", {"exif": exif(n)}),
            ("PNG", {"exif": exif(n)}),
            ("TIFF", {"tiffinfo": {274: n}}),
            ("MPO", {"exif": exif(n)}),
        ):
            agree(saved(kind, save_all=True, append_images=[other, WIDE], **more))


def test_values_that_mean_nothing():
    for n in (0, 9, 255):
        for place in PLACES:
            if not place.startswith(("AVIF", "MPO", "TIFF tag,")):  # these cannot be written with such a value
                assert agree(PLACES[place](n)) == (20, 8), (place, n)


@pytest.mark.parametrize("seed", range(6))
def test_random_files(seed):
    "Blocks in random order and number, also cut off or with changed bytes: both sizes, or both refused."
    rng = random.Random(seed)
    makers = [
        lambda n: (b"eXIf", exif(n)[6:]),
        png_xmp,
        raw_profile,
        lambda n: raw_profile(n, b"tEXt"),
        lambda n: (b"tEXt", b"Comment\0Orientation"),
        lambda n: (b"tIME", bytes(7)),
    ]

    def some():
        return [rng.choice(makers)(rng.randrange(10)) for _ in range(rng.randrange(4))]

    for _ in range(40):
        data = (
            png(some(), some())
            if rng.random() < 0.7
            else PLACES[rng.choice([p for p in PLACES if p[:4] not in ("AVIF", "MPO")])](rng.randrange(1, 9))
        )
        if rng.random() < 0.3:
            data = bytearray(data)
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            data = bytes(data)
        try:
            want = load_image(Inline(data)).size
        except InputError:
            continue  # the header alone may look sound
        assert picture_size(Inline(data)) == want


def test_the_header_decodes_nothing_where_nothing_stands_behind(monkeypatch):
    "A comment behind the pixels, as many programs write it, costs no decoding."
    data = png(
        [(b"eXIf", exif(6)[6:])],
        [(b"tEXt", b"date:create\0today"), (b"zTXt", b"Comment\0\0" + zlib.compress(b"Raw profile type exif"))],
    )
    assert agree(data) == (8, 20)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decoded"))
    assert picture_size(Inline(data)) == (8, 20)
