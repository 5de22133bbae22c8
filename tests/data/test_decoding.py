import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from moth_jax.data import decoding
from moth_jax.data.decoding import UnreadableImageError, check_header, decode_image, make_framing
from moth_jax.errors import InputError

WHOLE = make_framing(image_size=8, resize=8)


def picture(width, height, seed=0):
    """A smooth colour picture, as photographs are; noise would hide nothing and compress badly."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, [6, 5, 3], np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return io.BytesIO(file.getvalue())


def decoded(image, framing=WHOLE, kind="PNG", **options):
    return decode_image(encoded(image, kind, **options), framing, name="picture")


def flat(mode, colour):
    return Image.new(mode, (8, 8), colour)


SIZES = [(300, 200), (200, 301), (31, 97), (256, 256), (256, 400), (1000, 33), (57, 57), (64, 73)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"image_size": 64}, {"image_size": 64, "resize": 67}], ids=str
)
def test_pixels_are_those_of_the_preset_of_torchvision_weights(size, options):
    pytest.importorskip("tests.helpers.torchvision_shim")
    presets = pytest.importorskip("torchvision.transforms._presets")
    framing, image = make_framing(**options), picture(*size)
    preset = presets.ImageClassification(
        crop_size=framing.image_size,
        resize_size=framing.resize,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    expected = (preset(image).numpy().transpose(1, 2, 0) * 255).round().astype(np.uint8)
    np.testing.assert_array_equal(decoded(image, framing), expected)


@pytest.mark.parametrize("interpolation", ["bicubic", "nearest"])
def test_other_interpolations_are_those_of_torchvision_too(interpolation):
    pytest.importorskip("tests.helpers.torchvision_shim")
    transforms = pytest.importorskip("torchvision.transforms")
    mode = transforms.InterpolationMode(interpolation)
    image = picture(91, 120)
    expected = transforms.CenterCrop(56)(transforms.Resize(64, mode)(image))
    framing = make_framing(image_size=56, interpolation=interpolation)
    np.testing.assert_array_equal(decoded(image, framing), np.asarray(expected))


@pytest.mark.parametrize(
    ("image_size", "resize"), [(224, 256), (299, 342), (64, 73), (32, 37), (8, 9)]
)
def test_the_shorter_side_is_by_default_that_of_torchvision_weights(image_size, resize):
    assert make_framing(image_size=image_size).resize == resize


def test_stretching_keeps_the_margin_and_the_crop_does_not():
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (6, 0, 26, 16))
    assert decoded(image).min() == 255
    stretched = decoded(image, make_framing(image_size=8, fit="stretch"))
    assert stretched.shape == (8, 8, 3)
    assert stretched[:, 0].max() == 0
    assert stretched[:, 4].min() == 255


SIXTEEN_BITS = Image.fromarray(np.full([8, 8], 257 * 90, np.uint16))
KINDS = {
    "grey": (flat("L", 90), "PNG", {}, (90, 90, 90)),
    "grey of 16 bits": (SIXTEEN_BITS, "PNG", {}, (90, 90, 90)),
    "grey of 16 bits in PPM": (SIXTEEN_BITS, "PPM", {}, (90, 90, 90)),
    "black and white": (flat("1", 1), "PNG", {}, (255, 255, 255)),
    "palette": (flat("RGB", (0, 64, 128)).quantize(4), "PNG", {}, (0, 64, 128)),
    "opaque": (flat("RGBA", (10, 20, 30, 255)), "PNG", {}, (10, 20, 30)),
    "transparent": (flat("RGBA", (10, 20, 30, 0)), "PNG", {}, (255, 255, 255)),
    "half transparent": (flat("RGBA", (0, 0, 255, 51)), "PNG", {}, (204, 204, 255)),
    "grey with transparency": (flat("LA", (10, 0)), "PNG", {}, (255, 255, 255)),
    "transparent colour": (flat("P", 0), "PNG", {"transparency": 0}, (255, 255, 255)),
    "CMYK": (flat("CMYK", (0, 0, 0, 0)), "JPEG", {}, (255, 255, 255)),
    "PPM": (flat("RGB", (1, 2, 3)), "PPM", {}, (1, 2, 3)),
    "BMP": (flat("RGB", (1, 2, 3)), "BMP", {}, (1, 2, 3)),
    "WebP": (flat("RGB", (1, 2, 3)), "WEBP", {"lossless": True}, (1, 2, 3)),
}


@pytest.mark.parametrize(("image", "kind", "options", "colour"), KINDS.values(), ids=KINDS)
def test_every_kind_of_image_becomes_rgb(image, kind, options, colour):
    framing = WHOLE._replace(white=65535)
    pixels = decoded(image, framing, kind=kind, **options)
    assert (pixels.shape, pixels.dtype) == ((8, 8, 3), np.uint8)
    np.testing.assert_allclose(pixels, np.broadcast_to(colour, pixels.shape), atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_photographs_are_turned_upright(orientation, kind):
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 8, 4))  # upright: the sky is bright
    turned = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[decoding._ORIENTATION] = orientation
    lying = image.transpose(turned[orientation]) if orientation > 1 else image
    pixels = decoded(lying, kind=kind, exif=exif)
    assert pixels[:3].min() > 200
    assert pixels[-3:].max() < 50


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_orientation_leaves_the_picture_as_it_lies():
    pixels = decoded(picture(8, 8), kind="JPEG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff")
    assert pixels.shape == (8, 8, 3)


def damaged_files():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, [64, 64, 3], np.uint8))
    jpeg, png = (encoded(noise, kind).getvalue() for kind in ("JPEG", "PNG"))
    broken = png[:60] + b"\xff" * 500 + png[560:]
    enormous = b"P6 100000 100000 255\n"
    return {
        "empty": (b"", True, "no JPEG, PNG, PPM, BMP or WebP image"),
        "a web page": (b"<!DOCTYPE html><html>not found</html>", True, "no JPEG, PNG"),
        "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", True, "no JPEG"),
        "a JPEG cut short": (jpeg[: len(jpeg) // 2], False, "truncated"),
        "a PNG cut short": (png[: len(png) // 2], False, "truncated"),
        "a PNG cut in its header": (png[:20], True, "."),
        "a damaged PNG": (broken, False, "."),
        "enormous": (enormous, True, "exceeds limit"),
    }


DAMAGED = damaged_files()


@pytest.mark.parametrize(("content", "shows_in_header", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_what_is_no_image_is_refused_by_name_and_reason(content, shows_in_header, reason):
    message = rf"^cats/1\.jpg cannot be read \(.*{reason}.*\); delete or replace it"
    with pytest.raises(UnreadableImageError, match=message):
        decode_image(io.BytesIO(content), WHOLE, name="cats/1.jpg")
    if shows_in_header:
        with pytest.raises(UnreadableImageError, match=message):
            check_header(io.BytesIO(content), name="cats/1.jpg")
    else:
        check_header(io.BytesIO(content), name="cats/1.jpg")


def test_a_file_that_is_gone_is_refused_by_name(tmp_path):
    path = str(tmp_path / "gone.png")
    for read in (check_header, lambda path, name: decode_image(path, WHOLE, name=name)):
        with pytest.raises(InputError, match=r"gone\.png cannot be read \(No such file"):
            read(path, name=path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size must be 1 to 8192 pixels, got 0"),
        ({"resize": 200}, "resize must be 0 or at least image_size, 224, got 200"),
        ({"fit": "pad"}, "unknown fit 'pad'; choose one of: crop, stretch"),
        ({"fit": "stretch", "resize": 256}, "fit='stretch' does not crop"),
        ({"interpolation": "cubic"}, "unknown interpolation 'cubic'; choose one of: bicubic"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        make_framing(**options)


def deep_png(values):
    """A PNG file of 16 bits for each value, of the arrays that Pillow cannot write as such."""
    height, width = values.shape[:2]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[1 if values.ndim == 2 else values.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name, content):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def deep_pgm(values):
    kind = "P5" if values.ndim == 2 else "P6"
    return (
        f"{kind} {values.shape[1]} {values.shape[0]} 65535\n".encode()
        + values.astype(">u2").tobytes()
    )


@pytest.mark.parametrize("write", [deep_png, deep_pgm])
@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3)], ids=["grey", "colour"])
@pytest.mark.parametrize("white", [255, 4095, 65535])
def test_images_of_16_bits_are_scaled_by_their_white(write, shape, white, tmp_path):
    values = np.random.default_rng(0).integers(0, white + 1, shape, np.uint16)
    values[0, 0] = white
    (tmp_path / "deep.png").write_bytes(write(values))
    path = str(tmp_path / "deep.png")
    assert decoding.largest_value(path, name=path) == white
    pixels = decode_image(path, WHOLE._replace(white=white), name=path)
    expected = values.reshape(8, 8, -1) / white * 255
    np.testing.assert_allclose(pixels, np.broadcast_to(expected, pixels.shape), atol=1.0)
    if white < 65535:
        np.testing.assert_array_equal(pixels, np.broadcast_to(expected.round(), pixels.shape))
    with pytest.raises(UnreadableImageError, match="16 bits, and nothing says which value is wh"):
        decode_image(path, WHOLE, name=path)
    if white > 255:
        with pytest.raises(UnreadableImageError, match=f"largest value is {white}, white is 255"):
            decode_image(path, WHOLE._replace(white=255), name=path)


def test_transparency_of_16_bits_is_not_guessed(tmp_path):
    path = tmp_path / "deep.png"
    for channels in (2, 4):
        path.write_bytes(deep_png(np.full([8, 8, channels], 4000, np.uint16)))
        with pytest.raises(UnreadableImageError, match="16 bits and transparency"):
            decode_image(path, WHOLE._replace(white=4095), name="deep")


def test_what_a_file_says_of_its_white_is_believed():
    values = np.full([8, 8, 3], 2000, ">u2").tobytes()
    for header, count in (("P6 8 8 4000", 3), ("P5 8 8 4000", 1)):
        file = io.BytesIO(f"{header}\n".encode() + values[: 128 * count])
        assert set(decode_image(file, WHOLE, name="x").ravel()) <= {127, 128}


def test_a_deep_image_lies_as_its_note_says(tmp_path):
    values = np.zeros([8, 8], np.uint16)
    values[:4] = 4095
    image, exif = Image.fromarray(values), Image.Exif()
    exif[decoding._ORIENTATION] = 3
    image.save(tmp_path / "x.png", exif=exif)
    pixels = decode_image(tmp_path / "x.png", WHOLE._replace(white=4095), name="x")
    assert pixels[:4].max() == 0
    assert pixels[4:].min() == 255


@pytest.mark.parametrize("size", [(1, 65000), (65000, 1), (2, 60000)])
def test_a_thin_image_is_not_made_larger_than_memory(size):
    thin = encoded(Image.new("RGB", size))
    with pytest.raises(UnreadableImageError, match="whose shorter side becomes 256, are more than"):
        decode_image(thin, make_framing(), name="thin")
    whole = decode_image(thin, make_framing(image_size=8, fit="stretch"), name="thin")
    assert whole.shape == (8, 8, 3)


def test_an_image_of_too_many_pixels_is_refused_before_they_are_read(tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(encoded(Image.new("1", (8193, 8193))).getvalue())
    for read in (check_header, lambda path, name: decode_image(path, WHOLE, name=name)):
        with pytest.raises(UnreadableImageError, match="8193 x 8193 pixels are more than the 67,"):
            read(path, name="large")


def test_pipes_and_devices_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero"):
        with pytest.raises(UnreadableImageError, match="no regular file"):
            decode_image(path, WHOLE, name="x")


@pytest.mark.parametrize("options", [{"image_size": 10**9}, {"image_size": 8, "resize": 10**9}])
def test_no_image_is_resized_to_more_than_fits(options):
    with pytest.raises(InputError, match=r"8192 pixels, got 1000000000"):
        make_framing(**options)
