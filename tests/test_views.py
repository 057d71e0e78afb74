"""Pixels: the store against PIL, the evaluation view against processors, random training views."""

import shutil
import threading

import numpy as np
import pytest
import torch
from conftest import WNIDS, draw_picture
from PIL import Image
from transformers import CLIPImageProcessor, ConvNextImageProcessor, DeiTImageProcessor, ViTImageProcessor

from data_loading import load_dataset, open_data
from transfer.data import images
from transfer.data.images import ImageGeometry, PixelDataset, open_pixel_store
from transfer.errors import UserError
from transfer.models.load import read_geometry, set_image_size
from transfer.transforms.evaluation import EvaluationTransform, check_transform, resize_as_pil
from transfer.transforms.training import TrainTransform, draw_crops, resample, resampling_weights, seeded_generator

PROCESSORS = {
    "vit": lambda: ViTImageProcessor(size={"height": 40, "width": 40}),
    "convnext": lambda: ConvNextImageProcessor(size={"shortest_edge": 48}, crop_pct=0.875),
    "convnext384": lambda: ConvNextImageProcessor(size={"shortest_edge": 384}, crop_pct=1.0),
    "deit": lambda: DeiTImageProcessor(size={"height": 64, "width": 64}, crop_size={"height": 56, "width": 56}),
    "clip": lambda: CLIPImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 36, "width": 36}),
}


def batch_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("size", [(64, 64), (70, 52)])
def test_the_evaluation_view_is_the_processors_own(kind, size):
    processor = PROCESSORS[kind]()
    image = draw_picture(WNIDS[0], 3, size)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    view = EvaluationTransform(read_geometry(processor))(batch_of(image))
    assert view.shape == expected.shape
    # Both compute with integers, each its own: a pixel may round to another neighbor.
    assert (view - expected).abs().max() < 2.1 / 255 / min(processor.image_std)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_an_accelerators_resize_is_the_cpus(interpolation):
    images = batch_of(draw_picture(WNIDS[0], 3, (64, 48)))

    class ElsewhereTensor(torch.Tensor):
        device = torch.device("meta")

    elsewhere = images.as_subclass(ElsewhereTensor)
    for size in ((96, 80), (20, 30)):
        ours = resize_as_pil(elsewhere, size, interpolation).as_subclass(torch.Tensor)
        assert (ours - resize_as_pil(images, size, interpolation).float()).abs().max() <= 2


@pytest.mark.parametrize("kind", ["vit", "convnext", "deit", "clip"])
def test_a_processor_set_to_another_size_feeds_that_size(kind):
    processor = PROCESSORS[kind]()
    set_image_size(processor, 80)
    view = EvaluationTransform(read_geometry(processor))
    check_transform(processor, view)
    assert view.geometry.crop == (80, 80)
    assert processor(draw_picture(WNIDS[0], 0), return_tensors="pt")["pixel_values"].shape[-2:] == (80, 80)


def test_a_processor_that_does_more_is_refused():
    processor = PROCESSORS["vit"]()
    view = EvaluationTransform(read_geometry(processor))
    processor.image_mean = [0.1, 0.2, 0.3]
    with pytest.raises(UserError, match="prepares images in a way that is not supported"):
        check_transform(processor, view)


def test_the_whole_image_resampled_is_torchs_antialiased_resize():
    images = torch.rand(2, 3, 20, 30)
    for size in (9, 50):
        rows = resampling_weights(torch.zeros(2), torch.full((2,), 20.0), 20, size)
        columns = resampling_weights(torch.zeros(2), torch.full((2,), 30.0), 30, size)
        expected = torch.nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
        torch.testing.assert_close(resample(images, rows, columns), expected, atol=1e-5, rtol=1e-5)


def test_a_negative_length_mirrors():
    images = torch.rand(1, 3, 8, 8)
    same = resampling_weights(torch.zeros(1), torch.full((1,), 8.0), 8, 8)
    mirrored = resampling_weights(torch.full((1,), 8.0), torch.full((1,), -8.0), 8, 8)
    torch.testing.assert_close(resample(images, same, mirrored), images.flip(-1))


def test_crops_stay_inside_keep_their_area_and_half_are_mirrored():
    top, left, height, width = draw_crops(4000, 60, 64, 0.3, seeded_generator(0))
    right, bottom = left + width, top + height
    assert min(top.min(), torch.minimum(left, right).min()) >= -1e-3
    assert bottom.max() <= 60.001 and torch.maximum(left, right).max() <= 64.001
    area = height * width.abs() / (60 * 64)
    assert 0.25 < area.min() < 0.35 and area.max() > 0.95
    assert 0.45 < (width < 0).float().mean() < 0.55


def test_training_views_differ_by_image_and_repeat_with_the_seed():
    view = TrainTransform(EvaluationTransform(read_geometry(PROCESSORS["vit"]())), [24], 0.3)
    images = batch_of(draw_picture(WNIDS[0], 0)).repeat(6, 1, 1, 1)

    def draw(*parts):
        return view(images, torch.zeros(6), seeded_generator(*parts))[0]

    first = draw(1, 2)
    assert first.shape == (6, 3, 24, 24)
    assert len({values.sum().item() for values in first}) == 6
    assert torch.equal(first, draw(1, 2)) and not torch.equal(first, draw(1, 3))
    before = torch.get_rng_state()
    draw(1, 2)
    assert torch.equal(before, torch.get_rng_state())


