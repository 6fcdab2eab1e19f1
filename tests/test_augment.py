"""Augmentation against torchvision, image by image."""

import colorsys
import dataclasses
import shutil

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from scipy import stats
from torchvision.transforms import InterpolationMode, RandomErasing, RandomResizedCrop

from emotion_toolbox.draws import draw_uniforms
from emotion_toolbox.pixels import (
    blur_images,
    blur_some,
    chunks,
    colour_factors,
    denormalise,
    jitter_colours,
    prepare_images,
    shift_hue,
)
from emotion_transfer.augment import (
    AUGMENT_DRAWS,
    BLUR_SIGMA,
    ERASE_AREA,
    ERASE_RATIO,
    Augmentation,
    apply_augmentation,
    draw_augmentation,
    resample_images,
)
from emotion_transfer.config import make_config

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OFF = {
    "CROP_SCALE": (1.0, 1.0),
    **dict.fromkeys(("FLIP_PROB", "ROTATION", "BRIGHTNESS", "CONTRAST", "SATURATION"), 0.0),
    **dict.fromkeys(("HUE", "BLUR_PROB", "ERASE_PROB"), 0.0),
}
ALL_ON = {
    "FLIP_PROB": 0.5, "ROTATION": 20.0, "BRIGHTNESS": 0.5, "CONTRAST": 0.5, "SATURATION": 0.8,
    "HUE": 0.3, "BLUR_PROB": 0.5, "ERASE_PROB": 0.5,
}  # fmt: skip


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return torch.device(request.param)


