"""What may be handed in as images, and what comes out: pictures and batches of tensors."""

import pickle
import struct
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from PIL import Image

from dfkde_sklearn._images import MAX_THREADS, as_images, image_batches


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def colour(rng):
    return rng.integers(0, 256, (5, 12, 17, 3), dtype=np.uint8)


@pytest.fixture
def paths(colour, tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(len(colour))]
    for file, pixels in zip(files, colour, strict=True):
        Image.fromarray(pixels).save(file)
    return files


def pixels(X):
    """Return what every picture of X shows, as uint8 arrays (H, W, 3)."""
    images = as_images(X)
    pictures = [images[i] for i in range(len(images))]
    assert all(picture.mode == "RGB" for picture in pictures)
    return [np.array(picture) for picture in pictures]


def to_tensor(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


# Arrays and tensors


def test_every_layout_shows_the_same_pictures(colour, paths):
    layouts = {
        "NHWC": colour,
        "NCHW": colour.transpose(0, 3, 1, 2),
        "tensor NCHW": torch.from_numpy(colour.transpose(0, 3, 1, 2).copy()),
        "list of HWC": list(colour),
        "tuple of CHW": tuple(colour.transpose(0, 3, 1, 2)),
        "list of tensors": [torch.from_numpy(image) for image in colour],
        "PIL": [Image.fromarray(image) for image in colour],
        "Path": paths,
        "str": [str(path) for path in paths],
        "string array": np.array([str(path) for path in paths]),
        "object array": np.array(paths, dtype=object),
        "pandas": pd.Series([str(path) for path in paths], index=list("abcde")),
        "polars": pl.Series([str(path) for path in paths]),
        "folder": paths[0].parent,
        "folder as str": str(paths[0].parent),
        "mixed": [
            paths[0],
            Image.fromarray(colour[1]),
            colour[2],
            torch.from_numpy(colour[3]),
            str(paths[4]),
        ],
    }
    for name, X in layouts.items():
        np.testing.assert_array_equal(np.stack(pixels(X)), colour, err_msg=name)


def test_grey_arrays_have_three_equal_channels(colour):
    grey = colour[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=-1)
    for X in (grey, grey[..., None], grey[:, None], list(grey), torch.from_numpy(grey.copy())):
        np.testing.assert_array_equal(np.stack(pixels(X)), expected)


def test_three_dimensional_array_is_a_stack_however_many_images_it_has(colour):
    for n in (1, 2, 3, 4, 5):
        assert len(as_images(colour[:n, :, :, 0])) == n


def test_images_of_a_list_may_differ_in_size_and_layout(rng):
    shapes = [(8, 9), (10, 7, 3), (3, 6, 11), (1, 5, 5), (9, 8, 4)]
    X = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
    assert [image.shape[:2] for image in pixels(X)] == [(8, 9), (10, 7), (6, 11), (5, 5), (9, 8)]


def test_float_images_are_rounded_to_8_bits(rng):
    X = rng.random((3, 8, 9, 3))
    X[0, 0, 0] = (0, 0.5, 1)
    expected = np.round(X.astype(np.float32) * 255).astype(np.uint8)
    for values in (X, X.astype(np.float32), torch.from_numpy(X), torch.from_numpy(X).requires_grad_()):
        np.testing.assert_array_equal(np.stack(pixels(values)), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_shows_eighths_of_a_255th_exactly(dtype):
    X = (torch.arange(64).reshape(1, 8, 8) / 64).to(dtype)  # exact in both types
    expected = np.round(np.arange(64).reshape(8, 8) / 64 * 255)
    np.testing.assert_array_equal(pixels(X)[0][..., 0], expected)


def test_16_bit_arrays_are_scaled_from_their_full_range():
    every_value = np.arange(65536, dtype=np.uint16).reshape(1, 256, 256)
    expected = np.round(np.arange(65536) / 65535 * 255).reshape(256, 256)
    for X in (every_value, every_value.astype(">u2"), torch.from_numpy(every_value.copy())):
        np.testing.assert_array_equal(pixels(X)[0][..., 2], expected)


def test_inputs_are_never_written_to(colour):
    X = colour.copy()
    X.setflags(write=False)
    for picture in (as_images(X)[0], as_images(X[..., 0])[0], as_images([X[0]])[0]):
        picture.paste((1, 2, 3), (0, 0, 5, 5))
    np.testing.assert_array_equal(X, colour)
    image = Image.fromarray(colour[0])
    as_images([image])[0].paste((1, 2, 3), (0, 0, 5, 5))
    np.testing.assert_array_equal(np.array(image), colour[0])


# Colour modes of files


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_files_are_scaled_and_not_clipped(rng, tmp_path, suffix):
    values = rng.integers(0, 65536, (20, 30)).astype(np.uint16)
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(values).save(path)
    expected = np.round(values / 65535 * 255)
    for X in ([path], [Image.open(path)], [Image.fromarray(values.astype(np.int32))]):
        np.testing.assert_array_equal(pixels(X)[0][..., 0], expected)


def test_big_endian_16_bit_tiff_is_scaled(tmp_path):
    values = np.array([[0, 257], [25700, 65535]], dtype=">u2")
    entries = [(256, 3, 2), (257, 3, 2), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 8)]
    entries += [(277, 3, 1), (278, 3, 2), (279, 4, 8)]
    directory = struct.pack(">H", len(entries))
    for tag, kind, value in entries:
        directory += struct.pack(">HHI", tag, kind, 1) + struct.pack(
            ">HH" if kind == 3 else ">I", *((value, 0) if kind == 3 else (value,))
        )
    path = tmp_path / "big.tif"
    path.write_bytes(b"MM\x00*" + struct.pack(">I", 16) + values.tobytes() + directory + b"\0\0\0\0")
    np.testing.assert_array_equal(pixels([path])[0][..., 0], [[0, 1], [100, 255]])


def test_float_tiff_in_0_to_1_is_scaled(rng, tmp_path):
    values = rng.random((20, 30)).astype(np.float32)
    Image.fromarray(values).save(tmp_path / "float.tif")
    np.testing.assert_array_equal(pixels(tmp_path)[0][..., 0], np.round(values * 255))


def test_float_tiff_outside_of_0_to_1_is_an_error_that_names_file_and_range(tmp_path):
    path = tmp_path / "float.tif"
    Image.fromarray(np.linspace(0, 255, 12, dtype=np.float32).reshape(3, 4)).save(path)
    with pytest.raises(ValueError, match=r"float\.tif: floating-point values from 0 to 255\. Allowed: \[0, 1\]"):
        as_images([path])[0]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped_as_timm_does(rng, mode, tmp_path):
    values = rng.integers(0, 256, (9, 8, len(mode)), dtype=np.uint8)
    Image.fromarray(values, mode=None).save(tmp_path / "alpha.png")
    colours = values[..., :-1]
    expected = np.broadcast_to(colours, (9, 8, 3))
    np.testing.assert_array_equal(pixels(tmp_path)[0], expected)
    if mode == "RGBA":
        np.testing.assert_array_equal(pixels(values[None])[0], expected)


@pytest.mark.parametrize("transparency", [3, bytes([0, 128, 255, 7])])
def test_palette_with_transparency_shows_its_colours_without_a_warning(transparency, tmp_path):
    palette = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [200, 100, 50]], dtype=np.uint8)
    indices = np.arange(16, dtype=np.uint8).reshape(4, 4) % 4
    image = Image.fromarray(indices).convert("P")
    image.putdata(indices.ravel().tolist())
    image.putpalette(palette.ravel().tolist())
    image.save(tmp_path / "palette.png", transparency=transparency)
    with Image.open(tmp_path / "palette.png") as saved:
        assert saved.mode == "P"
        assert "transparency" in saved.info
    np.testing.assert_array_equal(pixels(tmp_path)[0], palette[indices])


