"""Pixels: the store against PIL, the evaluation view against processors, random training views."""

import errno
import itertools
import os
import pickle
import re
import resource
import shutil
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import WNIDS, draw_picture, stored_pixels
from PIL import Image
from transformers import CLIPImageProcessor, ConvNextImageProcessor, DeiTImageProcessor, ViTImageProcessor

from data_loading import load_dataset, open_data
from transfer.config import RunArguments
from transfer.data import images
from transfer.data.images import ImageGeometry
from transfer.data.images import store as pixel_store
from transfer.data.images.store import PixelDataset, identity_collate, open_pixel_store, unpack_images
from transfer.errors import UserError, exits_cleanly
from transfer.models.load import read_geometry, set_image_size
from transfer.runs import RunContext, single
from transfer.training.memory import split_batch
from transfer.transforms.evaluation import EvaluationTransform, check_transform, resize_as_pil
from transfer.transforms.training import (
    TrainTransform,
    crop_each,
    draw_crops,
    enough_pixels,
    resample,
    resampling_weights,
    seeded_generator,
    whole_boxes,
)

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
    heights, widths = torch.full((4000,), 60.0), torch.full((4000,), 64.0)
    top, left, height, width = draw_crops(heights, widths, 0.3, seeded_generator(0))
    right, bottom = left + width, top + height
    assert min(top.min(), torch.minimum(left, right).min()) >= -1e-3
    assert bottom.max() <= 60.001 and torch.maximum(left, right).max() <= 64.001
    area = height * width.abs() / (60 * 64)
    assert 0.25 < area.min() < 0.35 and area.max() > 0.95
    assert 0.45 < (width < 0).float().mean() < 0.55


def test_crops_of_strips_and_panoramas_stay_inside_and_keep_their_aspect():
    heights, widths = torch.tensor([[1.0, 20_000.0], [20_000.0, 1.0], [270.0, 480.0], [1.0, 1.0]]).repeat(500, 1).T
    crops = draw_crops(heights, widths, 0.35, seeded_generator(0))
    aspect = crops[3].abs() / crops[2]
    assert 0.7499 < aspect.min() < 0.78 and 1.3 < aspect.max() < 1.3334
    boxes = torch.tensor(whole_boxes(heights, widths, crops))
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] < boxes[:, 2:]).all()
    assert (boxes[:, 2] <= heights).all() and (boxes[:, 3] <= widths).all()


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


def open_store(folder, tmp_path, geometry=None, **options):
    files = folder.train_files + folder.test_files
    options = {"train_files": folder.train_files, "train_side": 39} | options
    return open_pixel_store(folder.root, files, geometry or square(32), cache_dir=tmp_path / "store", **options)


def test_stored_pixels_equal_pils_decoding_byte_for_byte(pristine_data, tmp_path):
    folder = open_data(str(pristine_data))
    store = open_store(folder, tmp_path)
    split = load_dataset(folder)["validation"]
    for for_training in (False, True):
        batch = PixelDataset(store, split, for_training).__getitems__(range(len(split)))
        assert batch["images"].dtype == torch.uint8 and batch["labels"].tolist() == split["label"]
        for file, values in zip(split["file"], batch["images"], strict=True):
            expected = np.asarray(Image.open(folder.root / file).convert("RGB"))
            assert np.array_equal(values.permute(1, 2, 0).numpy(), expected)


def test_mixed_sizes_are_evaluated_as_the_processor_makes_them(data, tmp_path):
    odd = f"train/{WNIDS[0]}/images/{WNIDS[0]}_2.JPEG"
    draw_picture(WNIDS[0], 2, (70, 40)).save(data / odd)
    folder = open_data(str(data))
    processor = PROCESSORS["convnext"]()
    geometry = read_geometry(processor)
    store = open_store(folder, tmp_path, geometry)
    stored = torch.from_numpy(stored_pixels(store, odd)).permute(2, 0, 1)[None]
    assert store.cropped and stored.shape == (1, 3, 48, 48)
    expected = processor(Image.open(data / odd), return_tensors="pt")["pixel_values"]
    assert (EvaluationTransform(geometry, store.cropped)(stored) - expected).abs().max() < 1.1 / 255 / 0.5