def smooth_images(count, side, seed=0):
    """Photographs in miniature: smooth uint8 colour fields [count, 3, side, side]."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    pixels = (fine * 255).round().to(torch.uint8)
    return pixels.contiguous(memory_format=torch.channels_last)


def noise_images(count, side, seed=0):
    """Random uint8 images whose first four show what breaks formulas: grey, black, white, ties."""
    pixels = torch.randint(
        0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed)
    )
    pixels[0, 1:] = pixels[0, :1]
    pixels[1] = 0
    pixels[2] = 255
    pixels[3] = pixels[3] // 128 * 255  # the corners of the colour cube
    return pixels.to(torch.uint8).contiguous(memory_format=torch.channels_last)


def neutral(count, theta=None):
    """An augmentation that leaves `count` images as they are."""
    return Augmentation(
        theta=torch.eye(2, 3).repeat(count, 1, 1) if theta is None else theta,
        colour=torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(count, 1),
        blur=torch.zeros(count),
        erase=torch.zeros(count, 4, dtype=torch.int64),
    )


def draw(cfg, count, epoch=0, first=0):
    return draw_augmentation(cfg, draw_uniforms(cfg.SEED, epoch, first, count, AUGMENT_DRAWS))


COLOURS = ("brightness", "contrast", "saturation", "hue")


def parts_of(plan):
    """What a plan says, by name; each column of the colours has its own."""
    colours = dict(zip(COLOURS, plan.colour.unbind(1), strict=True))
    return {"theta": plan.theta, **colours, "blur": plan.blur, "erase": plan.erase}


# --- drawing


def test_drawing_is_a_function_of_the_position():
    cfg = make_config(ALL_ON)
    whole, part = draw(cfg, 60), draw(cfg, 20, first=30)
    for name in ("theta", "colour", "blur", "erase"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[30:50]), name


def test_dtypes_and_shapes():
    plan = draw(make_config(ALL_ON), 9)
    shapes = {"theta": (9, 2, 3), "colour": (9, 4), "blur": (9,), "erase": (9, 4)}
    assert {f.name: getattr(plan, f.name).shape for f in dataclasses.fields(plan)} == shapes
    assert plan.theta.dtype == plan.colour.dtype == plan.blur.dtype == torch.float32
    assert plan.erase.dtype == torch.int64


@pytest.mark.parametrize("shape", [(3, AUGMENT_DRAWS - 1), (AUGMENT_DRAWS,)])
def test_a_wrong_number_of_uniforms_is_an_error(shape):
    with pytest.raises(ValueError, match="should be"):
        draw_augmentation(make_config(), np.zeros(shape))


def test_everything_off_is_exactly_nothing():
    plan, nothing = draw(make_config(OFF), 50), neutral(50)
    for field in dataclasses.fields(plan):
        assert torch.equal(getattr(plan, field.name), getattr(nothing, field.name)), field.name


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("CROP_SCALE", {"theta"}), ("FLIP_PROB", {"theta"}), ("ROTATION", {"theta"}),
        ("BRIGHTNESS", {"brightness"}), ("CONTRAST", {"contrast"}), ("SATURATION", {"saturation"}),
        ("HUE", {"hue"}), ("BLUR_PROB", {"blur"}), ("ERASE_PROB", {"erase"}),
    ],
)  # fmt: skip
def test_each_setting_moves_its_own_part_alone(setting, parts):
    with_it, without = (
        parts_of(draw(make_config({**ALL_ON, **change}), 50))
        for change in ({}, {setting: OFF[setting]})
    )
    assert {name for name in with_it if not torch.equal(with_it[name], without[name])} == parts


def crop_of(plan):
    theta = plan.theta.double().numpy()
    width, height = np.linalg.norm(theta[:, 0, :2], axis=1), np.linalg.norm(theta[:, 1, :2], axis=1)
    return width, height, theta[:, 0, 2], theta[:, 1, 2]


@pytest.mark.parametrize("scale", [(0.6, 1.0), (0.08, 1.0), (0.9, 0.95)])
def test_crops_are_distributed_as_torchvisions(scale):
    width, height, x, y = crop_of(draw(make_config({"CROP_SCALE": scale}), 6000))
    torch.manual_seed(0)
    side = 4000
    image = torch.empty(3, 1, 1).expand(3, side, side)
    boxes = np.array([
        RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(3000)
    ])  # fmt: skip
    top, left, tall, wide = boxes.T / side
    ours = [width * height, np.log(width / height), (x + 1 - width) / 2, (y + 1 - height) / 2]
    theirs = [tall * wide, np.log(wide / tall), left, top]
    for mine, reference in zip(ours, theirs, strict=True):
        # crops of everything are ties, which the test cannot bear; their number is compared below
        mine, reference = mine[width * height < 0.9999], reference[tall * wide < 0.9999]
        assert stats.ks_2samp(mine, reference).pvalue > 1e-3
    full, expected = (width * height >= 0.9999).mean(), (tall * wide >= 0.9999).mean()
    assert abs(full - expected) < 0.01


def test_unrotated_crops_lie_within_the_image():
    width, height, x, y = crop_of(
        draw(make_config({"CROP_SCALE": (0.3, 1.0), "ROTATION": 0.0}), 3000)
    )
    assert (np.abs(x) + width).max() <= 1 + 1e-6 and (np.abs(y) + height).max() <= 1 + 1e-6


def test_flips_angles_factors_and_sigmas_follow_their_settings():
    cfg = make_config({**ALL_ON, "FLIP_PROB": 0.3, "BLUR_PROB": 0.2})
    n = 6000
    plan = draw(cfg, n)
    theta = plan.theta.double().numpy()
    flipped = np.linalg.det(theta[:, :, :2]) < 0
    assert stats.binomtest(int(flipped.sum()), n, 0.3).pvalue > 1e-3
    angle = np.rad2deg(np.arctan2(theta[:, 1, 0], theta[:, 1, 1]))
    blurred, colour = plan.blur[plan.blur > 0], plan.colour.unbind(1)
    uniform = [
        (angle, -20, 20), (colour[0], 0.5, 1.5), (colour[1], 0.5, 1.5), (colour[2], 0.2, 1.8),
        (colour[3], -0.3, 0.3), (blurred, *BLUR_SIGMA),
    ]  # fmt: skip
    for values, low, high in uniform:
        assert stats.kstest(np.asarray(values), "uniform", (low, high - low)).pvalue > 1e-3
    assert stats.binomtest(len(blurred), n, 0.2).pvalue > 1e-3


def test_erased_boxes_are_distributed_as_torchvisions():
    size, n = 512, 4000
    plan = draw(make_config({"IMG_SIZE": size, "ERASE_PROB": 1.0}), n)
    left, top, right, bottom = plan.erase.numpy().T
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= size and bottom.max() <= size
    torch.manual_seed(0)
    image = torch.zeros(1, 1, 1).expand(3, size, size)
    reference = np.array([
        RandomErasing.get_params(image, list(ERASE_AREA), list(ERASE_RATIO), [0.0])[:4]
        for _ in range(2000)
    ])  # fmt: skip
    for mine, theirs in zip((top, left, bottom - top, right - left), reference.T, strict=True):
        assert stats.ks_2samp(mine, theirs).pvalue > 1e-3
    hit = draw(make_config({"ERASE_PROB": 0.25}), n).erase.any(1).sum()
    assert stats.binomtest(int(hit), n, 0.25).pvalue > 1e-3


# --- resampling


def theta_of(top, left, height, width, side, angle=0.0, flip=False):
    """The matrix by the definition: output -> rotate back -> mirror -> into the crop."""
    rotation = np.deg2rad(angle)
    turn = np.array([[np.cos(rotation), -np.sin(rotation)], [np.sin(rotation), np.cos(rotation)]])
    linear = np.diag([width / side * (-1 if flip else 1), height / side]) @ turn
    shift = [(2 * left + width) / side - 1, (2 * top + height) / side - 1]
    return torch.tensor(np.column_stack([linear, shift]), dtype=torch.float32)


@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_in_scale_is_the_crop(device, flip):
    images = noise_images(5, 64).to(device)
    theta = torch.stack([theta_of(7, 19, 32, 32, 64, flip=flip)] * 5).to(device)
    expected = images[:, :, 7:39, 19:51].float()
    if flip:
        expected = expected.flip(3)
    torch.testing.assert_close(resample_images(images, theta, 32), expected, rtol=0, atol=5e-3)


def test_scaled_crops_are_torchvisions_resized_crops(device):
    boxes = [(3, 5, 50, 60), (20, 0, 40, 40), (0, 30, 64, 34), (10, 10, 21, 23)]
    images = smooth_images(4, 64).to(device)
    theta = torch.stack([theta_of(*box, 64) for box in boxes]).to(device)
    result = resample_images(images, theta, 48)
    for image, box, found in zip(images, boxes, result, strict=True):
        expected = TF.resized_crop(image.float(), *box, [48, 48], antialias=False)
        # torchvision repeats the crop's outermost pixels, we look at the ones beyond
        torch.testing.assert_close(found[:, 2:-2, 2:-2], expected[:, 2:-2, 2:-2], rtol=0, atol=1e-2)


@pytest.mark.parametrize("angle", [-30.0, 10.0, 90.0])
@pytest.mark.parametrize("flip", [False, True])
def test_rotation_is_torchvisions(device, angle, flip):
    image = smooth_images(1, 64).to(device)
    theta = theta_of(8, 8, 48, 48, 64, angle, flip)[None].to(device)
    found = resample_images(image, theta, 48)[0]
    crop = image[0, :, 8:56, 8:56].float()
    expected = TF.rotate(
        crop.flip(2) if flip else crop, angle, interpolation=InterpolationMode.BILINEAR
    )
    y, x = torch.meshgrid(torch.arange(48) - 23.5, torch.arange(48) - 23.5, indexing="ij")
    inside = (x.square() + y.square()).sqrt() < 22
    difference = (found - expected).abs()[:, inside.to(device)]
    assert difference.max() < 0.05  # of 255


def test_the_drawn_matrix_is_the_composition_that_its_docstring_names():
    cfg = make_config({"CROP_SCALE": (0.3, 0.9), "ROTATION": 30.0})
    theta = draw(cfg, 40).theta
    width, height, x, y = crop_of(draw(cfg, 40))
    angle = torch.atan2(theta[:, 1, 0], theta[:, 1, 1]).rad2deg().tolist()
    for i in range(40):
        flip = bool(torch.linalg.det(theta[i, :, :2].double()) < 0)
        top, left = (y[i] + 1 - height[i]) / 2, (x[i] + 1 - width[i]) / 2
        expected = theta_of(top, left, height[i], width[i], 1, angle[i], flip)
        torch.testing.assert_close(theta[i], expected, rtol=0, atol=1e-6)


def test_beyond_the_edge_the_image_is_reflected(device):
    images = smooth_images(2, 32).to(device)
    theta = torch.eye(2, 3).mul(2).repeat(2, 1, 1).to(device)  # twice as far as the image reaches
    edges = ((0, 0), (0, 0), (16, 16), (16, 16))
    symmetric = np.pad(images.float().cpu().numpy(), edges, mode="symmetric")
    found = resample_images(images, theta, 64).cpu()
    torch.testing.assert_close(found, torch.from_numpy(symmetric), rtol=0, atol=5e-3)


# --- colour


def random_factors(count, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.rand(count, generator=generator) * 2 for _ in range(3)]
    hue = torch.rand(count, generator=generator) - 0.5
    hue[-2:] = torch.tensor([-0.5, 0.5])
    return [values.to(device) for values in (*factors, hue)]


ADJUSTMENTS = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]


@pytest.mark.parametrize("which", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_each_adjustment_is_torchvisions(device, which):
    images = (noise_images(16, 40).float() / 255).to(device)
    values = random_factors(16, device)[which]
    arguments = [values if i == which else None for i in range(4)]
    found = jitter_colours(images, *arguments)
    expected = [ADJUSTMENTS[which](i, v.item()) for i, v in zip(images, values, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-5)


def test_all_adjustments_together_are_torchvisions(device):
    pixels = torch.cat([noise_images(8, 40), smooth_images(8, 40)])
    images = (pixels.float() / 255).to(device)
    factors = random_factors(16, device, seed=1)
    expected = []
    for row, image in enumerate(images):
        for adjust, values in zip(ADJUSTMENTS, factors, strict=True):
            image = adjust(image, values[row].item())
        expected.append(image)
    found = jitter_colours(images, *factors)
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-5)


def test_hue_is_that_of_colorsys():
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 0.25, 0.5, 1.0])] * 3)
    colours = torch.cat([corners, torch.rand(100, 3, generator=torch.Generator().manual_seed(0))])
    for shift in (-0.5, -0.02, 0.0, 1 / 3, 0.5):
        found = shift_hue(colours.T[None, :, None], torch.tensor([shift]))[0, :, 0].T
        for before, after in zip(colours.double().tolist(), found.tolist(), strict=True):
            h, s, v = colorsys.rgb_to_hsv(*before)
            assert after == pytest.approx(colorsys.hsv_to_rgb((h + shift) % 1, s, v), abs=1e-6)


def test_neutral_factors_change_nothing():
    images = noise_images(6, 16).float() / 255
    one, zero = torch.ones(6), torch.zeros(6)
    assert torch.equal(jitter_colours(images, None, None, None, None), images)
    assert torch.equal(jitter_colours(images, one, one, one, None), images)
    torch.testing.assert_close(shift_hue(images, zero), images, rtol=0, atol=1e-6)
    torch.testing.assert_close(shift_hue(images, one), images, rtol=0, atol=2e-6)


def test_a_colour_that_changes_no_image_is_left_out(device):
    colour = torch.tensor([[1.0, 0.5, 1.0, 0.0], [1.0, 1.0, 1.0, 0.1]])
    brightness, contrast, saturation, hue = colour_factors(colour, device)
    assert brightness is None and saturation is None
    assert contrast.tolist() == [0.5, 1.0] and contrast.device.type == device.type
    assert hue.tolist() == pytest.approx([0.0, 0.1])


def test_hue_shifts_add_up_and_keep_lightness():
    images = noise_images(6, 16, seed=3).float() / 255
    a, b = torch.full((6,), 0.13), torch.full((6,), 0.29)
    twice = shift_hue(shift_hue(images, a), b)
    torch.testing.assert_close(twice, shift_hue(images, a + b), rtol=0, atol=5e-6)
    for extreme in (torch.amax, torch.amin):
        torch.testing.assert_close(extreme(twice, 1), extreme(images, 1), rtol=0, atol=1e-6)


def test_inputs_are_left_alone():
    images = noise_images(4, 16).float() / 255
    before = images.clone()
    jitter_colours(images, *random_factors(4, "cpu"))
    blur_images(images, torch.ones(4))
    assert torch.equal(images, before)


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler here"
)
def test_the_colour_jitter_compiles_to_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(jitter_colours, fullgraph=True)
    images = noise_images(4, 32).float() / 255
    factors = [f * 0.2 + 0.9 for f in random_factors(4, "cpu")[:3]]
    arguments = (*factors, torch.full((4,), 0.02))
    found = compiled(images, *arguments)
    torch.testing.assert_close(found, jitter_colours(images, *arguments), rtol=0, atol=1e-5)
    torch._dynamo.reset()


def test_another_colour_jitter_can_be_given():
    cfg = make_config({**ALL_ON, "IMG_SIZE": 40, "BLUR_PROB": 0.0, "ERASE_PROB": 0.0})
    images, plan = smooth_images(5, 46), draw(cfg, 5)
    black = apply_augmentation(
        images, plan, 40, MEAN, STD, jitter=lambda pixels, *factors: torch.zeros_like(pixels)
    )
    assert (denormalise(black, MEAN, STD) == 0).all()


# --- blur


def test_blur_is_torchvisions(device):
    images = (noise_images(5, 33).float() / 255).to(device)
    sigma = torch.tensor([0.5, 0.7, 1.0, 1.3, 1.5], device=device)
    found = blur_images(images, sigma)
    for image, s, blurred in zip(images, sigma, found, strict=True):
        expected = TF.gaussian_blur(image, kernel_size=[7, 7], sigma=[s.item()] * 2)
        torch.testing.assert_close(blurred, expected, rtol=0, atol=1e-5)


def test_only_what_is_to_be_blurred_changes(device):
    images = (noise_images(5, 33).float() / 255).to(device)
    sigma = torch.tensor([0.0, 0.7, 0.0, 1.5, 0.0])
    found = images.clone()
    blur_some(found, sigma)
    assert torch.equal(found[[0, 2, 4]], images[[0, 2, 4]])
    expected = blur_images(images[[1, 3]], sigma[[1, 3]].to(device))
    torch.testing.assert_close(found[[1, 3]], expected, rtol=0, atol=1e-6)


# --- all of it


def reference_augmentation(image, plan, row, size):
    """One uint8 image [3, S, S] through torchvision, with the parameters of `plan`."""
    pixels = resample_images(image[None], plan.theta[row : row + 1].to(image.device), size)[0] / 255
    for adjust, value in zip(ADJUSTMENTS, plan.colour[row].tolist(), strict=True):
        pixels = adjust(pixels, value)
    if sigma := plan.blur[row].item():
        pixels = TF.gaussian_blur(pixels, kernel_size=[7, 7], sigma=[sigma, sigma])
    pixels = TF.normalize(pixels, list(MEAN), list(STD))
    left, top, right, bottom = plan.erase[row].tolist()
    return TF.erase(
        pixels, top, left, bottom - top, right - left, torch.zeros(1, device=pixels.device)
    )


@pytest.mark.parametrize("count", [1, 2, 13])
def test_a_batch_is_torchvision_image_by_image(device, count):
    cfg = make_config({**ALL_ON, "HUE": 0.02, "IMG_SIZE": 48})
    images, plan = smooth_images(count, 55).to(device), draw(cfg, count)
    before = images.clone()
    found = apply_augmentation(images, plan, 48, MEAN, STD)
    assert found.shape == (count, 3, 48, 48) and found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)
    for row in range(count):
        expected = reference_augmentation(images[row], plan, row, 48)
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-4)


def test_an_image_does_not_depend_on_its_neighbours(device):
    cfg = make_config({**ALL_ON, "IMG_SIZE": 40})
    images = smooth_images(11, 46).to(device)
    whole = apply_augmentation(images, draw(cfg, 11), 40, MEAN, STD)
    for first, count in [(0, 1), (4, 5), (10, 1)]:
        part = draw(cfg, count, first=first)
        found = apply_augmentation(images[first : first + count], part, 40, MEAN, STD)
        torch.testing.assert_close(found, whole[first : first + count], rtol=0, atol=1e-5)


def test_memory_layout_and_autocast_change_nothing(device):
    cfg = make_config({**ALL_ON, "IMG_SIZE": 40})
    images, plan = smooth_images(6, 46).to(device), draw(cfg, 6)
    expected = apply_augmentation(images, plan, 40, MEAN, STD)
    plain = images.contiguous(memory_format=torch.contiguous_format)
    torch.testing.assert_close(
        apply_augmentation(plain, plan, 40, MEAN, STD), expected, rtol=0, atol=1e-5
    )
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(apply_augmentation(images, plan, 40, MEAN, STD), expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_repeating_is_bitwise(threads):
    cfg = make_config({**ALL_ON, "IMG_SIZE": 40})
    images, plan, before = smooth_images(7, 46), draw(cfg, 7), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        first, second = (apply_augmentation(images, plan, 40, MEAN, STD) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(first, second)


def test_the_neutral_augmentation_is_the_evaluation(device):
    images = noise_images(5, 64).to(device)
    plan = neutral(5, theta=torch.eye(2, 3).mul(56 / 64).repeat(5, 1, 1))
    torch.testing.assert_close(
        apply_augmentation(images, plan, 56, MEAN, STD),
        prepare_images(images, 56, MEAN, STD),
        rtol=0,
        atol=1e-4,  # of a standard deviation
    )


@pytest.mark.parametrize("count", [0, 1, 7, 64])
def test_the_chunks_of_a_batch_cover_it_once(device, count):
    images = torch.arange(count, device=device)
    parts = [images[part] for part in chunks(images)]
    assert torch.equal(torch.cat([*parts, images[:0]]), images)
    assert len(parts) <= 1 or device.type == "cpu"


def test_no_images_are_no_images():
    cfg = make_config({"IMG_SIZE": 32})
    found = apply_augmentation(smooth_images(1, 40)[:0], draw(cfg, 0), 32, MEAN, STD)
    assert found.shape == (0, 3, 32, 32)


def test_cuda_is_never_waited_for():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    cfg = make_config({**ALL_ON, "IMG_SIZE": 40})
    images, plan = smooth_images(8, 46).cuda(), draw(cfg, 8)
    apply_augmentation(images, plan, 40, MEAN, STD)
    torch.cuda.set_sync_debug_mode("error")
    try:
        apply_augmentation(images, plan, 40, MEAN, STD)
        prepare_images(images, 40, MEAN, STD)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 40, 40), "uint8"),
        (torch.zeros(2, 1, 40, 40, dtype=torch.uint8), "uint8"),
        (torch.zeros(2, 3, 40, 41, dtype=torch.uint8), "uint8"),
        (torch.zeros(3, 40, 40, dtype=torch.uint8), "uint8"),
        (torch.zeros(2, 3, 31, 31, dtype=torch.uint8), "CACHE_SIZE"),
    ],
)
def test_unsuitable_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        prepare_images(images, 32, MEAN, STD)
    with pytest.raises(ValueError, match=message):
        apply_augmentation(images, neutral(2), 32, MEAN, STD)


def test_a_plan_for_another_batch_is_refused():
    with pytest.raises(ValueError, match="3 augmentations do not fit 2 images"):
        apply_augmentation(smooth_images(2, 40), neutral(3), 32, MEAN, STD)


# --- evaluation and pictures


@pytest.mark.parametrize(("side", "size"), [(64, 56), (63, 56), (65, 56), (183, 160), (56, 56)])
def test_preparation_is_torchvisions_centre_crop_and_normalisation(device, side, size):
    images = noise_images(5, side).to(device)
    before = images.clone()
    found = prepare_images(images, size, MEAN, STD)
    scaled = TF.to_dtype(TF.center_crop(images, [size, size]), torch.float32, scale=True)
    expected = TF.normalize(scaled, list(MEAN), list(STD))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)


def test_denormalise_gives_the_pixels_back(device):
    images = noise_images(5, 64).to(device)
    pictures = denormalise(prepare_images(images, 56, MEAN, STD), MEAN, STD)
    assert pictures.dtype == np.uint8 and pictures.shape == (5, 56, 56, 3)
    expected = images[:, :, 4:60, 4:60].permute(0, 2, 3, 1).cpu().numpy()
    np.testing.assert_array_equal(pictures, expected)
    extreme = denormalise(torch.full((1, 3, 2, 2), 1e3), MEAN, STD)
    assert (extreme == 255).all() and (
        denormalise(torch.full((1, 3, 2, 2), -1e3), MEAN, STD) == 0
    ).all()