def test_one_bit_images_are_black_and_white(rng, tmp_path):
    bits = rng.random((9, 13)) > 0.5
    Image.fromarray(bits).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(pixels(tmp_path)[0], np.repeat(bits[..., None], 3, -1) * 255)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV"])
def test_other_colour_spaces_are_converted_as_pil_does(rng, mode, tmp_path):
    image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).convert(mode)
    np.testing.assert_array_equal(pixels([image])[0], np.array(image.convert("RGB")))
    if mode == "CMYK":
        image.save(tmp_path / "print.jpg")
        np.testing.assert_array_equal(pixels(tmp_path)[0], np.array(Image.open(tmp_path / "print.jpg").convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_files_and_to_pil_images(rng, orientation, tmp_path):
    stored = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
    shown = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(stored).save(path, exif=exif)
    for X in ([path], [Image.open(path)]):
        np.testing.assert_array_equal(pixels(X)[0], shown)


def test_first_frame_of_an_animation_is_shown(tmp_path):
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.tif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(pixels(tmp_path)[0], np.full((4, 5, 3), (255, 0, 0)))


# Folders and columns


def test_folder_is_read_recursively_sorted_and_without_hidden_or_other_files(tmp_path):
    for name in ("b.png", "a/z.JPG", "a/c.tif", ".hidden/a.png", "a/._c.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (3, 3)).save(path, "png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    images = as_images(tmp_path)
    names = [Path(images.name(i)).relative_to(tmp_path).as_posix() for i in range(len(images))]
    assert names == ["a/c.tif", "a/z.JPG", "b.png"]


def test_one_file_and_one_pil_image_are_a_sequence_of_one(paths, colour):
    for X in (paths[2], str(paths[2]), Image.fromarray(colour[2])):
        np.testing.assert_array_equal(pixels(X), colour[2:3])


def test_images_are_images_and_can_be_pickled(paths):
    images = as_images(paths)
    assert as_images(images) is images
    assert pickle.loads(pickle.dumps(images))[1] == images[1]


def test_names_are_paths_or_positions(paths, colour):
    assert as_images([paths[0], colour[1]]).name(1) == "images[1]"
    assert as_images(paths).name(1) == str(paths[1])
    with pytest.raises(IndexError):
        as_images(paths)[5]
    assert as_images(colour)[-1] == as_images(colour)[4]


# Errors

BLANK = np.zeros((4, 5), np.uint8)


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        ([], ValueError, "0 images"),
        (np.zeros((0, 8, 8), np.uint8), ValueError, "0 images"),
        (np.zeros((0, 8, 8, 3)), ValueError, "0 images"),
        (pd.Series([], dtype=object), ValueError, "0 images"),
        (np.zeros((2, 0, 8), np.uint8), ValueError, r"shape \(0, 8\) is not that of an image"),
        (np.zeros((4, 3, 5, 3), np.uint8), ValueError, r"\(3, 5, 3\) may be \(C, H, W\) or \(H, W, C\)"),
        ([np.zeros((3, 5, 3), np.uint8)], ValueError, r"images\[0\]: .* may be \(C, H, W\) or \(H, W, C\)"),
        (np.zeros((20, 30, 3), np.uint8), ValueError, r"one image .* or a stack .* X\[None\]"),
        (torch.zeros(20, 30, 1), ValueError, r"one image .* or a stack .* X\[None\]"),
        (np.zeros((20, 30)), ValueError, r"feature matrix or one grey image.* X\[None\].*features=None"),
        (np.zeros(20), ValueError, r"shape \(20,\)\. Allowed: \(n, H, W\)"),
        (np.zeros((2, 2, 2, 2, 2)), ValueError, r"Allowed: \(n, H, W\)"),
        (np.zeros((2, 8, 8, 2), np.uint8), ValueError, "no axis of 1, 3 or 4 channels"),
        ([BLANK, np.zeros(5, np.uint8)], ValueError, r"images\[1\]: shape \(5,\)"),
        ([BLANK, np.zeros((2, 3, 8, 8), np.uint8)], ValueError, r"images\[1\]: shape \(2, 3, 8, 8\)"),
        (np.zeros((2, 8, 8), bool), TypeError, "a mask of dtype bool.*uint8"),
        (torch.zeros(2, 8, 8, dtype=torch.bool), TypeError, r"a mask of dtype torch\.bool"),
        (np.zeros((2, 8, 8), int), TypeError, "dtype int64. Allowed: uint8, uint16"),
        (torch.zeros(2, 8, 8, dtype=torch.int32), TypeError, r"dtype torch\.int32\. Allowed: uint8"),
        (np.zeros((2, 8, 8), complex), TypeError, "dtype complex128"),
        (torch.zeros(2, 8, 8).to_sparse(), TypeError, "sparse tensor.*to_dense"),
        (np.full((2, 8, 8), 255.0), ValueError, r"images\[0\]: floating-point values from 255 to 255"),
        (np.full((2, 8, 8), -0.5), ValueError, r"values from -0\.5 to -0\.5\. Allowed: \[0, 1\]"),
        (np.full((2, 8, 8), np.nan), ValueError, "NaN or infinite"),
        (torch.full((2, 8, 8), torch.inf), ValueError, "NaN or infinite"),
        ([Image.fromarray(np.full((3, 3), -1, np.int32))], ValueError, "integers from -1 to -1"),
        ([BLANK, None], TypeError, r"images\[1\]: None of type NoneType is not an image"),
        (pd.Series(["a.png", None], dtype=object), TypeError, r"images\[1\]: None"),
        ([[1, 2], [3, 4]], TypeError, r"images\[0\]: \[1, 2\] of type list"),
        ([b"a.png"], ValueError, r"images\[0\]: these 5 bytes are not an image .*os\.fsdecode"),
        (np.array([["a.png"]], dtype=object), ValueError, r"shape \(1, 1\).* X\.ravel\(\)"),
        (pd.DataFrame({"path": ["a.png"], "y": 0}), TypeError, r"DataFrame with columns \['path', 'y'\].*X\['path'\]"),
        (pl.DataFrame({"path": ["a.png"], "y": 0}), TypeError, r"DataFrame with columns \['path', 'y'\].*X\['path'\]"),
        (None, TypeError, "images: a NoneType. Allowed"),
        ({"a.png"}, TypeError, "images: a set. Allowed"),
        ("no/such/folder", FileNotFoundError, "'no/such/folder' is neither a folder nor a file"),
        (["no-such.png"], FileNotFoundError, r"no-such\.png: there is no such file"),
    ],
)
def test_what_is_no_image_is_an_error_that_says_what_is_allowed(X, error, message):
    with pytest.raises(error, match=message):
        as_images(X)[0]


def test_folder_without_images_is_an_error_with_the_known_suffixes(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"no image file in the folder .*\.png"):
        as_images(tmp_path)


def png_with_wrong_checksum():
    def chunk(kind, data, checksum=None):
        checksum = zlib.crc32(kind + data) if checksum is None else checksum
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"garbage", 0) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"the file is empty \(0 bytes\)"),
        (b"no image at all", "the file is not an image that PIL can read"),
        (png_with_wrong_checksum(), "the image cannot be read"),
    ],
)
def test_broken_file_is_an_error_that_names_path_and_reason(paths, content, reason):
    paths[3].write_bytes(content)
    with pytest.raises(ValueError, match=rf"3\.png: {reason}"):
        as_images(paths)[3]


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_truncated_file_is_an_error_that_names_path_and_reason(rng, tmp_path, suffix):
    path = tmp_path / f"half.{suffix}"
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"half\.{suffix}: the (image cannot be read|file is not an image)"):
        as_images([path])[0]


