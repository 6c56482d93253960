"""Image files: how deep they are, what they are called and linked to, and what is left of damaged ones."""

import contextlib
import os
import socket
import stat
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageFile

from dfkde_sklearn._images import as_images, image_suffixes
from dfkde_sklearn._report.contact_sheet import TILE, Section, Tile, contact_sheet


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def pixels(X):
    """Return what every picture of X shows, as uint8 arrays (H, W, 3)."""
    images = as_images(X)
    return [np.array(images[i]) for i in range(len(images))]


# Files that Pillow does not write


def png_of_16_bits(values):
    """Return a PNG file of uint16 (H, W, C), its channels grey, grey and alpha, colour, or colour and alpha."""
    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = values.astype(">u2").reshape(height, -1)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def tiff(values, *, photometric, bits=None, planar=1, order="<"):
    """Return an uncompressed TIFF file of values (H, W) or (H, W, 3): bytes, 16-bit integers or 32-bit floats."""
    height, width = values.shape[:2]
    samples = 1 if values.ndim == 2 else values.shape[2]
    planes = np.moveaxis(values, 2, 0) if planar == 2 else values
    data = planes.astype(values.dtype.newbyteorder(order)).tobytes()
    if bits == 12:
        # Two samples in three bytes.
        nibbles = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(-1, 2), axis=1)[:, 4:]
        data = np.packbits(nibbles).tobytes()
    bits = bits or 8 * values.dtype.itemsize
    bits_at = 8 + len(data)
    strips_at = bits_at + 2 * samples
    counts_at = strips_at + 4 * samples
    n_strips = samples if planar == 2 else 1
    size = len(data) // n_strips
    starts = [8 + i * size for i in range(n_strips)]
    entries = [
        (256, 3, 1, width),
        (257, 3, 1, height),
        (258, 3, samples, bits if samples == 1 else bits_at),
        (259, 3, 1, 1),
        (262, 3, 1, photometric),
        (273, 4, n_strips, starts[0] if n_strips == 1 else strips_at),
        (277, 3, 1, samples),
        (278, 3, 1, height),
        (279, 4, n_strips, size if n_strips == 1 else counts_at),
        (284, 3, 1, planar),
        (339, 3, 1, 3 if values.dtype.kind == "f" else 1),
    ]
    directory = struct.pack(order + "H", len(entries))
    for tag, kind, count, value in entries:
        short = kind == 3 and count == 1
        directory += struct.pack(order + "HHI", tag, kind, count) + struct.pack(
            order + ("HH" if short else "I"), *((value, 0) if short else (value,))
        )
    after = struct.pack(f"{order}{samples}H", *[bits] * samples)
    after += struct.pack(f"{order}{samples}I", *(starts + [0] * (samples - n_strips)))
    after += struct.pack(f"{order}{samples}I", *[size] * samples)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    start = struct.pack(order + "I", 8 + len(data) + len(after))
    return mark + start + data + after + directory + b"\0\0\0\0"


