"""Cutting and pixels against the original image processor; pictures of every kind, and those that must not get in."""

import hashlib
import json
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_lora_lab.data.files import Inline, Limits
from vlm_lora_lab.data.slicing import (
    check_size,
    cut_of,
    load_image,
    overview_size,
    picture_size,
    tiles_of,
    to_patches,
    to_square,
)
from vlm_lora_lab.errors import InputError


def noise(width, height, seed):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8))


def cases(golden_root):
    table = json.loads((golden_root / "preprocess" / "slicing.json").read_text())
    return [{"scale_resolution": 448, "patch_size": 14} | r for r in [*table["combos"], *table["other_resolutions"]]]


def test_every_cut_equals_the_original(golden_root):
    rows = cases(golden_root)
    assert len(rows) == 118 and sum(r["grid_cols_rows"] is not None for r in rows) > 60
    for r in rows:
        cut = cut_of(r["width"], r["height"], r["scale_resolution"], r["patch_size"], r["max_slice_nums"])
        assert (list(cut.grid) if cut.grid else None) == r["grid_cols_rows"], r
        assert (
            list(cut.overview) == r["source_size_wh"] and (list(cut.tile) if cut.tile else None) == r["slice_size_wh"]
        ), r
        if "num_images" in r:
            assert cut.pictures == r["num_images"]
            sizes = [cut.overview, *([cut.tile] if cut.tile else [])]
            assert [[h // r["patch_size"], w // r["patch_size"]] for w, h in sizes] == r["tgt_sizes_hw"]
            if cut.grid:
                assert [cut.grid[0] * cut.tile[0], cut.grid[1] * cut.tile[1]] == r["refine_size_wh"]


def test_pixels_equal_the_original(golden_root):
    table = json.loads((golden_root / "preprocess" / "image_processor.json").read_text())
    assert len(table["cases"]) == 4
    for c in table["cases"]:
        image = noise(c["width"], c["height"], c["rng_seed"])
        cut = cut_of(c["width"], c["height"], c["scale_resolution"], c["patch_size"], c["max_slice_nums"])
        overview = np.asarray(tiles_of(image, cut)[0])
        assert hashlib.sha256(overview.tobytes()).hexdigest() == c["source_resized_uint8_sha256"]
        strips = to_patches(image, c["scale_resolution"], c["patch_size"], c["max_slice_nums"])
        assert [list(size) for _, size in strips] == c["tgt_sizes_hw"] and [list(s.shape) for s, _ in strips] == c[
            "pixel_shapes"
        ]
        for (strip, _), mean, std in zip(strips, c["pixel_mean"], c["pixel_std"]):
            assert (
                abs(strip.double().mean().item() - mean) < 1e-7
                and abs(strip.double().std().item() - std) < 2e-4 * std + 1e-6
            )
        for (strip, _), first in zip(strips, c["first_pixels"]):
            torch.testing.assert_close(strip.flatten()[:8], torch.tensor(first), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (7, 1399), (5000, 5000), (449, 448)])
@pytest.mark.parametrize("most", [0, 1, 2, 3, 9, 36])
def test_a_cut_is_whole_patches_and_not_more_slices_than_allowed(size, most):
    cut = cut_of(*size, 448, 14, most)
    assert all(side % 14 == 0 and side > 0 for side in (*cut.overview, *(cut.tile or (14, 14))))
    assert (cut.pictures - 1) <= max(most, 0) and (cut.grid is None) == (cut.tile is None)


def test_slices_put_together_are_the_picture():
    image = noise(300, 200, 0)
    cut = cut_of(300, 200, 112, 14, 9)
    (cols, rows), (w, h) = cut.grid, cut.tile
    tiles, whole = tiles_of(image, cut), image.resize((cols * w, rows * h), Image.Resampling.BICUBIC)
    again = Image.new("RGB", whole.size)
    for i, tile in enumerate(tiles[1:]):
        again.paste(tile, (i % cols * w, i // cols * h))
    assert again.tobytes() == whole.tobytes() and len(tiles) == 1 + cols * rows


def test_a_square_is_normalised_as_clip_wants_it():
    x = to_square(noise(60, 30, 0), 28)
    want = np.asarray(noise(60, 30, 0).resize((28, 28), Image.Resampling.BICUBIC)) / 255
    want = (want - np.array([0.48145466, 0.4578275, 0.40821073])) / np.array([0.26862954, 0.26130258, 0.27577711])
    torch.testing.assert_close(x, torch.from_numpy(want).permute(2, 0, 1).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tag", range(1, 9))
def test_every_orientation_is_turned_upright(tmp_path, tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    picture = Image.new("RGB", (20, 8), "white")
    picture.paste("black", (0, 0, 10, 4))
    picture.save(tmp_path / "x.png", exif=exif)
    image = load_image(tmp_path / "x.png")
    assert image.size == picture_size(tmp_path / "x.png") == ((8, 20) if tag > 4 else (20, 8))
    corners = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}
    x, y = corners[tag]
    assert image.getpixel((x * (image.width - 1), y * (image.height - 1))) == (0, 0, 0)


def test_sixteen_bits_keep_their_greys(tmp_path):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for name in ("x.png", "x.tif"):
        Image.fromarray(values).save(tmp_path / name)
        grey = np.asarray(load_image(tmp_path / name))[..., 0]
        assert np.abs(grey.astype(int) - (values >> 8)).max() == 0


def test_transparency_is_paper(tmp_path):
    for mode, colour in (("RGBA", (0, 0, 0, 0)), ("LA", (0, 0)), ("P", 0)):
        image = Image.new(mode, (4, 4), colour)
        image.save(tmp_path / "x.png", **({"transparency": 0} if mode == "P" else {}))
        assert load_image(tmp_path / "x.png").getpixel((1, 1)) == (255, 255, 255), mode


@pytest.mark.parametrize("kind", ["gif", "webp", "tif", "png"])
def test_of_several_frames_the_first_is_seen(tmp_path, kind):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    first.save(
        tmp_path / f"x.{kind}", save_all=True, append_images=[second], **({"lossless": True} if kind == "webp" else {})
    )
    assert Image.open(tmp_path / f"x.{kind}").n_frames == 2
    # Pillow's "red" of a GIF's palette is exact
    assert load_image(tmp_path / f"x.{kind}").getpixel((3, 3)) == (255, 0, 0)


def test_floats_and_wide_integers_need_a_meaning(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "fine.tif")
    assert load_image(tmp_path / "fine.tif").getpixel((0, 0)) == (128, 128, 128)
    for name, values in {
        "metres": np.full((4, 4), 7.5, np.float32),
        "nan": np.full((4, 4), np.nan, np.float32),
        "wide": np.full((4, 4), 70_000, np.int32),
    }.items():
        Image.fromarray(values).save(tmp_path / f"{name}.tif")
        with pytest.raises(InputError, match="bits"):
            load_image(tmp_path / f"{name}.tif")


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_colour_mode_becomes_rgb(mode):
    white = (
        Image.new("LAB", (4, 4), (255, 128, 128)) if mode == "LAB" else Image.new("RGB", (4, 4), "white").convert(mode)
    )
    image = load_image(white)
    assert image.mode == "RGB" and min(image.getpixel((1, 1))) >= 250


@pytest.mark.parametrize(
    "mode", ["LA", "La", "PA", "RGBA", "RGBa", "RGBX", "I", "F", "I;16", "I;16B", "I;16L", "I;16N"]
)
def test_no_mode_of_pillow_is_forgotten(mode):
    image = load_image(Image.new(mode, (4, 3)))
    assert image.mode == "RGB" and image.size == (4, 3)
    assert image.getpixel((0, 0)) == ((255, 255, 255) if mode in ("LA", "La", "PA", "RGBA", "RGBa") else (0, 0, 0))


def png(width, height, body=b""):
    "A PNG whose header claims a size."

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", body)
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(10_000, 10_000), (13_000, 7_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_before_it_unfolds(tmp_path, size, recwarn):
    (tmp_path / "bomb.png").write_bytes(png(*size))
    for read in (load_image, picture_size):
        with pytest.raises(InputError, match=r"pixels.*limit"):
            read(tmp_path / "bomb.png")
    assert not recwarn.list


def test_only_formats_that_hold_pixels_are_opened(tmp_path):
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(InputError, match="none of PNG"):
        load_image(tmp_path / "x.png")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own, about what it skips in a damaged TIFF
@pytest.mark.parametrize("seed", range(8))
def test_damaged_files_raise_nothing_else(tmp_path, seed):
    rng, outcomes = np.random.default_rng(seed), []
    for kind in ("png", "jpeg", "gif", "webp", "tiff", "bmp"):
        good = BytesIO()
        noise(40, 30, seed).save(good, kind)
        for _ in range(15):
            data = bytearray(good.getvalue())
            for i in rng.integers(0, len(data), 1 + rng.integers(12)):
                data[i] = rng.integers(256)
            data = bytes(data[: rng.integers(1, len(data) + 1)]) if rng.random() < 0.5 else bytes(data)
            try:
                outcomes.append(load_image(Inline(data), "a record").mode)
            except InputError as e:
                assert "a record" in str(e)
                outcomes.append("refused")
    assert {"RGB", "refused"} == set(outcomes)


def test_limits_are_limits():
    check_size(8000, 8000)
    for size in ((8000, 8001), (1, 201), (0, 5)):
        with pytest.raises(InputError):
            check_size(*size)
    with pytest.raises(InputError, match="the limit is 10"):
        load_image(Image.new("L", (5, 5)), limits=Limits(pixels=10))


def test_a_picture_may_stand_in_the_record():
    import base64

    file = BytesIO()
    noise(9, 5, 0).save(file, "PNG")
    address = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    assert (
        load_image(Inline(address)).tobytes()
        == load_image(Inline(file.getvalue())).tobytes()
        == noise(9, 5, 0).tobytes()
    )
    for bad in ("data:image/png;base64,@@", "data:image/png,abc", "data:"):
        with pytest.raises(InputError, match="base64"):
            load_image(Inline(bad), "a record")


def test_overview_is_never_below_a_patch():
    assert overview_size(1, 200, 56, 14) == (14, 784) and overview_size(1, 1, 448, 14) == (448, 448)