def test_folder_among_paths_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        as_images([tmp_path])[0]


def test_closed_pil_image_is_an_error_that_names_its_position(paths):
    closed = Image.open(paths[0])
    closed.close()
    with pytest.raises(ValueError, match=r"images\[1\]: the image cannot be read"):
        as_images([paths[1], closed])[1]


@pytest.mark.parametrize("limit", [150, 20])  # one and a half times the limit PIL warns, ten times it raises
def test_decompression_bomb_is_an_error_that_names_the_limit(paths, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # the file has 204 pixels
    for action in ("error", "ignore"):
        with warnings.catch_warnings():
            warnings.simplefilter(action, Image.DecompressionBombWarning)
            with pytest.raises(ValueError, match=r"0\.png: .*PIL\.Image\.MAX_IMAGE_PIXELS"):
                as_images(paths)[0]


# Batches


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batches_hold_every_image_in_order(colour, paths, batch_size):
    batches = list(image_batches(as_images(paths), to_tensor, batch_size))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    np.testing.assert_array_equal(torch.cat(batches).permute(0, 2, 3, 1), colour)


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("dfkde_sklearn_ahead")]


def test_images_are_read_ahead_of_the_consumer_but_not_all():
    images = as_images(np.zeros((500, 8, 8), np.uint8))
    n_read = [0]
    lock = threading.Lock()

    def counted(picture):
        with lock:
            n_read[0] += 1
        return to_tensor(picture)

    batches = image_batches(images, counted, 10)
    next(batches)
    # Of the images submitted before the first batch, all are read in time, and none after.
    deadline = time.monotonic() + 10
    while n_read[0] < 20 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert 20 <= n_read[0] <= 20 + MAX_THREADS
    batches.close()
    assert n_read[0] <= 20 + MAX_THREADS