def damaged(data, rng):
    """Return a file's bytes with one thing wrong: bits, a stretch, the end, or a number at its beginning."""
    data, kind = bytearray(data), rng.integers(6)
    start = int(rng.integers(len(data)))
    length = int(rng.integers(1, 33))
    if kind == 0:
        for at in rng.integers(len(data), size=int(rng.integers(1, 9))):
            data[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        data[start : start + length] = rng.bytes(length)
    elif kind == 2:
        del data[start:]
    elif kind == 3:
        del data[start : start + length]
    elif kind == 4:
        data[start:start] = data[start : start + length]
    else:
        at = int(rng.integers(min(len(data), 64)))
        data[at : at + 4] = [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"][
            rng.integers(4)
        ]
    return bytes(data)


# 16 bits


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("white", [1023, 4095, 65535])
def test_16_bit_png_is_scaled_from_the_white_level_in_grey_and_in_colour(rng, tmp_path, channels, white):
    values = rng.integers(0, white + 1, (7, 9, channels)).astype(np.uint16)
    (tmp_path / "deep.png").write_bytes(png_of_16_bits(values))
    colours = values[..., : 3 if channels > 2 else 1]
    shown = np.array(as_images(tmp_path, white)[0])
    np.testing.assert_array_equal(shown, np.broadcast_to(np.round(colours / white * 255), (7, 9, 3)))


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_colour_tiff_is_rounded_and_not_cut_off(rng, tmp_path, order):
    values = rng.integers(0, 65536, (7, 9, 3)).astype(np.uint16)
    (tmp_path / "deep.tif").write_bytes(tiff(values, photometric=2, order=order))
    np.testing.assert_array_equal(pixels(tmp_path)[0], np.round(values / 65535 * 255))


def test_white_level_holds_for_arrays_tensors_and_pil_images_and_clips_what_is_above():
    values = np.array([[0, 1023, 2046, 4095, 5000, 65535]], np.uint16).repeat(2, 0)[None]
    for X in (values, torch.from_numpy(values), [Image.fromarray(values[0])], [values[0].astype(">u2")]):
        np.testing.assert_array_equal(np.array(as_images(X, 4095)[0])[0, :, 0], [0, 64, 127, 255, 255, 255])
    eight = np.full((1, 5, 5), 200, np.uint8)
    for X in (eight, eight / 255):
        assert np.array(as_images(X, 100)[0])[0, 0, 0] == 200


@pytest.mark.parametrize(("dtype", "white"), [(np.uint8, 255), (np.uint16, 65535), (np.float32, 1)])
def test_white_is_zero_tiff_is_turned_around_whatever_its_depth(tmp_path, dtype, white):
    values = np.linspace(0, white, 12).reshape(3, 4).astype(dtype)
    path = tmp_path / "negative.tif"
    path.write_bytes(tiff(values, photometric=0))
    expected = np.round((white - values) / white * 255)
    with Image.open(path) as picture:
        for X in ([path], [picture]):
            np.testing.assert_array_equal(pixels(X)[0][..., 0], expected)


def test_tiff_of_12_bits_is_scaled_from_its_own_range(tmp_path):
    values = np.array([[0, 1000, 2048, 4095]], np.uint16)
    (tmp_path / "packed.tif").write_bytes(tiff(values, photometric=1, bits=12))
    for white in (4095, 65535):
        np.testing.assert_array_equal(np.array(as_images(tmp_path, white)[0])[0, :, 0], [0, 62, 128, 255])


def test_planar_tiff_of_8_bits_is_read_and_of_16_bits_refused(rng, tmp_path):
    values = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    (tmp_path / "planar.tif").write_bytes(tiff(values, photometric=2, planar=2))
    np.testing.assert_array_equal(pixels(tmp_path)[0], values)
    path = tmp_path / "planar.tif"
    path.write_bytes(tiff(values.astype(np.uint16) * 257, photometric=2, planar=2))
    with Image.open(path) as picture:
        for X in ([path], [picture]):
            with pytest.raises(ValueError, match="channels of 16 bits lie one after the other"):
                as_images(X)[0]


def test_dark_16_bit_images_are_warned_of_and_others_not():
    def read(brightest, white):
        images = as_images(np.full((2, 5, 5), brightest, np.uint16), white)
        images[1]
        return images

    with pytest.warns(UserWarning, match=r"is 4000, under a sixteenth .* 17 of 256 .* 12 bits.* white_level=4095"):
        read(4000, 65535).warn_of_white_level()
    with pytest.warns(UserWarning, match="white_level=1023"):
        read(1000, 65535).warn_of_white_level()
    with pytest.warns(UserWarning, match="is 5000, and all values above white_level=4095"):
        read(5000, 4095).warn_of_white_level()
    for brightest, white in ((4096, 65535), (4000, 4095), (0, 65535), (256, 4095)):
        read(brightest, white).warn_of_white_level()
    dark = as_images(np.ones((1, 5, 5), np.uint8))
    dark[0]
    dark.warn_of_white_level()


# Floats


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_beyond_0_to_1_by_rounding_are_clipped_and_by_more_refused(dtype):
    for low, high in ((-1e-7, 1.00000024), (-0.0019, 1.0019)):
        X = np.array([[low, 0.5], [1, high]], dtype)[None]
        np.testing.assert_array_equal(pixels(X)[0][..., 0], [[0, 128], [255, 255]])
    for low, high, message in ((-0.004, 1, r"from -0\.0040?.* to 1\."), (0, 1.004, r"from 0 to 1\.00[34]")):
        with pytest.raises(ValueError, match=rf"{message}.*Allowed: \[0, 1\], and 0\.002 on each side"):
            as_images(np.array([[low, 0.5], [1, high]], dtype)[None])[0]


def test_tensors_that_torchvision_has_resized_are_images():
    from torchvision.transforms import v2

    white = v2.functional.resize(torch.ones(1, 3, 150, 150), [47, 47], antialias=True)
    assert white.max() > 1
    np.testing.assert_array_equal(pixels(white)[0], np.full((47, 47, 3), 255))


# Links, pipes, and what is no file


def links_or_skip(link, target):
    try:
        link.symlink_to(target)
    except OSError:
        pytest.skip("this system makes no symbolic links")


def listed(folder):
    images = as_images(folder)
    return [Path(images.name(i)).relative_to(folder).as_posix() for i in range(len(images))]


def test_linked_folders_are_followed_once_each_and_loops_end(tmp_path):
    folder, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    for path in (folder / "own", elsewhere / "deep"):
        path.mkdir(parents=True)
        Image.new("RGB", (3, 3)).save(path / "a.png")
    links_or_skip(folder / "linked", elsewhere)
    (folder / "again").symlink_to(folder / "own")
    (folder / "own" / "loop").symlink_to(folder)
    (elsewhere / "deep" / "up").symlink_to(elsewhere)
    (folder / "itself").symlink_to(folder / "itself")
    (folder / "itself").unlink()
    (folder / "file.png").symlink_to(elsewhere / "deep" / "a.png")
    assert listed(folder) == ["file.png", "linked/deep/a.png", "own/a.png"]


@pytest.mark.parametrize("name", ["gone.png", "gone"])
def test_links_to_nothing_are_listed_and_named_when_they_are_read(tmp_path, name):
    Image.new("RGB", (3, 3)).save(tmp_path / "a.png")
    links_or_skip(tmp_path / name, tmp_path / "nowhere")
    (tmp_path / "notes.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / ".lock").symlink_to(tmp_path / "nowhere")
    assert listed(tmp_path) == ["a.png", name]
    with pytest.raises(FileNotFoundError, match=rf"{name}: a link to .*nowhere'.*, where there is nothing"):
        as_images(tmp_path)[1]
    with pytest.raises(FileNotFoundError, match="a link to"):
        as_images(tmp_path).digest(1)


def test_link_to_itself_is_named(tmp_path):
    links_or_skip(tmp_path / "a.png", tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: the image cannot be read: .*symbolic links"):
        as_images(tmp_path)[0]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_sockets_and_devices_are_named_and_never_opened(tmp_path):
    kinds = {"pipe.png": "is a named pipe"}
    os.mkfifo(tmp_path / "pipe.png")
    # The path of a socket has little room.
    with socket.socket(socket.AF_UNIX) as end, contextlib.chdir(tmp_path):
        end.bind("socket.png")
    kinds["socket.png"] = "is a socket"
    try:
        os.mknod(tmp_path / "device.png", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        kinds["device.png"] = "is a device"
    except PermissionError:
        pass
    for X in (tmp_path, [tmp_path / name for name in sorted(kinds)]):
        images = as_images(X)
        assert [Path(images.name(i)).name for i in range(len(images))] == sorted(kinds)
        for i, name in enumerate(sorted(kinds)):
            for use in (images.__getitem__, images.digest):
                # Opened, the pipe would wait for ever.
                with pytest.raises(ValueError, match=f"{name}: {kinds[name]}"):
                    use(i)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a file"):
        as_images(tmp_path / "pipe.png")


def test_files_left_out_for_their_suffix_are_counted(tmp_path):
    for name in ("a.png", "b.heic", "c.HEIC", "d.npy", "scan", ".hidden.heic", "notes.txt", "Thumbs.db", "labels.csv"):
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match=r"4 files .* are left out.*: 2 \.heic, 1 \.npy, 1 without a suffix\."):
        assert listed(tmp_path) == ["a.png"]
    for name in ("b.heic", "c.HEIC", "d.npy", "scan"):
        (tmp_path / name).unlink()
    assert listed(tmp_path) == ["a.png"]


def test_suffixes_are_those_of_the_formats_that_are_read():
    suffixes = image_suffixes()
    assert {".png", ".apng", ".dib", ".j2k", ".jpg", ".mpo", ".pcx", ".psd", ".qoi", ".sgi", ".tiff"} <= suffixes
    assert not suffixes & {".eps", ".ps", ".wmf", ".h5", ".mpg", ".pdf"}


def test_formats_that_other_packages_add_to_pillow_are_read(tmp_path, monkeypatch):
    class Plain(ImageFile.ImageFile):
        format = "PLAIN-OF-A-TEST"

        def _open(self):
            self._size, self._mode = (4, 3), "L"
            self.tile = [("raw", (0, 0, 4, 3), 5, ("L", 0, 1))]

    for name in ("OPEN", "ID", "EXTENSION"):
        monkeypatch.setattr(Image, name, getattr(Image, name).copy())
    Image.register_open(Plain.format, Plain, lambda prefix: prefix.startswith(b"PLAIN"))
    Image.register_extension(Plain.format, ".plain")
    (tmp_path / "a.plain").write_bytes(b"PLAIN" + bytes(range(12)))
    np.testing.assert_array_equal(pixels(tmp_path)[0][..., 0].ravel(), range(12))


@pytest.mark.parametrize("suffix", ["png", "eps"])
def test_no_file_starts_another_program(tmp_path, monkeypatch, suffix):
    ran = tmp_path / "ran"
    for name in ("gs", "gswin32c", "gswin64c", "gswin32", "gswin64", "djpeg"):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\ntouch {ran}\nexit 1\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    path = tmp_path / f"drawing.{suffix}"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(ValueError, match="the file is not an image that PIL can read"):
        as_images([path])[0]
    assert not ran.exists()


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_picture_without_pixels_is_an_error(size):
    with pytest.raises(ValueError, match=rf"images\[0\]: an image of {size[0]} x {size[1]} pixels shows nothing"):
        as_images([Image.new("RGB", size)])[0]


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        ("", ValueError, r"images: the path is empty \(''\)"),
        (["a.png", ""], ValueError, r"images\[1\]: the path is empty"),
        (torch.zeros(2, 3, 8, 8, device="meta"), TypeError, "images: a tensor on the device 'meta' has no values"),
        ([torch.zeros(3, 8, 8, device="meta")], TypeError, r"images\[0\]: a tensor on the device 'meta'"),
        (["a\0b.png"], ValueError, "the image cannot be read: .*null"),
        (["a" * 5000 + ".png"], ValueError, "the image cannot be read: .*name too long"),
    ],
)
def test_paths_and_tensors_that_name_or_hold_nothing_are_errors(X, error, message):
    with pytest.raises(error, match=message):
        as_images(X)[0]


@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1)])
def test_elongated_pictures_have_their_place_in_a_contact_sheet(shape):
    tile = Tile(Image.new("RGB", shape[::-1], "white"), "", "", True)
    sheet = contact_sheet("", [], [Section("", [tile])])
    without = contact_sheet("", [], [Section("", [tile._replace(picture=Image.new("RGB", shape[::-1]))])])
    # A line of white pixels.
    assert (np.asarray(sheet) != np.asarray(without)).any(axis=2).sum() == TILE