def square(size: int) -> ImageGeometry:
    return ImageGeometry((size, size), (size, size), "bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)


def open_store(folder, tmp_path, geometry=None):
    files = folder.train_files + folder.test_files
    return open_pixel_store(folder.root, files, geometry or square(32), cache_dir=tmp_path / "store")


def test_stored_pixels_equal_pils_decoding_byte_for_byte(pristine_data, tmp_path):
    folder = open_data(str(pristine_data))
    store = open_store(folder, tmp_path)
    split = load_dataset(folder)["validation"]
    dataset = PixelDataset(store, split)
    assert isinstance(dataset.pixels, np.memmap)  # so that memory does not grow with the number of images
    batch = dataset.__getitems__(range(len(split)))
    assert batch["images"].dtype == torch.uint8 and batch["labels"].tolist() == split["label"]
    for file, values in zip(split["file"], batch["images"], strict=True):
        expected = np.asarray(Image.open(folder.root / file).convert("RGB"))
        assert np.array_equal(values.permute(1, 2, 0).numpy(), expected)


def test_mixed_sizes_are_brought_to_the_views_size_by_its_own_rule(data, tmp_path):
    odd = f"train/{WNIDS[0]}/images/{WNIDS[0]}_2.JPEG"
    draw_picture(WNIDS[0], 2, (70, 40)).save(data / odd)
    folder = open_data(str(data))
    processor = PROCESSORS["convnext"]()
    geometry = read_geometry(processor)
    store = open_store(folder, tmp_path, geometry)
    assert store.cropped and store.pixels.shape[1:] == (48, 48, 3)
    stored = torch.from_numpy(store.pixels[store.rows[odd]]).permute(2, 0, 1)[None]
    expected = processor(Image.open(data / odd), return_tensors="pt")["pixel_values"]
    assert (EvaluationTransform(geometry, store.cropped)(stored) - expected).abs().max() < 1.1 / 255 / 0.5


def test_a_store_is_reused_until_the_data_change(data, tmp_path, monkeypatch):
    first = open_store(open_data(str(data)), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(images, "_fill", None)
        open_store(open_data(str(data)), tmp_path)
    changed = data / "test" / "images" / first_image(data)
    draw_picture(WNIDS[0], 99).save(changed)
    second = open_store(open_data(str(data)), tmp_path)
    assert second.data_fingerprint != first.data_fingerprint
    row = second.rows[f"test/images/{changed.name}"]
    assert np.array_equal(second.pixels[row], np.asarray(Image.open(changed).convert("RGB")))


def first_image(data) -> str:
    return min(path.name for path in (data / "test" / "images").iterdir())


def test_the_data_fingerprint_is_the_same_in_another_place(pristine_data, data, tmp_path):
    stores = [open_store(open_data(str(place)), tmp_path / place.parent.name) for place in (pristine_data, data)]
    assert stores[0].data_fingerprint == stores[1].data_fingerprint


def test_an_interrupted_build_leaves_no_store_and_the_next_one_is_whole(data, tmp_path, monkeypatch):
    folder = open_data(str(data))

    def interrupt(root, records):
        if len(records) > 1:  # all images are decoded; the first one alone is looked at before
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(images, "_refuse_faults", interrupt)
        with pytest.raises(KeyboardInterrupt):
            open_store(folder, tmp_path)
    assert not [p for p in (tmp_path / "store").iterdir() if p.is_dir()]
    assert len(open_store(folder, tmp_path).pixels) == 58


def test_two_builders_at_once_build_one_store(pristine_data, tmp_path, monkeypatch):
    folder, built = open_data(str(pristine_data)), []
    original = images._fill
    monkeypatch.setattr(images, "_fill", lambda *args: (built.append(1), original(*args)))
    threads = [threading.Thread(target=open_store, args=(folder, tmp_path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


@pytest.mark.parametrize("fault", ["truncated", "empty", "text", "bomb"])
def test_a_bad_image_is_refused_with_its_path_and_no_store_is_left(fault, data, tmp_path, monkeypatch):
    bad = data / "train" / WNIDS[1] / "images" / f"{WNIDS[1]}_4.JPEG"
    contents = {"truncated": bad.read_bytes()[:300], "empty": b"", "text": b"hello", "bomb": bad.read_bytes()}
    bad.write_bytes(contents[fault])
    if fault == "bomb":
        Image.new("RGB", (300, 300)).save(bad)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60_000)
    with pytest.raises(UserError, match=f"{bad.name}: cannot be read as an image"):
        open_store(open_data(str(data)), tmp_path)
    assert not [p for p in (tmp_path / "store").iterdir() if p.is_dir()]


def test_photographs_stand_upright_as_the_pipeline_sees_them(data, tmp_path):
    file = f"train/{WNIDS[0]}/images/{WNIDS[0]}_2.JPEG"
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    draw_picture(WNIDS[0], 2).save(data / file, exif=exif)
    folder = open_data(str(data))
    store = open_store(folder, tmp_path)
    turned = np.asarray(Image.open(data / file).convert("RGB"))[::-1, ::-1]
    assert np.array_equal(store.pixels[store.rows[file]], turned)


def test_sixteen_bit_images_are_refused_not_blackened(data, tmp_path):
    deep = data / "train" / WNIDS[0] / "images" / "deep.png"
    Image.fromarray(np.arange(32 * 32, dtype=np.uint16).reshape(32, 32)).save(deep)
    with pytest.raises(UserError, match=r"deep\.png: .*more than 8 bits per channel"):
        open_store(open_data(str(data)), tmp_path)


def test_a_full_disk_is_noticed_before_decoding(data, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match=r"decoding 58 images needs .* HF_DATASETS_CACHE chooses another place"):
        open_store(open_data(str(data)), tmp_path)


def test_another_image_size_shares_the_store_of_whole_images(data, tmp_path, monkeypatch):
    folder = open_data(str(data))
    open_store(folder, tmp_path)
    monkeypatch.setattr(images, "_fill", None)
    assert not open_store(folder, tmp_path, square(64)).cropped