def test_consumer_that_stops_leaves_no_thread(paths):
    batches = image_batches(as_images(paths * 50), to_tensor, 2)
    next(batches)
    assert reading_threads()
    batches.close()
    assert not reading_threads()


def test_broken_image_ends_the_batches_with_its_name_and_leaves_no_thread(paths):
    paths[3].write_bytes(b"broken")
    batches = image_batches(as_images(paths * 50), to_tensor, 2)
    assert len(next(batches)) == 2
    with pytest.raises(ValueError, match=r"3\.png: the file is not an image"):
        next(batches)
    assert not reading_threads()


def test_failing_transform_names_the_image(colour):
    def refuse(picture):
        raise RuntimeError("no")

    with pytest.raises(ValueError, match=r"images\[0\]: the image of 17 x 12 pixels cannot be transformed: no"):
        next(image_batches(as_images(colour), refuse, 2))


def test_one_unread_pil_image_many_times_is_read_right_by_all_threads(rng, tmp_path):
    expected = rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(expected[::-1, ::-1]).save(tmp_path / "turned.png", exif=exif)
    for _ in range(5):
        X = [Image.open(tmp_path / "turned.png")] * 16
        (batch,) = image_batches(as_images(X), to_tensor, 16)
        np.testing.assert_array_equal(batch.permute(0, 2, 3, 1), np.broadcast_to(expected, (16, 300, 300, 3)))


def test_progress_bar_shows_only_when_asked_for(colour, capsys):
    list(image_batches(as_images(colour), to_tensor, 2))
    assert capsys.readouterr().err == ""
    list(image_batches(as_images(colour), to_tensor, 2, verbose=True, description="reading"))
    shown = capsys.readouterr().err
    assert "reading" in shown
    assert "5/5" in shown