# Damaged files


def files_of_all_kinds(folder):
    """Return the bytes of small files of the formats that Pillow writes, and of some that it does not."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (24, 30, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {}
    for suffix in ("png", "jpg", "tif", "bmp", "webp", "gif", "ppm", "tga", "jp2", "avif", "ico", "pcx", "sgi", "dds"):
        path = folder / f"whole.{suffix}"
        options = {"exif": exif} if suffix in ("png", "jpg", "tif", "webp") else {}
        try:
            colour.save(path, **options)
        except (OSError, KeyError, ValueError):  # this Pillow was built without it
            continue
        files[suffix] = path.read_bytes()
    deep = rng.integers(0, 65536, (9, 11, 3)).astype(np.uint16)
    colour.save(folder / "packed.tif", compression="tiff_lzw")
    return [
        *files.items(),
        ("png", png_of_16_bits(deep)),
        ("png", png_of_16_bits(deep[..., :2])),
        ("tif", tiff(deep, photometric=2)),
        ("tif", tiff(deep[..., 0], photometric=0)),
        ("tif", tiff(deep, photometric=2, planar=2)),
        ("tif", tiff(rng.random((5, 6)).astype(np.float32), photometric=1)),
        ("tif", (folder / "packed.tif").read_bytes()),
    ]


def check_damaged(folder, seeds):
    files = files_of_all_kinds(folder)
    n_pictures = n_errors = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        suffix, data = files[rng.integers(len(files))]
        path = folder / f"damaged-{seed}.{suffix}"
        path.write_bytes(damaged(data, rng))
        try:
            picture = as_images([path])[0]
        except (ValueError, OSError) as error:
            names_it = path.name in str(error)
            n_errors += 1
            assert names_it, f"seed {seed}"
        else:
            assert picture.mode == "RGB", f"seed {seed}"
            assert picture.width * picture.height > 0, f"seed {seed}"
            n_pictures += 1
        path.unlink()
    assert n_pictures
    assert n_errors


def test_damaged_files_are_pictures_or_errors_that_name_them(tmp_path):
    check_damaged(tmp_path, range(300))


@pytest.mark.long
def test_many_damaged_files_are_pictures_or_errors_that_name_them(tmp_path):
    check_damaged(tmp_path, range(300, 30_000))
