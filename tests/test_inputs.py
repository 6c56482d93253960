"""Containers of images that people have give the scores of the plain list of images."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from dfkde_sklearn import DFKDEDetector, PatchDFKDEDetector, ScatteringFeatures
from dfkde_sklearn._features import extractor
from dfkde_sklearn._images import as_images
from dfkde_sklearn._matrices import is_matrix

IMAGES = np.random.default_rng(0).integers(0, 256, size=(24, 32, 32), dtype=np.uint8)
PICTURES = [Image.fromarray(image) for image in IMAGES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for i, picture in enumerate(PICTURES):
        kind = root / ("a" if i < 12 else "b")
        kind.mkdir(exist_ok=True)
        picture.save(kind / f"{i:02}.png")
    return root


@pytest.fixture(scope="module")
def detectors():
    features = ScatteringFeatures(image_size=32)
    pooled = DFKDEDetector(features, n_components=4).fit(PICTURES)
    return pooled, PatchDFKDEDetector(ScatteringFeatures(image_size=32, pooling=None)).fit(PICTURES)


def paths(folder):
    return sorted(str(path) for path in folder.rglob("*.png"))


class Pairs(Dataset):
    """A data set of torch, of images and labels."""

    def __len__(self):
        return len(PICTURES)

    def __getitem__(self, i):
        return PICTURES[i], i % 2


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.from_numpy(IMAGES))


def buffers():
    for picture in PICTURES:
        buffer = io.BytesIO()
        picture.save(buffer, format="png")
        yield buffer


def frame_of_pandas(folder):
    return pytest.importorskip("pandas").DataFrame({"path": paths(folder)})


def frame_of_polars(folder):
    return pytest.importorskip("polars").DataFrame({"path": paths(folder)})


def arrow_of_paths(folder):
    return pytest.importorskip("pyarrow").array(paths(folder))


def arrow_of_bytes(_):
    return pytest.importorskip("pyarrow").chunked_array([[buffer.getvalue() for buffer in buffers()]])


def hugging_face(_):
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict({"image": PICTURES, "label": [i % 2 for i in range(24)]})


def tensors():
    return torch.from_numpy(IMAGES)[:, None]


CONTAINERS = {
    "pattern": lambda folder: f"{folder}/**/*.png",
    "frame of pandas": frame_of_pandas,
    "frame of polars": frame_of_polars,
    "Arrow array of paths": arrow_of_paths,
    "Arrow array of bytes": arrow_of_bytes,
    "bytes": lambda _: [buffer.getvalue() for buffer in buffers()],
    "buffers": lambda _: list(buffers()),
    "open files": lambda folder: [open(path, "rb") for path in paths(folder)],  # noqa: PTH123, SIM115
    "Dataset of Hugging Face": hugging_face,
    "column of Hugging Face": lambda folder: hugging_face(folder)["image"],
    "rows of Hugging Face": lambda folder: iter(hugging_face(folder)),
    "ImageFolder": lambda folder: pytest.importorskip("torchvision").datasets.ImageFolder(folder),
    "data set of torch": lambda _: Pairs(),
    "generator": lambda _: (picture for picture in PICTURES),
    "generator of pairs": lambda _: ((picture, 0) for picture in PICTURES),
    "generator of pictures and paths": lambda folder: zip(PICTURES, paths(folder), strict=True),
    "generator of batches": lambda _: (PICTURES[i : i + 5] for i in range(0, 24, 5)),
    "generator of paths": lambda folder: iter(paths(folder)),
    "DataLoader": lambda _: DataLoader(tensors(), batch_size=5),
    "DataLoader with labels": lambda _: DataLoader(TensorDataset(tensors(), torch.arange(24)), batch_size=5),
    "DataLoader of one tensor": lambda _: DataLoader(TensorDataset(tensors()), batch_size=5),
    "TensorDataset of one tensor": lambda _: TensorDataset(tensors()),
    "IterableDataset": lambda _: Stream(),
}


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_container_gives_the_scores_of_the_list(name, folder, detectors):
    make = CONTAINERS[name]
    for detector in detectors:
        expected = detector.score_samples(PICTURES)
        np.testing.assert_allclose(detector.score_samples(make(folder)), expected, rtol=1e-5)
        np.testing.assert_allclose(detector.assess(make(folder)).log_density, expected, rtol=1e-5)
        assert not is_matrix(make(folder))
    fitted = DFKDEDetector(ScatteringFeatures(image_size=32), n_components=4).fit(make(folder))
    np.testing.assert_allclose(fitted.calibration_scores_, detectors[0].calibration_scores_, rtol=1e-4)
    assessment, maps = detectors[1].assess_with_maps(make(folder))
    np.testing.assert_allclose(assessment.log_density, expected, rtol=1e-5)
    assert [of_image.shape for of_image in maps] == [(32, 32)] * 24


COLOUR = np.repeat(IMAGES[..., None], 3, 3)
LABELLED = [(image, i % 3) for i, image in enumerate(COLOUR)]
MASKED = list(zip(COLOUR, IMAGES, strict=True))
TUPLES = TensorDataset(torch.from_numpy(COLOUR))
LOADERS = {
    "one image at a time": lambda: DataLoader(COLOUR, batch_size=1, collate_fn=list),
    "one sample at a time": lambda: DataLoader(LABELLED, batch_size=1, collate_fn=lambda batch: batch[0]),
    "lists of images": lambda: DataLoader(COLOUR, batch_size=5, collate_fn=list),
    "lists of samples": lambda: DataLoader(LABELLED, batch_size=5, collate_fn=list),
    "lists of tuples": lambda: DataLoader(TUPLES, batch_size=5, collate_fn=list),
    "samples": lambda: DataLoader(LABELLED, batch_size=None),
    "vectors as labels": lambda: DataLoader([(image, np.eye(3)[i]) for image, i in LABELLED], batch_size=5),
    "vectors in dictionaries": lambda: DataLoader(
        [{"image": image, "label": np.eye(3)[i]} for image, i in LABELLED], batch_size=5
    ),
    "names as labels": lambda: DataLoader([(image, str(i)) for image, i in LABELLED], batch_size=5),
    "lists of images and paths": lambda: iter([[(Image.fromarray(image), "a.png") for image in COLOUR]]),
    "batches and labels": lambda: iter([(list(COLOUR[:9]), [0] * 9), [list(COLOUR[9:]), [1] * 15]]),
}


@pytest.mark.parametrize("name", LOADERS)
def test_what_loaders_give_is_as_many_images_as_they_load(name, detectors):
    for detector in detectors:
        np.testing.assert_allclose(detector.score_samples(LOADERS[name]()), detector.score_samples(COLOUR), rtol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ((picture, picture.resize((32, 32)).convert("1")) for picture in PICTURES),
        lambda: iter(MASKED),
        lambda: zip(IMAGES, IMAGES, strict=True),
        lambda: TensorDataset(torch.from_numpy(COLOUR), tensors()),
        lambda: DataLoader(TensorDataset(torch.from_numpy(COLOUR), tensors()), batch_size=5),
        lambda: DataLoader(MASKED, batch_size=5),
        lambda: DataLoader(MASKED, batch_size=5, collate_fn=list),
        lambda: DataLoader(MASKED, batch_size=None),
        lambda: zip(["a.png"], ["a_mask.png"], strict=True),
    ],
)
def test_images_beside_their_masks_are_not_taken_for_twice_as_many(make, detectors):
    for detector in detectors:
        with pytest.raises(TypeError, match=r"of \d images, such as an image and its mask"):
            detector.score_samples(make())


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10])
@pytest.mark.parametrize("is_labelled", [False, True])
def test_batches_of_grey_images_are_no_images_in_colour(batch_size, is_labelled, detectors):
    grey = torch.from_numpy(IMAGES)
    loader = DataLoader(TensorDataset(grey, torch.arange(24)) if is_labelled else grey, batch_size=batch_size)
    for detector in detectors:
        expected = detector.score_samples(PICTURES)
        np.testing.assert_allclose(detector.score_samples(loader), expected, rtol=1e-5)
        np.testing.assert_allclose([one.log_density for one in detector.score_stream(loader)], expected, rtol=1e-5)
    masks = DataLoader(TensorDataset(grey, grey), batch_size=batch_size)
    with pytest.raises(TypeError, match="item 0 of the stream is a list of 2 images, such as an image and its mask"):
        detectors[0].score_samples(masks)


def into(kind):
    """Yield images as a camera does that writes each into the same object."""
    buffer, picture = io.BytesIO(), Image.new("L", (32, 32))
    held = bytearray(2000)
    for image in PICTURES:
        if kind == "picture":
            picture.paste(image.resize((32, 32)))
            yield picture
            continue
        buffer.seek(0)
        buffer.truncate()
        image.save(buffer, "png")
        held[:] = buffer.getvalue()
        buffer.seek(0)
        yield {"buffer": buffer, "bytes": held, "view": memoryview(held)}[kind]
        if kind == "view":
            held = bytearray(held)


@pytest.mark.parametrize("kind", ["picture", "buffer", "bytes", "view"])
def test_images_of_a_stream_may_be_one_object(kind, detectors):
    for detector in detectors:
        expected = detector.score_samples([picture.resize((32, 32)) for picture in PICTURES])
        np.testing.assert_allclose(detector.score_samples(into(kind)), expected, rtol=1e-5)
        np.testing.assert_allclose([one.log_density for one in detector.score_stream(into(kind))], expected, rtol=1e-5)


def test_flips_read_a_stream_once():
    features = ScatteringFeatures(image_size=32, pooling=None)
    detector = PatchDFKDEDetector(features, flips="horizontal").fit(iter(PICTURES))
    np.testing.assert_allclose(detector.score_samples(iter(PICTURES)), detector.score_samples(PICTURES))


def test_a_stream_is_read_in_parts(monkeypatch):
    monkeypatch.setattr(extractor, "STREAMED", 5)
    most, alive = 0, 0

    class Counted(np.ndarray):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def stream():
        nonlocal most, alive
        for image in IMAGES:
            alive += 1
            most = max(most, alive)
            yield image.copy().view(Counted)

    features = ScatteringFeatures(image_size=32).fit(PICTURES)
    np.testing.assert_array_equal(features.transform(stream()), features.transform(list(IMAGES)))
    assert most < 24


def test_a_pattern_is_a_path_where_one_has_that_name(tmp_path):
    odd = tmp_path / "[1]"
    odd.mkdir()
    PICTURES[0].save(odd / "a.png")
    assert len(as_images(str(odd))) == 1


def test_encoded_images_keep_sixteen_bits_and_orientation(tmp_path):
    deep = Image.fromarray(IMAGES[0].astype(np.uint16) * 257)
    deep.save(tmp_path / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(IMAGES[1][:, :20]).save(tmp_path / "turned.jpg", exif=exif)
    for path in tmp_path.iterdir():
        of_file, of_bytes = as_images(path), as_images(path.read_bytes())
        np.testing.assert_array_equal(np.asarray(of_file[0]), np.asarray(of_bytes[0]))
        assert of_file.shape(0) == of_bytes.shape(0)
        assert of_file.digest(0) == of_bytes.digest(0)


def test_bad_containers_are_errors_that_say_what_is_allowed(folder):
    pandas = pytest.importorskip("pandas")
    with pytest.raises(TypeError, match=r"columns \['path', 'y'\].*X\['path'\]"):
        as_images(pandas.DataFrame({"path": paths(folder), "y": 0}))
    with pytest.raises(ValueError, match="as a pattern it matches nothing"):
        as_images(f"{folder}/*.tiff")
    with pytest.raises(ValueError, match=r"images\[0\]: these 12 bytes are not an image"):
        as_images(b"not an image")[0]
    with pytest.raises(ValueError, match="0 bytes"):
        as_images(b"")[0]
    spent = iter(PICTURES)
    list(spent)
    with pytest.raises(ValueError, match="An iterator can be used once"):
        ScatteringFeatures().fit_transform(spent)
    with pytest.raises(TypeError, match="item 0 of the stream has 2 images, under the keys"):
        as_images(iter([{"left": PICTURES[0], "right": PICTURES[1]}]))
    with pytest.raises(TypeError, match="without images"):
        as_images(iter([(1, 2)]))
    with pytest.raises(TypeError, match="without images"):
        as_images(iter([[(PICTURES[0], "a.png"), (1, "b.png")]]))
    with pytest.raises(TypeError, match=r"images\[0\]: 5 of type int"):
        as_images(iter([5]))
    with pytest.raises(TypeError, match="dict"):
        as_images({"a": PICTURES[0]})


def test_a_folder_of_torchvision_with_a_transform_is_an_error(folder):
    torchvision = pytest.importorskip("torchvision")
    data = torchvision.datasets.ImageFolder(folder, transform=torchvision.transforms.ToTensor())
    with pytest.raises(ValueError, match="would not be applied"):
        as_images(data)


def test_a_data_set_of_hugging_face_without_one_column_of_images_is_an_error():
    datasets = pytest.importorskip("datasets")
    with pytest.raises(TypeError, match=r"columns \['path'\]"):
        as_images(datasets.Dataset.from_dict({"path": ["a.png"]}))
