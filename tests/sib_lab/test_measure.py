import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from sib_lab.explaining import measures as measure
from sib_lab.explaining.measures import (
    IOU_THRESHOLDS,
    MEASURES,
    accuracy,
    blurred,
    correct,
    deletion,
    effective_heat_ratio,
    empty_maps,
    energy_pointing_game,
    insertion,
    intersection_over_union,
    measure_maps,
    measure_perturbation,
    object_share,
    pointing_game,
    predict,
    worst_group,
)
from torch import nn
from torch.utils.data import DataLoader


def masks_of(*rows):
    return torch.tensor(rows, dtype=torch.float32)[:, None]


def random_maps(count, height=9, width=7, seed=0):
    """Maps with zeros and ties among them, and masks of all sizes."""
    random = np.random.default_rng(seed)
    maps = random.gamma(0.5, size=(count, height, width))
    maps[1::3] = np.round(maps[1::3], 1)
    maps[2::3] *= random.random((len(maps[2::3]), height, width)) < 0.3
    masks = random.random((count, 1, height, width)) < np.linspace(0.1, 0.9, count)[:, None, None, None]
    masks[:, :, 4, 4] = True
    return torch.from_numpy(maps), torch.from_numpy(masks).float()


# ------------------------------------------------------------------------------------------------------ EPG


def test_epg_is_the_share_of_the_map_on_the_object():
    maps = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 5.0]]])
    masks = masks_of([[0, 1], [0, 1]], [[1, 1], [1, 0]])
    assert energy_pointing_game(maps, masks).tolist() == [pytest.approx(0.6), 0.0]


def test_a_soft_mask_counts_where_it_is_above_one_half():
    maps = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    assert energy_pointing_game(maps, masks_of([[0.5, 0.51], [0.49, 0]])).item() == pytest.approx(0.2)


def test_epg_is_1_on_a_full_mask_0_of_a_zero_map_and_undefined_for_an_empty_mask():
    maps = torch.stack([torch.ones(3, 3), torch.zeros(3, 3), torch.ones(3, 3)])
    masks = torch.stack([torch.ones(1, 3, 3), torch.ones(1, 3, 3), torch.zeros(1, 3, 3)])
    full, zero, undefined = energy_pointing_game(maps, masks).tolist()
    assert (full, zero) == (1, 0) and math.isnan(undefined)


def test_epg_of_a_flat_map_is_the_objects_share_of_the_image():
    masks = torch.rand(4, 1, 6, 6)
    torch.testing.assert_close(energy_pointing_game(torch.ones(4, 6, 6), masks), object_share(masks))


def test_epg_is_quantus_relevance_mass_accuracy():
    quantus = pytest.importorskip("quantus")
    maps, masks = random_maps(12)
    oracle = quantus.RelevanceMassAccuracy(abs=False, normalise=False, disable_warnings=True)
    expected = localisation(oracle, maps, masks)
    np.testing.assert_allclose(energy_pointing_game(maps, masks), expected, rtol=1e-6)


def localisation(oracle, maps, masks):
    """A quantus localisation measure, which wants a model and images that it does not use."""
    images = np.zeros((len(maps), 3, *maps.shape[1:]), np.float32)
    return oracle(
        model=nn.Identity(),
        x_batch=images,
        y_batch=np.zeros(len(maps), int),
        a_batch=maps.numpy()[:, None],
        s_batch=masks.numpy().astype(bool),
    )


# -------------------------------------------------------------------------------------------- pointing game


def test_the_pointing_game_asks_whether_the_maximum_is_on_the_object():
    maps = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]] * 3)
    masks = masks_of([[0, 0], [0, 1]], [[1, 1], [1, 0]], [[1, 1], [1, 1]])
    assert pointing_game(maps, masks).tolist() == [1, 0, 1]


def test_of_several_equal_maxima_the_share_on_the_object_counts():
    maps = torch.tensor([[[4.0, 2.0], [3.0, 4.0]]] * 3)
    masks = masks_of([[0, 0], [0, 1]], [[1, 0], [0, 0]], [[0, 1], [1, 0]])
    assert pointing_game(maps, masks).tolist() == [0.5, 0.5, 0]