def draw_photograph(width: int, height: int) -> Image.Image:
    """Smooth shapes with some detail and sharp edges, in colors."""
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (height // 20, width // 20, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float64)
    pixels += random.normal(0, 6, pixels.shape)
    for _ in range(20):
        top, left, side = random.integers(height), random.integers(width), random.integers(10, height // 5)
        pixels[top : top + side, left : left + side] = random.uniform(0, 255, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def photographs(pristine_data, tmp_path_factory):
    """A dataset whose first training images are photographs of several sizes, and small pictures otherwise."""
    root = tmp_path_factory.mktemp("photographs") / "data"
    shutil.copytree(pristine_data, root)
    for i, (width, height) in enumerate([(1500, 1000), (900, 1600), (500, 375)]):
        draw_photograph(width, height).save(root / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_{i}.JPEG", quality=95)
    # Some phones save a JPEG with another one inside.
    draw_photograph(800, 1001).save(
        root / photograph(4), format="MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))]
    )
    return open_data(str(root))


def photograph(i: int) -> str:
    return f"train/{WNIDS[0]}/images/{WNIDS[0]}_{i}.JPEG"


def test_training_images_are_kept_whole_and_no_larger_than_crops_need(photographs, tmp_path):
    side = enough_pixels([224], 0.35)
    assert 224 / (0.675**0.5) <= side < 1 + 224 / (0.675**0.5)  # a crop of the median area is not enlarged
    store = open_store(photographs, tmp_path, square(224), train_side=side)
    shapes = [stored_pixels(store, photograph(i), whole=True).shape for i in range(4)]
    assert shapes == [(side, 410, 3), (485, side, 3), (side, 364, 3), (32, 32, 3)]
    small = np.asarray(Image.open(photographs.root / photograph(3)).convert("RGB"))
    assert np.array_equal(stored_pixels(store, photograph(3), whole=True), small)


def test_without_training_no_image_is_kept_whole_and_a_later_training_has_them(photographs, tmp_path):
    options = {"geometry": square(64), "train_side": 78}
    evaluated = open_store(photographs, tmp_path, crops=False, **options)
    assert not evaluated.shapes.any() and len(evaluated.columns["view"]) == len(photographs.files)
    trained = open_store(photographs, tmp_path, **options)
    assert stored_pixels(trained, photograph(0), whole=True).shape == (78, 117, 3)
    for file in (photograph(0), photographs.test_files[0]):
        assert np.array_equal(stored_pixels(trained, file), stored_pixels(evaluated, file))
    again = open_store(photographs, tmp_path, crops=False, **options)  # what a training has kept is used
    assert np.array_equal(again.shapes, trained.shapes) and len(list((tmp_path / "store").glob("*-*/"))) == 2


@pytest.mark.parametrize(
    ("arguments", "crops"),
    [
        ({}, True),
        ({"linear_probe": True}, True),
        ({"linear_probe_only": True}, False),
        ({"linear_probe_only": True, "estimate": True}, True),  # which trains some steps
        ({"do_train": False}, False),
    ],
)
def test_a_run_keeps_whole_images_only_to_train_on_their_crops(arguments, crops, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(single, "check_transform", lambda *_: None)
    args = SimpleNamespace(do_train=arguments.pop("do_train", True), main_process_first=lambda **_: nullcontext())
    context = RunContext(RunArguments(data_dir="", **arguments), {}, "", photographs, load_dataset(photographs))
    store = single.decode_images(context, args, SimpleNamespace(geometry=square(64), processor=None))
    assert store.shapes.any() == crops


def test_a_crop_of_a_photograph_is_pils_crop_and_resize_of_the_original(photographs, tmp_path):
    store = open_store(photographs, tmp_path, square(224), train_side=273)
    whole = stored_pixels(store, photograph(0), whole=True)
    images = [torch.from_numpy(whole).permute(2, 0, 1)] * 12
    ours = crop_each(images, 224, 0.35, seeded_generator(5)).permute(0, 2, 3, 1).numpy()
    heights, widths = torch.tensor([whole.shape[:2]] * 12, dtype=torch.float32).T
    crops = draw_crops(heights, widths, 0.35, seeded_generator(5))
    down, along = 1000 / whole.shape[0], 1500 / whole.shape[1]
    original = Image.open(photographs.root / photograph(0))
    for values, box, mirrored in zip(ours, whole_boxes(heights, widths, crops), crops[3] < 0, strict=True):
        edges = box[1] * along, box[0] * down, box[3] * along, box[2] * down
        expected = np.asarray(original.resize((224, 224), Image.Resampling.BILINEAR, edges))
        expected = expected[:, ::-1] if mirrored else expected
        assert np.abs(values.astype(float) - expected).mean() < 3


def test_training_crops_show_every_corner_of_a_wide_photograph(data, tmp_path):
    colors = {(255, 0, 0): (0, 0), (0, 255, 0): (720, 0), (0, 0, 255): (0, 380), (255, 255, 0): (720, 380)}
    picture = Image.new("RGB", (800, 450), (128, 128, 128))
    for color, place in colors.items():
        picture.paste(color, (*place, place[0] + 80, place[1] + 70))
    picture.save(data / photograph(0), quality=95)
    folder, geometry = open_data(str(data)), replace(square(64), resize=64)  # evaluation sees the center alone
    store = open_store(folder, tmp_path, geometry, train_side=78)
    dataset = PixelDataset(store, load_dataset(folder, 0.1)["train"], for_training=True)
    [position] = np.flatnonzero(dataset.rows == store.rows[photograph(0)])
    batch = unpack_images(dataset.__getitems__([position] * 100))
    view = TrainTransform(EvaluationTransform(geometry, cropped=True), [64], 0.35)
    pixels = (view(batch["images"], batch["labels"], seeded_generator(0))[0] + 1) * 127.5
    for color in colors:
        distance = (pixels - torch.tensor(color).view(3, 1, 1)).abs().amax(1)  # (100, 64, 64)
        assert 5 < (distance.amin((1, 2)) < 40).sum() < 100


def test_a_long_strip_takes_no_gigabytes(data, tmp_path):
    Image.effect_noise((20_000, 1), 80).convert("RGB").save(data / photograph(0))
    geometry = read_geometry(PROCESSORS["clip"]())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    store = open_store(open_data(str(data)), tmp_path, geometry)
    whole = torch.from_numpy(stored_pixels(store, photograph(0), whole=True)).permute(2, 0, 1)
    assert whole.shape == (3, 1, 20_000)
    assert crop_each([whole], 36, 0.35, seeded_generator(0)).shape == (1, 3, 36, 36)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 2**17  # KiB
    assert stored_pixels(store, photograph(0)).shape == (36, 36, 3)


@pytest.mark.parametrize("size", [(400, 20), (20, 400), (300, 14), (1900, 100)])
@pytest.mark.parametrize("crop", [(32, 32), (48, 20)])
def test_cropping_before_resizing_gives_the_same_view(size, crop, monkeypatch):
    image = draw_picture(WNIDS[0], 3, size)
    geometry = ImageGeometry(36, crop, "bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
    views = []
    for limit in (10**9, 0):
        monkeypatch.setattr(images, "LARGEST_RESIZED", limit)
        views.append(np.asarray(geometry.apply(image)).astype(int))
    # PIL resizes a high image down before along, and clips in between.
    assert np.abs(views[0] - views[1]).mean() < 0.5


def batches(store, splits):
    return [
        PixelDataset(store, splits[name], for_training).__getitems__(range(len(splits[name])))
        for name in splits
        for for_training in (False, True)
    ]


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) if torch.is_tensor(first[name]) else first[name] == second[name]
        for name in first
    )


@pytest.mark.parametrize("kind", ["small", "photographs"])
def test_batches_are_the_same_without_the_cache(kind, pristine_data, photographs, tmp_path):
    folder = open_data(str(pristine_data)) if kind == "small" else photographs
    splits = load_dataset(folder)
    splits.pop("test")  # the fixture has no labels for it
    cached = open_store(folder, tmp_path, square(64), train_side=78)
    uncached = open_store(folder, tmp_path, square(64), train_side=78, why_uncached="--cache_images false")
    assert uncached.data_fingerprint == cached.data_fingerprint and uncached.size == cached.size
    assert all(itertools.starmap(same, zip(batches(cached, splits), batches(uncached, splits), strict=True)))
    assert not list((tmp_path / "store").glob("*checked/*pixels*"))


@pytest.mark.parametrize("why_uncached", [None, "--cache_images false"])
def test_workers_make_the_same_batches_and_do_not_copy_the_cache(why_uncached, photographs, tmp_path):
    store = open_store(photographs, tmp_path, square(64), train_side=78, why_uncached=why_uncached)
    dataset = PixelDataset(store, load_dataset(photographs)["train"], for_training=True)
    sent = pickle.dumps(dataset)  # as spawn and forkserver do
    assert len(sent) < 50_000  # names of files, not pixels
    options = {"batch_size": 10, "collate_fn": identity_collate}
    alone = list(torch.utils.data.DataLoader(dataset, **options))
    for others in (
        torch.utils.data.DataLoader(dataset, num_workers=2, multiprocessing_context="fork", **options),
        torch.utils.data.DataLoader(pickle.loads(sent), **options),
    ):
        assert all(itertools.starmap(same, zip(alone, others, strict=True)))


def test_every_unreadable_image_is_named_also_where_the_first_one_is_among_them(data, tmp_path):
    folder = open_data(str(data))
    for file in folder.train_files[:2]:
        (folder.root / file).write_bytes(b"no image")
    with pytest.raises(UserError, match=f"2 of {len(folder.files)} images.*{re.escape(folder.train_files[1])}"):
        open_store(folder, tmp_path)


def test_an_image_that_is_damaged_during_a_run_without_cache_is_one_line(data, tmp_path, capsys):
    folder = open_data(str(data))
    store = open_store(folder, tmp_path, why_uncached="--cache_images false")
    dataset = PixelDataset(store, load_dataset(folder)["train"])
    (folder.root / folder.train_files[0]).write_bytes(b"no image")
    loader = torch.utils.data.DataLoader(dataset, batch_size=64, num_workers=1, collate_fn=identity_collate)
    with pytest.raises(SystemExit):
        exits_cleanly(lambda: list(loader))()
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {folder.root / folder.train_files[0]}: cannot be read") and "at the start" in line


def test_data_workers_fit_into_shared_memory(monkeypatch):
    monkeypatch.setattr(single, "count_cores", lambda: 8)
    for free, workers in ((64e6, 3), (1e6, 0), (1e12, 8)):
        monkeypatch.setattr(single.shutil, "disk_usage", lambda place, free=free: SimpleNamespace(free=int(free)))
        monkeypatch.setattr(single, "SHARED_MEMORY", Path("/"))
        assert single.choose_workers(10_000_000, processes=1) == workers


def test_a_batch_of_photographs_can_be_split_where_memory_is_short(photographs, tmp_path):
    store = open_store(photographs, tmp_path, square(64), train_side=78)
    dataset = PixelDataset(store, load_dataset(photographs)["train"], for_training=True)
    batch = unpack_images(dataset.__getitems__(range(8)))
    parts = list(split_batch(batch, 3))
    assert [len(part["images"]) for part in parts] == [3, 3, 2] == [len(part["labels"]) for part in parts]
    assert all(map(torch.equal, batch["images"], [image for part in parts for image in part["images"]]))


def test_a_store_is_reused_until_the_data_change(data, tmp_path, monkeypatch):
    first = open_store(open_data(str(data)), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(pixel_store, "_fill", None)
        open_store(open_data(str(data)), tmp_path)
    changed = data / "test" / "images" / first_image(data)
    before = changed.stat()
    draw_picture(WNIDS[0], 99).save(changed)
    with changed.open("ab") as file:  # to its size and time before
        file.truncate(before.st_size)
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = open_store(open_data(str(data)), tmp_path, may_fail=[f"test/images/{changed.name}"])
    assert changed.stat().st_size == before.st_size and second.data_fingerprint != first.data_fingerprint


@pytest.mark.parametrize("why_uncached", [None, "--cache_images false"])
def test_a_read_error_is_not_remembered_but_damaged_content_is(why_uncached, data, tmp_path, monkeypatch):
    folder = open_data(str(data))
    lost, damaged = folder.test_files[:2]
    (data / damaged).write_bytes(b"no image")
    read_bytes = Path.read_bytes

    def fail(path):
        if path == data / lost:
            raise OSError(errno.EIO, "Input/output error")
        return read_bytes(path)

    def open_again():
        return open_store(folder, tmp_path, may_fail=folder.test_files, why_uncached=why_uncached)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        store = open_again()
        assert list(store.unreadable) == [lost, damaged] and "Input/output error" in store.unreadable[lost]
        assert not stored_pixels(store, lost).any()
        patch.setattr(pixel_store, "_fill", None)
        assert open_again().unreadable == store.unreadable  # nothing is decoded again while it cannot be read
    store = open_again()
    assert list(store.unreadable) == [damaged] and stored_pixels(store, lost).any()
    monkeypatch.setattr(pixel_store, "_fill", None)
    assert open_again().unreadable == store.unreadable


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
        patch.setattr(pixel_store, "_refuse_faults", interrupt)
        with pytest.raises(KeyboardInterrupt):
            open_store(folder, tmp_path)
    assert not [p for p in (tmp_path / "store").iterdir() if p.is_dir()]
    assert len(open_store(folder, tmp_path).columns["pixels"]) == 58


def test_two_builders_at_once_build_one_store(pristine_data, tmp_path, monkeypatch):
    folder, built = open_data(str(pristine_data)), []
    original = pixel_store._fill
    monkeypatch.setattr(pixel_store, "_fill", lambda *args: (built.append(1), original(*args)))
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
    assert np.array_equal(stored_pixels(store, file), turned)


def test_sixteen_bit_images_are_refused_not_blackened(data, tmp_path):
    deep = data / "train" / WNIDS[0] / "images" / "deep.png"
    Image.fromarray(np.arange(32 * 32, dtype=np.uint16).reshape(32, 32)).save(deep)
    with pytest.raises(UserError, match=r"deep\.png: .*more than 8 bits per channel"):
        open_store(open_data(str(data)), tmp_path)


def test_images_that_do_not_fit_the_disk_are_decoded_whenever_they_are_needed(pristine_data, tmp_path, monkeypatch):
    folder = open_data(str(pristine_data))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 150_000))
    store = open_store(folder, tmp_path)  # 58 images of 32 x 32 pixels take 178,176 bytes
    assert "decoded, they take 0.0 GB, and 0.0 GB are free" in store.why_uncached
    assert "HF_DATASETS_CACHE chooses another place" in store.why_uncached
    monkeypatch.undo()
    kept = open_store(folder, tmp_path)
    assert kept.why_uncached is None
    file = folder.train_files[0]
    assert np.array_equal(stored_pixels(store, file), stored_pixels(kept, file))


def test_a_disk_that_fills_up_while_images_are_decoded_is_an_error(data, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(images, "view_pixels", fail)
    draw_picture(WNIDS[0], 2, (70, 40)).save(data / photograph(0))
    with pytest.raises(UserError, match=r"No space left on device.*HF_DATASETS_CACHE chooses another place"):
        open_store(open_data(str(data)), tmp_path)
    assert not [p for p in (tmp_path / "store").iterdir() if p.is_dir()]


def test_several_processes_decode_as_one_does(photographs, pristine_data, tmp_path, monkeypatch):
    one = open_store(photographs, tmp_path / "one", square(64), train_side=78)
    monkeypatch.setattr(images, "WORKERS_FROM", 0)
    monkeypatch.setattr(images, "count_cores", lambda: 2)
    environment = os.environ
    two = open_store(photographs, tmp_path / "two", square(64), train_side=78)
    assert os.environ is environment  # which colors of the terminal, for example, are read from
    assert one.data_fingerprint == two.data_fingerprint and len(list((tmp_path / "two").rglob("*.arrow"))) == 2
    splits = load_dataset(photographs)
    splits.pop("test")
    assert all(itertools.starmap(same, zip(batches(one, splits), batches(two, splits), strict=True)))


def test_another_image_size_shares_the_store_of_whole_images(data, tmp_path, monkeypatch):
    folder = open_data(str(data))
    open_store(folder, tmp_path)
    monkeypatch.setattr(pixel_store, "_fill", None)
    assert not open_store(folder, tmp_path, square(64)).cropped
