"""Mixup, cutmix, TrivialAugment, erasing and sizes by progress: each does what its name says, and not nothing."""

import json

import numpy as np
import pytest
import torch
from conftest import WNIDS, draw_picture
from PIL import Image, ImageEnhance
from test_views import PROCESSORS, batch_of

from transfer.models.load import read_geometry
from transfer.transforms.evaluation import EvaluationTransform
from transfer.transforms.training import Mixing, RandomErasing, TrainTransform, TrivialAugment, seeded_generator


def photographs(count: int) -> torch.Tensor:
    return torch.cat([batch_of(draw_picture(WNIDS[i % 4], i)) for i in range(count)]).float()


def plain_batch(classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that hold their own label in every pixel."""
    labels = torch.arange(classes)
    return labels.float().view(-1, 1, 1, 1).expand(-1, 3, 16, 16).contiguous(), labels


@pytest.mark.parametrize("alphas", [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)], ids=["mixup", "cutmix", "both"])
def test_mixed_targets_sum_to_one_and_are_the_shares_of_the_pixels(alphas):
    views, labels = plain_batch()
    mixed_batches = 0
    for draw in range(20):
        mixed, targets = Mixing(5, *alphas)(views, labels, seeded_generator(draw))
        torch.testing.assert_close(targets.sum(1), torch.ones(5))
        # The mean pixel is the mean label, by the same shares as the target's.
        torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ labels.float(), atol=1e-4, rtol=0)
        mixed_batches += bool((targets.max(1).values < 0.99).any())
    assert mixed_batches >= 8
    assert torch.equal(views, plain_batch()[0])  # the batch itself is left alone


def test_training_on_mixed_labels_stays_cross_entropy(pristine_data, checkpoints, finetune):
    out = finetune(pristine_data, checkpoints("convnext"), mixup_alpha=0.2, cutmix_alpha=1.0)
    assert json.loads((out / "model" / "config.json").read_text()).get("problem_type") is None
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert 1.0 < losses[0] < 2.0  # ln 4 for four classes; binary cross-entropy would start near 0.7


def test_mixing_changes_the_training_and_stops_when_told(pristine_data, checkpoints, finetune):
    runs = {
        name: finetune(pristine_data, checkpoints("convnext"), output_dir=name, **arguments)
        for name, arguments in {
            "plain": {},
            "mixed": {"mixup_alpha": 0.4},
            "never": {"mixup_alpha": 0.4, "augment_until": 0.0},
        }.items()
    }
    weights = {name: (out / "model" / "model.safetensors").read_bytes() for name, out in runs.items()}
    assert weights["plain"] == weights["never"] != weights["mixed"]


@pytest.mark.parametrize("number", range(14))
def test_each_operation_keeps_shape_and_range_and_changes_images(number, monkeypatch):
    images, augment = photographs(40), TrivialAugment()
    assert len(augment.operations) == 14
    monkeypatch.setattr(
        torch, "randint", lambda high, size, **_: torch.full(size, number) if size else torch.tensor(7)
    )
    changed = augment(images, seeded_generator(0))
    assert changed.shape == images.shape and changed.isfinite().all()
    assert changed.min() >= -0.01 and changed.max() <= 255.01
    if number:  # the first one leaves images as they are
        assert (changed - images).abs().mean() > 1
    else:
        assert torch.equal(changed, images)


@pytest.mark.parametrize(
    ("number", "name", "enhancer"),
    [
        (1, "brightness_factor", ImageEnhance.Brightness),
        (2, "contrast_factor", ImageEnhance.Contrast),
        (3, "saturation_factor", ImageEnhance.Color),
    ],
)
@pytest.mark.parametrize("factor", [0.3, 1.7])
def test_brightness_contrast_and_saturation_are_pils(number, name, enhancer, factor):
    operation, images = TrivialAugment().operations[number], photographs(1) / 255
    drawn = operation.forward_parameters(images.shape)
    assert 0.01 <= drawn[name].item() <= 1.99
    changed = operation(images, params=drawn | {name: torch.tensor([factor])})
    picture = Image.fromarray((images[0].permute(1, 2, 0) * 255).byte().numpy())
    expected = torch.from_numpy(np.array(enhancer(picture).enhance(factor))).permute(2, 0, 1) / 255
    assert (changed[0] - expected).abs().mean() < 0.01


def test_random_draws_do_not_follow_the_model_to_another_device():
    transform = TrainTransform(EvaluationTransform(read_geometry(PROCESSORS["vit"]())), [24], 0.5, True, 0.5)
    assert not [module for module in transform.modules() if type(module).__module__.startswith("kornia")]


def test_trivial_augment_gives_every_image_its_own_change_and_repeats_with_the_seed():
    images, augment = photographs(1).repeat(40, 1, 1, 1), TrivialAugment()
    before = torch.get_rng_state()
    changed = augment(images, seeded_generator(3))
    assert torch.equal(changed, augment(images, seeded_generator(3)))
    assert torch.equal(before, torch.get_rng_state())  # kornia's draws leave torch's own as they were
    assert len({values.sum().item() for values in changed}) > 20
    assert torch.equal(images, photographs(1).repeat(40, 1, 1, 1))


def test_erasing_blanks_one_box_of_the_asked_share_of_views():
    erased = RandomErasing(0.25)(torch.ones(2000, 3, 32, 32), seeded_generator(0)) == 0
    hit = erased.flatten(1).any(1)
    assert 0.22 < hit.float().mean() < 0.28
    shares = erased[hit].float().mean((1, 2, 3))
    assert shares.min() > 0.01 and shares.max() < 0.4
    rows, columns = erased[hit][:, 0].any(2), erased[hit][:, 0].any(1)
    boxes = rows[:, :, None] & columns[:, None, :]
    assert torch.equal(boxes, erased[hit][:, 0])
    assert not (RandomErasing(0.0)(torch.ones(8, 3, 32, 32), seeded_generator(0)) == 0).any()


def test_sizes_follow_each_other_and_strong_augmentation_ends():
    view = TrainTransform(
        EvaluationTransform(read_geometry(PROCESSORS["vit"]())), [16, 24, 32], 0.5, True, 1.0, augment_until=0.5
    )
    images = photographs(3).byte()

    def draw(view, progress):
        return view(images, torch.zeros(3), seeded_generator(1), progress)[0]

    assert [draw(view, p).shape[-1] for p in (0, 0.32, 0.34, 0.65, 0.67, 0.999, 1.0)] == [16, 16, 24, 24, 32, 32, 32]
    plain = TrainTransform(view.evaluation, [16, 24, 32], 0.5)
    assert torch.equal(draw(view, 0.6), draw(plain, 0.6)) and not torch.equal(draw(view, 0.4), draw(plain, 0.4))