def test_the_pointing_game_is_quantus_relevance_rank_accuracy_of_an_object_of_one_pixel():
    quantus = pytest.importorskip("quantus")
    maps = torch.rand(100, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    masks = torch.zeros(100, 1, 4, 4)
    masks[:, 0, 0, 1] = 1
    oracle = quantus.RelevanceRankAccuracy(abs=False, normalise=False, disable_warnings=True)
    expected = localisation(oracle, maps, masks)
    assert 0 < sum(expected) < 100
    np.testing.assert_allclose(pointing_game(maps, masks), expected)


# ------------------------------------------------------------------------------------------------------ IoU


def test_the_thresholds_of_iou_are_those_of_the_definition():
    assert IOU_THRESHOLDS == (
        0.15,
        0.2,
        0.25,
        0.3,
        0.35,
        0.4,
        0.45,
        0.5,
        0.55,
        0.6,
        0.65,
        0.7,
        0.75,
        0.8,
        0.85,
        0.9,
        0.95,
    )


def test_iou_by_hand():
    # t <= 0.25: 3 of 4 pixels hot; t in 0.3..0.5: 2, both on the object; above 0.5: 1.
    maps = torch.tensor([[[1.0, 0.5], [0.25, 0.1]]])
    value, threshold = intersection_over_union(maps, masks_of([[1, 1], [0, 0]]))
    assert (value.item(), threshold.item()) == (1.0, 0.3)


def test_iou_is_the_best_over_all_thresholds_counted_pixel_by_pixel():
    maps, masks = random_maps(20)
    values, thresholds = intersection_over_union(maps, masks)
    for heat, mask, value, threshold in zip(maps, masks[:, 0] > 0.5, values, thresholds, strict=True):
        best, best_t = -1.0, None
        for step in range(17):
            t = round(0.15 + 0.05 * step, 2)
            hot = {(i, j) for i in range(9) for j in range(7) if heat[i, j] >= t * heat.max()}
            on = {(i, j) for i in range(9) for j in range(7) if mask[i, j]}
            if len(hot & on) / len(hot | on) > best:
                best, best_t = len(hot & on) / len(hot | on), t
        assert (value.item(), threshold.item()) == (pytest.approx(best, abs=1e-12), best_t)
    assert len(thresholds.unique()) > 3


def test_iou_of_as_many_hot_pixels_as_the_object_has_follows_from_quantus_relevance_rank_accuracy():
    quantus = pytest.importorskip("quantus")
    random = np.random.default_rng(0)
    maps, masks = random.uniform(0, 0.1, (8, 20)), np.zeros((8, 20))
    for heat, mask, size in zip(maps, masks, range(2, 18, 2), strict=True):
        heat[random.permutation(20)[:size]] = random.uniform(0.97, 1, size)  # all of them or none, at any threshold
        mask[random.permutation(20)[:size]] = 1
    maps, masks = torch.from_numpy(maps).view(8, 4, 5), torch.from_numpy(masks).view(8, 1, 4, 5)
    oracle = quantus.RelevanceRankAccuracy(abs=False, normalise=False, disable_warnings=True)
    shared = np.asarray(localisation(oracle, maps, masks))
    value, _ = intersection_over_union(maps, masks)
    np.testing.assert_allclose(value, shared / (2 - shared), rtol=1e-6)


# ------------------------------------------------------------------------------------------------------ EHR


def test_ehr_by_hand():
    # 11 values 0..10: quantile q is the value 10 q, and q..10 remain; the object is the pixel of value 10.
    maps = torch.arange(11.0).view(1, 1, 11)
    mask = masks_of([[0] * 10 + [1]])
    ratios = [10 / sum(range(q, 11)) for q in range(11)]
    expected = sum(0.1 * (a + b) / 2 for a, b in zip(ratios, ratios[1:], strict=False))
    assert effective_heat_ratio(maps, mask).item() == pytest.approx(expected, abs=1e-12)


def test_ehr_is_the_area_under_the_share_of_the_heat_above_numpys_quantiles():
    maps, masks = random_maps(20)
    for heat, mask, value in zip(
        maps.numpy(), masks[:, 0].numpy() > 0.5, effective_heat_ratio(maps, masks), strict=True
    ):
        scaled = heat / heat.max()
        ratios = []
        for q in np.linspace(0, 1, 11):
            remains = scaled >= np.quantile(scaled, q) - 1e-15
            ratios.append(scaled[remains & mask].sum() / scaled[remains].sum())
        assert value.item() == pytest.approx(np.trapezoid(ratios, dx=0.1), abs=1e-9)


def test_ehr_of_a_flat_map_is_the_objects_share_of_the_image():
    masks = (torch.rand(4, 1, 6, 6) > 0.4).float()
    torch.testing.assert_close(effective_heat_ratio(torch.full((4, 6, 6), 0.1), masks), object_share(masks))


# ---------------------------------------------------------------------------------- all measures of maps


def test_all_measures_at_once_are_the_single_ones():
    maps, masks = random_maps(10)
    values = measure_maps(maps, masks)
    assert tuple(values) == tuple(MEASURES) and all(v.shape == (10,) for v in values.values())
    assert torch.equal(values["epg"], energy_pointing_game(maps, masks))
    assert torch.equal(values["pointing_game"], pointing_game(maps, masks))
    assert torch.equal(
        torch.stack([values["iou"], values["iou_threshold"]]), torch.stack(intersection_over_union(maps, masks))
    )
    assert torch.equal(values["ehr"], effective_heat_ratio(maps, masks))
    assert torch.equal(values["empty"], empty_maps(maps))


def test_a_full_mask_gets_1_from_every_measure():
    maps, _ = random_maps(10)
    values = measure_maps(maps, torch.ones(10, 1, 9, 7))
    for key in ("epg", "pointing_game", "ehr"):
        torch.testing.assert_close(values[key], torch.ones(10, dtype=torch.float64))
    assert values["iou_threshold"].eq(0.15).all()


@pytest.mark.parametrize("broken", ["empty mask", "nan", "nan in zeros", "infinite", "all nan"])
def test_every_measure_is_undefined_there_and_only_there(broken):
    maps, masks = random_maps(3)
    expected = measure_maps(maps, masks)
    maps, masks = maps.clone(), masks.clone()
    if broken == "empty mask":
        masks[1] = 0.5
    else:
        maps[1] = {"nan in zeros": 0.0, "all nan": math.nan}.get(broken, 1.0)
        maps[1, 0, 0] = math.inf if broken == "infinite" else math.nan
    for key, values in measure_maps(maps, masks).items():
        defined = key == "empty" and broken == "empty mask"  # a map may be counted whatever the object is
        assert values.isnan().tolist() == [False, not defined, False]
        assert torch.equal(values[[0, 2]], expected[key][[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_map_that_is_zero_everywhere_counts_as_0_and_is_counted(dtype):
    maps, masks = random_maps(3)
    maps = maps.to(dtype)
    expected = measure_maps(maps, masks)
    assert expected.pop("empty").tolist() == [0, 0, 0]
    maps[1] = 0
    values = measure_maps(maps, masks)
    assert values.pop("empty").tolist() == [0, 1, 0]
    assert values["iou_threshold"].isnan().tolist() == [False, True, False]
    for key, of in values.items():
        assert of[1] == 0 or key == "iou_threshold"
        assert torch.equal(of[[0, 2]], expected[key][[0, 2]])


def test_a_map_with_a_single_smallest_value_is_not_empty():
    maps = torch.zeros(2, 3, 3)
    maps[1, 2, 2] = torch.finfo(torch.float32).smallest_normal
    masks = masks_of([[1, 1, 1]] * 3, [[0, 0, 0], [0, 0, 0], [0, 0, 1]])
    values = measure_maps(maps, masks)
    assert values["empty"].tolist() == [1, 0]
    assert all(values[key].tolist() == [0, 1] for key in ("epg", "pointing_game", "iou", "ehr"))


def test_measures_pixel_by_pixel_where_some_maps_are_empty():
    maps, masks = random_maps(20)
    maps[::4] = 0
    values = measure_maps(maps, masks)
    for row, (heat, on) in enumerate(zip(maps.tolist(), (masks[:, 0] > 0.5).tolist(), strict=True)):
        pixels = [(heat[i][j], on[i][j]) for i in range(9) for j in range(7)]
        total, highest = sum(value for value, _ in pixels), max(value for value, _ in pixels)
        assert values["empty"][row] == float(not total) == float(row % 4 == 0)
        share = sum(value for value, inside in pixels if inside) / total if total else 0.0
        assert values["epg"][row].item() == pytest.approx(share, abs=1e-12)
        hits = [inside for value, inside in pixels if value == highest]
        assert values["pointing_game"][row].item() == pytest.approx(sum(hits) / len(hits) if highest else 0.0)


def test_a_flat_map_says_nothing_but_is_defined():
    masks = masks_of([[1, 0], [0, 0]])
    values = measure_maps(torch.full((1, 2, 2), 0.3), masks)
    assert {key: value.item() for key, value in values.items()} == {
        "epg": pytest.approx(0.25),
        "pointing_game": 0.25,
        "iou": 0.25,
        "iou_threshold": 0.15,
        "ehr": pytest.approx(0.25),
        "empty": 0,
    }


@pytest.mark.parametrize("function", [measure_maps, energy_pointing_game, pointing_game, intersection_over_union])
def test_negative_values_are_refused(function):
    maps = torch.ones(2, 3, 3)
    maps[1, 1, 1] = -1e-9
    with pytest.raises(ValueError, match="maps must be >= 0 everywhere"):
        function(maps, torch.ones(2, 1, 3, 3))


def test_images_of_one_pixel_can_be_measured():
    values = measure_maps(torch.tensor([[[2.0]], [[0.0]], [[2.0]]]), torch.tensor([1.0, 1, 0]).view(3, 1, 1, 1))
    assert values.pop("empty").tolist() == [0, 1, 0]
    assert values.pop("iou_threshold").nan_to_num(-1).tolist() == [0.15, -1, -1]
    for value in values.values():
        assert value[:2].tolist() == [1, 0] and value[2].isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_maps_of_any_floating_type_are_measured_in_float64(dtype):
    maps, masks = random_maps(10, 40, 40)
    maps = (100 * maps).to(dtype)  # sums beyond float16's range
    for key, values in measure_maps(maps, masks).items():
        assert values.dtype == torch.float64 and torch.equal(values, measure_maps(maps.double(), masks)[key])


def test_no_measure_changes_with_the_scale_of_a_map():
    maps, masks = random_maps(10)
    expected = measure_maps(maps, masks)
    for scale in (2.0**-60, 2.0**20):
        for key, values in measure_maps(maps * scale, masks).items():
            torch.testing.assert_close(values, expected[key])
    torch.testing.assert_close(energy_pointing_game(maps.float() * 1e-30, masks), expected["epg"], rtol=1e-5, atol=0)


def test_the_measures_of_an_image_do_not_depend_on_the_others(monkeypatch):
    maps, masks = random_maps(11)
    together = measure_maps(maps, masks)
    monkeypatch.setattr(measure, "CHUNK", 4)
    in_chunks = measure_maps(maps, masks)
    for row in range(11):
        for key, values in measure_maps(maps[row : row + 1], masks[row : row + 1]).items():
            torch.testing.assert_close(values[0], together[key][row], rtol=1e-14, atol=0)
            torch.testing.assert_close(values[0], in_chunks[key][row], rtol=1e-14, atol=0)


def test_no_maps_have_no_measures():
    assert all(len(values) == 0 for values in measure_maps(torch.ones(0, 3, 3), torch.ones(0, 1, 3, 3)).values())


def test_shapes_that_do_not_fit_are_refused():
    for maps, masks, message in [
        (torch.ones(2, 3, 3), torch.ones(2, 1, 3, 4), r"got masks \[2, 1, 3, 4\] for maps \[2, 3, 3\]"),
        (torch.ones(2, 3, 3), torch.ones(2, 3, 3), r"masks must be \[N,1,H,W\]"),
        (torch.ones(2, 1, 3, 3), torch.ones(2, 1, 3, 3), r"maps must be floating \[N,H,W\]"),
        (torch.ones(2, 3, 3, dtype=torch.int), torch.ones(2, 1, 3, 3), "got torch.int32"),
        (torch.ones(2, 0, 3), torch.ones(2, 1, 0, 3), r"got torch.float32 \[2, 0, 3\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            measure_maps(maps, masks)


# ------------------------------------------------------------------------------------------------ accuracies


class Brightest(nn.Module):
    """The channel with the largest sum; its scores are wrong in train mode."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(1.0)

    def forward(self, x):
        return self.dropout(x.sum((2, 3)) + 100)


class Picture(NamedTuple):
    image: torch.Tensor
    label: int
    mask: torch.Tensor
    annotated: bool
    group: int


@pytest.fixture
def model():
    return Brightest()


@pytest.fixture
def images():
    return torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_predictions_are_those_of_eval_mode_whatever_the_batch(model, images):
    expected = images.sum((2, 3)).argmax(1)
    assert len(expected.unique()) > 1
    for batch in (1, 3, 100):
        assert torch.equal(predict(model.train(), images, batch), expected)
    assert model.training and model.dropout.training


def test_correctness_and_accuracy_of_a_tensor(model, images):
    labels = images.sum((2, 3)).argmax(1)
    labels[[2, 5, 6]] += 1
    right = correct(model, images, labels)
    assert right.dtype == torch.float32 and (right == 0).nonzero()[:, 0].tolist() == [2, 5, 6]
    assert accuracy(model, images, labels) == pytest.approx(0.7)


@pytest.mark.parametrize("batch", [1, 4, 10])
def test_a_loader_of_items_gives_the_same_as_its_tensors(model, images, batch):
    labels = images.sum((2, 3)).argmax(1)
    labels[:3] += 1
    items = [Picture(image, int(label), image[:1], True, -1) for image, label in zip(images, labels, strict=True)]
    loader = DataLoader(items, batch_size=batch)
    assert torch.equal(predict(model, loader), predict(model, images))
    assert torch.equal(correct(model, loader), correct(model, images, labels))
    assert accuracy(model, loader) == pytest.approx(0.7)


def test_a_shuffled_loader_is_gone_through_once(model, images):
    labels = images.sum((2, 3)).argmax(1)
    items = [Picture(image, int(label), image[:1], True, -1) for image, label in zip(images, labels, strict=True)]
    assert accuracy(model, DataLoader(items, batch_size=3, shuffle=True)) == 1


def test_the_accuracy_of_no_images_is_undefined(model, images):
    assert math.isnan(accuracy(model, images[:0], torch.empty(0, dtype=torch.long))) and math.isnan(accuracy(model, []))


def test_labels_go_with_tensors_and_not_with_batches(model, images):
    for data, labels in ((images, None), ([(images, torch.zeros(10))], torch.zeros(10))):
        with pytest.raises(ValueError, match="give them with a tensor of images"):
            accuracy(model, data, labels)


def test_the_worst_group_is_the_worst_pair_of_label_and_background():
    right = torch.tensor([1.0, 1, 0, 1, 0, 0, 1, 1])
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    groups = torch.tensor([0, 0, 1, 1, 0, 0, 0, 1])
    assert worst_group(right, labels, groups) == pytest.approx(1 / 3)


def test_images_without_a_background_class_are_in_no_group():
    right = torch.tensor([1.0, 0.0, 1.0])
    assert worst_group(right, torch.tensor([0, 0, 1]), torch.tensor([2, -1, 2])) == 1
    assert math.isnan(worst_group(right, torch.tensor([0, 0, 1]), torch.full((3,), -1)))
    with pytest.raises(ValueError, match="got 3, 3 and 2 values"):
        worst_group(right, torch.zeros(3), torch.zeros(2))


# ------------------------------------------------------------------------------------ deletion and insertion


class Soft(nn.Module):
    """A small network with a softmax that is neither flat nor saturated."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3))) * 10


@pytest.fixture
def soft():
    torch.manual_seed(3)
    return Soft().double().eval()


@pytest.fixture
def scene():
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(4, 3, 7, 6, generator=generator, dtype=torch.float64) * 2 - 1
    maps = torch.rand(4, 7, 6, generator=generator, dtype=torch.float64)
    maps[1] = (maps[1] * 3).round()
    maps[2] = 1.0
    return x, maps


def area_by_loops(model, start, end, image, heat, target, steps):
    """One pixel after the other, in pure Python."""
    pixels = sorted(((i, j) for i in range(heat.shape[0]) for j in range(heat.shape[1])), key=lambda p: -heat[p].item())
    curve = []
    for step in range(steps + 1):
        mixed = start.clone()
        for i, j in pixels[: round(step * len(pixels) / steps)]:
            mixed[:, i, j] = end[:, i, j]
        curve.append(model(mixed[None]).softmax(1)[0, target].item())
    return np.trapezoid(curve, dx=1 / steps)


@pytest.mark.parametrize("steps", [32, 1, 2, 50])
def test_deletion_and_insertion_pixel_by_pixel(soft, scene, steps):
    x, maps = scene
    predicted = soft(x).argmax(1)
    start = blurred(x)
    deleted, inserted = deletion(soft, x, maps, steps=steps), insertion(soft, x, maps, steps=steps)
    for n in range(4):
        expected = area_by_loops(soft, x[n], torch.zeros_like(x[n]), x[n], maps[n], predicted[n], steps)
        assert deleted[n].item() == pytest.approx(expected, abs=1e-9)
        expected = area_by_loops(soft, start[n], x[n], x[n], maps[n], predicted[n], steps)
        assert inserted[n].item() == pytest.approx(expected, abs=1e-9)
    assert deleted.std() > 1e-3 and inserted.std() > 1e-3


def test_a_given_target_is_followed_instead_of_the_predicted_class(soft, scene):
    x, maps = scene
    areas = torch.stack([deletion(soft, x, maps, torch.full((4,), k)) for k in range(4)])
    torch.testing.assert_close(areas.sum(0), torch.ones(4, dtype=torch.float64))
    predicted = soft(x).argmax(1)
    torch.testing.assert_close(areas.gather(0, predicted[None])[0], deletion(soft, x, maps))


def test_a_map_of_what_counts_is_deleted_fast_and_inserted_fast():
    class OnePixel(nn.Module):
        def forward(self, x):
            return torch.stack([20 * x[:, 0, 4, 4] - 10, torch.zeros(len(x))], 1)

    x = torch.zeros(2, 3, 8, 8)
    x[:, 0, 4, 4] = 1
    maps = torch.full((2, 8, 8), 0.1)
    maps[0, 4, 4], maps[1, 4, 4] = 1, 0.01
    deleted, inserted = deletion(OnePixel(), x, maps), insertion(OnePixel(), x, maps)
    assert deleted[0] < 0.02 and deleted[1] > 0.98
    assert inserted[0] > 0.98 and inserted[1] < 0.02


@pytest.mark.parametrize("batch", [1, 2, 31, 40, 70])
def test_areas_do_not_depend_on_the_size_of_the_batch(soft, scene, batch):
    x, maps = scene
    torch.testing.assert_close(deletion(soft, x, maps, batch=batch), deletion(soft, x, maps))
    torch.testing.assert_close(insertion(soft, x, maps, batch=batch), insertion(soft, x, maps))
    torch.testing.assert_close(insertion(soft, x[2:], maps[2:]), insertion(soft, x, maps)[2:])


def test_several_methods_at_once_are_the_single_ones(soft, scene):
    x, maps = scene
    done = []
    both = measure_perturbation(soft, x, {"a": maps, "b": maps.flip(1)}, progress=done.append)
    assert sum(done) == 2 * 4 * 2
    for method, values in {"a": maps, "b": maps.flip(1)}.items():
        assert tuple(both[method]) == ("deletion", "insertion")
        torch.testing.assert_close(both[method]["deletion"], deletion(soft, x, values))
        torch.testing.assert_close(both[method]["insertion"], insertion(soft, x, values))


def test_a_map_that_is_not_finite_has_no_area(soft, scene):
    x, maps = scene
    expected = deletion(soft, x, maps)
    maps[0], maps[3, 0, 0] = math.inf, math.nan
    for function in (deletion, insertion):
        assert function(soft, x, maps).isnan().tolist() == [True, False, False, True]
    torch.testing.assert_close(deletion(soft, x, maps)[1:3], expected[1:3])


def test_a_map_that_is_zero_everywhere_goes_in_reading_order_as_any_flat_one(soft, scene):
    x, _ = scene
    falling = torch.arange(42.0, 0, -1).view(1, 7, 6).expand(4, 7, 6)
    for function in (deletion, insertion):
        expected = function(soft, x, falling)
        assert expected.isfinite().all() and expected.std() > 1e-4
        for value in (0.0, 0.3):
            assert torch.equal(function(soft, x, torch.full((4, 7, 6), value)), expected)


def test_the_network_is_used_in_eval_mode_and_restored(soft, scene):
    x, maps = scene
    model = nn.Sequential(nn.Dropout2d(0.5), soft)
    expected = deletion(soft, x, maps)
    torch.testing.assert_close(deletion(model.train(), x, maps), expected)
    assert model.training and model[0].training and all(p.grad is None for p in model.parameters())


def test_float16_maps_and_float32_images_work(soft, scene):
    x, maps = scene
    half = maps.half()
    torch.testing.assert_close(
        deletion(soft.float(), x.float(), half), deletion(soft.double(), x, half.double()), rtol=1e-4, atol=1e-5
    )


def test_images_of_one_pixel_have_areas(soft):
    x = torch.rand(2, 3, 1, 1, dtype=torch.float64)
    start, end = (soft(images).softmax(1).gather(1, soft(x).argmax(1)[:, None])[:, 0] for images in (x, 0 * x))
    # One pixel: replaced in the second half of the curve, after rounding to even at its middle.
    expected = (start + end) / 2 + (start - end) / 64
    torch.testing.assert_close(deletion(soft, x, torch.ones(2, 1, 1)), expected.detach())
    torch.testing.assert_close(insertion(soft, x, torch.ones(2, 1, 1)), start.detach())


def test_no_images_have_no_areas(soft, scene):
    x, maps = scene
    assert deletion(soft, x[:0], maps[:0]).shape == (0,)


def test_a_network_that_reshapes_with_view_is_measured(scene):
    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.head = nn.Linear(4 * 5 * 4, 3)

        def forward(self, x):
            return self.head(self.conv(x).view(len(x), -1))

    x, maps = scene
    model = Viewing().double()
    expected = area_by_loops(model, x[0], torch.zeros_like(x[0]), x[0], maps[0], model(x[:1]).argmax(1)[0], 32)
    assert deletion(model, x, maps)[0].item() == pytest.approx(expected, abs=1e-9)


def test_bad_arguments_of_the_areas_are_named(soft, scene):
    x, maps = scene
    for arguments, message in [
        ((x, maps[:3]), r"got maps \[3, 7, 6\] for x \[4, 3, 7, 6\]"),
        ((x, maps - 0.5), "maps must be >= 0"),
        ((x, maps, None, 0), "steps must be at least 1: got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            deletion(soft, *arguments)
    with pytest.raises(ValueError, match="sigma must be > 0: got 0"):
        insertion(soft, x, maps, sigma=0)


# ------------------------------------------------------------------------------------------------------ blur


def test_the_blur_is_scipys_gaussian_filter():
    from scipy.ndimage import gaussian_filter

    x = torch.rand(2, 3, 12, 15, dtype=torch.float64)
    for sigma in (None, 0.7, 2.0, 9.0):
        width = sigma or 12 / 8
        expected = gaussian_filter(x.numpy(), width, mode="nearest", axes=(2, 3), radius=math.ceil(3 * width))
        np.testing.assert_allclose(blurred(x, sigma), expected, rtol=1e-6)


def test_the_blur_keeps_a_flat_image_and_hides_fine_detail():
    flat = torch.full((1, 3, 16, 16), 0.3)
    torch.testing.assert_close(blurred(flat), flat)
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    assert blurred(board.expand(1, 3, 16, 16))[..., 4:-4, 4:-4].abs().max() < 0.01
