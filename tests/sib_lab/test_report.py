import csv
import json
import math
import re
from io import StringIO

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from sib_lab.experiments.plan import AS_IT_IS
from sib_lab.explaining.statistics import paired_difference_of_shares
from sib_lab.reporting import page as report
from sib_lab.reporting import results
from sib_lab.reporting.classes import mistakes
from sib_lab.reporting.pictures import COLOURS, colours, map_tile, outline
from sib_lab.training.config import METHODS

EXPLANATIONS = {"gradcam": "Grad-CAM", "integrated_gradients": "Integrated Gradients", "vjp": "VJP"}
SIX = ["gradcam", "integrated_gradients"]


def stored_comparison(folder, methods=("ce", "sib"), seeds=(0, 1, 2), masks=True, images=40, explanations=EXPLANATIONS):
    """Writes into ``folder`` what ``sib-lab compare`` would have stored, with made-up numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    comparison = {
        "methods": {method: results.NAMES.get(method, method) for method in methods},
        "losses": {method: f"the loss {method}" for method in methods},
        "seeds": list(seeds),
        "explanations": explanations,
        "six": [name for name in explanations if name != "vjp"],
        "data": {
            "name": "digits",
            "classes": [str(label) for label in range(10)],
            "groups": ["brick", "grass", "gravel"],
            "tests": {"uncorrelated": images, "matched": images},
            "explained": "uncorrelated",
            "images": images,
            "unannotated": 0,
            "skipped": [],
        },
        "config": {"network": "small_cnn", "epochs": 4, "batch_size": 32},
        "versions": {"python": "3.12", "torch": "2.11.0"},
        "machine": {"processor": "made up", "threads": 2},
        "git_commit": None,
    }
    (folder / results.COMPARISON).write_text(json.dumps(comparison))
    for place, method in enumerate(methods):
        for seed in seeds:
            measured = folder / results.RUNS / results.run_name(method, seed) / results.MEASURED
            measured.mkdir(parents=True)
            values = {
                f"accuracy/{name}": (rng.random(images) < level - 0.05 * place).tolist()
                for name, level in (("uncorrelated", 0.75), ("matched", 0.97))
            }
            labels = (np.arange(images) % 10).tolist()
            right = values["accuracy/uncorrelated"]
            told = {
                "labels": labels,
                "predicted": [k if hit else (k + 1) % 10 for k, hit in zip(labels, right, strict=True)],
            }
            matched = {"accuracy/matched": values.pop("accuracy/matched")}
            store(measured / "accuracy-matched.json", matched, classes=told)
            worst = {"worst_group/uncorrelated": [max(0.5 - 0.04 * place, 0)]}
            store(measured / "accuracy-uncorrelated.json", values | worst, classes=told)
            for number, explanation in enumerate(explanations):
                if not masks:
                    values = {"deletion": rng.random(images) / 2}
                else:
                    values = {
                        "epg": np.clip(
                            0.2 + 0.05 * number + (0.1 - 0.03 * number) * place + rng.normal(0, 0.08, images), 0, 1
                        ),
                        "pointing_game": rng.random(images) < 0.5 + 0.1 * place,
                        "iou": np.clip(rng.normal(0.3, 0.05, images), 0, 1),
                        "deletion": rng.random(images) / 2,
                    }
                    values["epg"][: 2 * number] = math.nan
                values["empty"] = np.arange(images) < number * place  # one of S-IB's Integrated Gradients, two VJPs
                of = {f"{m}/{explanation}": [None if np.isnan(v) else float(v) for v in values[m]] for m in values}
                store(measured / f"{explanation}.json", of)
            curve = {
                "Cross-entropy in training": [2 / (1 + e) + 0.1 * place for e in range(4)],
                "Validation accuracy, matched": [0.5 + 0.1 * e for e in range(4)],
            }
            run = {"chance": 0.1 if masks else None, "epochs": 4, "curves": curve, "labels": labels}
            (measured / "training.json").write_text(
                json.dumps(
                    {"run": run, "key": {"weights": "w"}, "values": {"seconds_per_step": [0.03 * (1 + 2 * place)]}}
                )
            )
        maps = rng.random((2, 20, 20)) ** 4
        np.savez(
            folder / results.RUNS / results.run_name(method, seeds[0]) / results.MEASURED / report.MAPS,
            predicted=[3, 4],
            probability=[0.9, 0.512],
            **{explanation: maps for explanation in explanations},
            **{f"epg_{explanation}": [0.25, math.nan] for explanation in explanations},
        )
    square = np.zeros((2, 40, 40))
    square[:, 10:20, 10:25] = masks
    np.savez(
        folder / report.IMAGES,
        images=rng.random((2, 3, 40, 40)).astype(np.float32) * 2 - 1,
        masks=square,
        labels=[3, 5],
        groups=[1, -1],
        annotated=[masks, masks],
    )
    return folder


def store(path, values, **more):
    path.write_text(json.dumps({"values": values, "key": {"weights": "w"}} | more))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A comparison with its report: folder and results."""
    folder = stored_comparison(tmp_path_factory.mktemp("report") / "of two")
    found = results.collect(folder)
    results.write(found, folder)
    report.write(found, folder)
    return folder, found


@pytest.mark.parametrize("how", ["cut short", "empty", "another type", "other keys", "no numbers"])
@pytest.mark.parametrize(
    "name",
    ["comparison.json", "runs/ce-seed0/measured/accuracy-uncorrelated.json", "runs/sib-seed1/measured/training.json"],
)
def test_a_damaged_file_is_named_in_one_sentence(name, how, tmp_path):
    folder = stored_comparison(tmp_path / "x")
    path = folder / name
    text = path.read_text()
    path.write_text(
        {
            "cut short": text[: len(text) // 2],
            "empty": "",
            "another type": "[1, 2]",
            "other keys": '{"a": {}}',
            "no numbers": '{"values": {"accuracy/uncorrelated": ["x"]}, "run": 3, "methods": 3}',
        }[how]
    )
    with pytest.raises(results.ReportError, match=re.escape(f"{path} is damaged or of another version")):
        results.collect(folder)


@pytest.mark.parametrize("name", ["images.npz", "runs/ce-seed0/measured/gallery.npz"])
@pytest.mark.parametrize("size", [0, 20, 900, -30], ids=["empty", "head", "middle", "end"])
def test_a_gallery_that_is_cut_short_is_named_in_one_sentence(name, size, tmp_path):
    folder = stored_comparison(tmp_path / "x")
    path = folder / name
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(results.ReportError, match=re.escape(f"{path} is damaged or of another version")):
        report.write(results.collect(folder), folder)


def test_a_gallery_of_other_images_is_a_sentence(tmp_path):
    folder = stored_comparison(tmp_path / "x")
    np.savez(folder / report.IMAGES, images=np.zeros((2, 5)), masks=np.zeros(3), annotated=np.ones(2, bool))
    with pytest.raises(results.ReportError, match="damaged or of another version"):
        report.write(results.collect(folder), folder)


def test_class_by_class_accuracy_confusion_and_epg_are_counted_from_the_stored_images(written):
    folder, found = written
    of = found["classes"]
    told = [
        (k, p)
        for seed in (0, 1, 2)
        for k, p in zip(
            *json.loads((folder / f"runs/sib-seed{seed}/measured/accuracy-uncorrelated.json").read_text())[
                "classes"
            ].values(),
            strict=True,
        )
    ]
    for label, of_class in enumerate(of["rows"]):
        predicted = [p for k, p in told if k == label]
        assert of_class["images"] == 4 and of_class["name"] == str(label)
        assert of_class["accuracy"]["sib"] == pytest.approx(predicted.count(label) / len(predicted))
        assert of["confusion"]["sib"][label] == [predicted.count(other) for other in range(10)]
    values = []
    for seed in (0, 1, 2):
        of_run = [
            json.loads((folder / f"runs/sib-seed{seed}/measured/{e}.json").read_text())["values"][f"epg/{e}"]
            for e in EXPLANATIONS
            if e != "vjp"
        ]
        of_seven = [np.mean(pair) for pair in zip(*((v[7::10]) for v in of_run), strict=True)]
        values.append(np.mean(of_seven))
    assert of["rows"][7]["epg"]["sib"] == pytest.approx(np.mean(values))
    html = (folder / results.REPORT).read_text()
    assert "Class by class" in html and "taken for" in html


def test_the_most_frequent_mistakes_come_first():
    matrix = [[5, 3, 0], [1, 7, 0], [0, 4, 0]]
    assert mistakes(matrix, ["a", "b", "c"], most=2) == [("c", "b", 4, 1.0), ("a", "b", 3, 3 / 8)]
    assert mistakes([[2, 0], [0, 0]], ["a", "b"], most=5) == []


@pytest.mark.parametrize("told", [{}, {"labels": [1]}, {"labels": [1], "predicted": []}, {"labels": 3, "predicted": 3}])
def test_other_predictions_are_named_by_their_file(told, tmp_path):
    folder = stored_comparison(tmp_path / "x")
    path = folder / "runs/ce-seed1/measured/accuracy-uncorrelated.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"classes": told}))
    with pytest.raises(results.ReportError, match=re.escape(f"{path} is damaged or of another version")):
        results.collect(folder)


def changed_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["gradcam", "accuracy-uncorrelated", "accuracy-matched"])
def test_values_of_other_images_are_named_by_their_file(name, tmp_path):
    folder = stored_comparison(tmp_path / "x")
    path = folder / f"runs/sib-seed1/measured/{name}.json"

    def shorten(content):
        next(iter(content["values"].values())).pop()

    changed_json(path, shorten)
    with pytest.raises(results.ReportError, match=re.escape(f"{path} is damaged or of another version")):
        results.collect(folder)


def test_a_part_that_was_measured_on_another_network_is_named(tmp_path):
    folder = stored_comparison(tmp_path / "x")
    path = folder / "runs/sib-seed1/measured/vjp.json"
    changed_json(path, lambda content: content["key"].update(weights="others"))
    with pytest.raises(results.ReportError, match=re.escape(f"{path} is damaged or of another version")):
        results.collect(folder)


@pytest.mark.parametrize(
    ("name", "where", "wrong", "why"),
    [
        ("accuracy-uncorrelated", ("values", "accuracy/uncorrelated", 3), 1.7, "1.7 where only numbers from 0 to 1"),
        ("accuracy-uncorrelated", ("values", "accuracy/uncorrelated", 3), None, "no number where only numbers from 0"),
        ("accuracy-uncorrelated", ("values", "worst_group/uncorrelated", 0), -0.1, "-0.1 where"),
        ("accuracy-matched", ("values", "accuracy/matched", 0), 2, "2 where"),
        ("accuracy-uncorrelated", ("classes", "predicted", 0), 99, "99 where only whole numbers from 0 to 9"),
        ("accuracy-uncorrelated", ("classes", "labels", 0), 1.7, "1.7 where only whole numbers"),
        ("accuracy-matched", ("classes", "predicted", 0), -1, "-1 where only whole numbers"),
        ("gradcam", ("values", "epg/gradcam", 5), -3, "-3 where"),
        ("vjp", ("values", "iou/vjp", 39), 5, "5 where"),
        ("vjp", ("values", "deletion/vjp", 0), 1.01, "1.01 where"),
        ("vjp", ("values", "iou_threshold/vjp"), [40.0] * 40, "40 where"),
        ("vjp", ("values", "empty/vjp", 0), math.inf, ""),
        ("vjp", ("values", "epg/vjp", 10), math.nan, ""),
        ("vjp", ("values", "epg/vjp", 10), 10**400, ""),
        ("training", ("values", "seconds_per_step", 0), -0.1, "of at least 0"),
        ("training", ("values", "seconds_per_step", 0), None, "of at least 0"),
        ("training", ("run", "chance"), 1.2, "1.2 where"),
        ("training", ("run", "labels", 0), 10, "10 where"),
        ("training", ("run", "curves", "Cross-entropy in training", 0), -1, "-1 where only numbers of at least 0"),
        ("training", ("run", "curves", "Validation accuracy, matched", 0), 1.5, "1.5 where only numbers from 0 to 1"),
        ("training", ("run", "curves", "Validation accuracy, matched", 0), None, "no number where"),
    ],
)
def test_numbers_that_cannot_be_are_named_with_their_file(name, where, wrong, why, tmp_path):
    folder = stored_comparison(tmp_path / "x")
    path = folder / f"runs/sib-seed0/measured/{name}.json"

    def spoil(content):
        for key in where[:-1]:
            content = content[key]
        content[where[-1]] = wrong

    changed_json(path, spoil)
    with pytest.raises(results.ReportError, match=re.escape(f"{path} is damaged or of another version")) as caught:
        results.collect(folder)
    assert why in str(caught.value)


@pytest.mark.parametrize(
    ("name", "array", "wrong"),
    [
        ("images.npz", "labels", 99),
        ("images.npz", "labels", -1),
        ("images.npz", "groups", 3),
        ("images.npz", "masks", 255),
        ("images.npz", "images", math.nan),
        ("images.npz", "images", 200),
        ("runs/sib-seed0/measured/gallery.npz", "predicted", 99),
        ("runs/sib-seed0/measured/gallery.npz", "predicted", -1),
        ("runs/sib-seed0/measured/gallery.npz", "probability", 1.2),
        ("runs/sib-seed0/measured/gallery.npz", "epg_vjp", -3),
        ("runs/sib-seed0/measured/gallery.npz", "epg_vjp", math.inf),
        ("runs/sib-seed0/measured/gallery.npz", "vjp", -1),
        ("runs/sib-seed0/measured/gallery.npz", "gradcam", None),
        ("runs/sib-seed0/measured/gallery.npz", "predicted", None),
    ],
)
def test_a_gallery_of_what_cannot_be_is_named_with_its_file(name, array, wrong, tmp_path):
    folder = stored_comparison(tmp_path / "x")
    path = folder / name
    arrays = report.arrays(path)
    if wrong is None:
        arrays[array] = arrays[array][:1]
    else:
        arrays[array].reshape(-1)[-1] = wrong
    np.savez(path, **arrays)
    with pytest.raises(results.ReportError, match=re.escape(f"{path} is damaged or of another version")):
        report.write(results.collect(folder), folder)
    assert not (folder / results.REPORT).exists()


def test_names_are_text_and_no_markup(tmp_path):
    """Neither rich nor matplotlib nor a browser finds anything in them."""
    folder = stored_comparison(tmp_path / "x [red]")
    path = folder / results.COMPARISON
    names = ["[bold red]cat[/]", "$\\frac{1}$ dog", "<script>alert(1)</script>", "a[/b]c", "$"]
    comparison = json.loads(path.read_text())
    comparison["data"]["classes"][:5] = names
    comparison["methods"] = {"ce": "[bold]CE[/bold]", "sib": "S-IB $x_$"}
    path.write_text(json.dumps(comparison))
    found = results.collect(folder)
    text = printed(found)
    assert "[bold]CE[/bold]" in text and "S-IB $x_$" in text
    report.write(found, folder)
    assert "<script>" not in (folder / results.REPORT).read_text()


def row(found, key):
    return next(row for row in found["rows"] if row["key"] == key)


def printed(found, width=120):
    console = Console(file=StringIO(), width=width)
    for table in results.tables(found, width):
        console.print(table)
    return console.file.getvalue()


def hand_made(folder, values, interval="seeds"):
    """A comparison with one measure: method -> seed -> values of the images."""
    seeds = sorted({seed for of_method in values.values() for seed in of_method})
    stored_comparison(folder, tuple(values), tuple(seeds), explanations={})
    for method, of_method in values.items():
        for seed in seeds:
            measured = folder / results.RUNS / results.run_name(method, seed) / results.MEASURED
            for path in measured.glob("*.json"):
                if path.name != "training.json":
                    path.unlink()
            if seed in of_method:
                values_of_seed = {"accuracy/uncorrelated": of_method[seed]}
                told = {"labels": [0] * len(of_method[seed]), "predicted": [0] * len(of_method[seed])}
                store(measured / "accuracy-uncorrelated.json", values_of_seed, classes=told)
            else:
                (measured / "training.json").unlink()
    return results.collect(folder)


# -------------------------------------------------------------------------------------------------- statistics


def test_over_seeds_the_mean_is_of_seed_means_with_student_s_t_and_differences_pair_equal_seeds(tmp_path):
    ce = {0: [0.0, 0.5], 1: [0.5, 0.5], 2: [0.0, 0.0]}  # means 0.25, 0.5, 0
    sib = {2: [0.25, 0.25], 0: [0.25, 0.75], 1: [0.5, 1.0]}  # means 0.5, 0.75, 0.25: always 0.25 more
    found = row(hand_made(tmp_path, {"ce": ce, "sib": sib}), "accuracy/uncorrelated")
    t = 4.302652729911275  # 97.5 % quantile for 2 degrees of freedom, from a table
    assert found["values"]["ce"]["mean"] == pytest.approx(0.25)
    assert found["values"]["ce"]["half_width"] == pytest.approx(t * 0.25 / math.sqrt(3))
    assert found["differences"]["sib"]["mean"] == pytest.approx(0.25)
    assert found["differences"]["sib"]["half_width"] == pytest.approx(0, abs=1e-12)
    assert found["differences"]["sib"]["excludes_zero"] is True


def test_with_one_seed_the_interval_is_over_images_and_differences_pair_equal_images(tmp_path):
    ce, sib = [0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0]
    found = row(hand_made(tmp_path, {"ce": {7: ce}, "sib": {7: sib}}), "accuracy/uncorrelated")
    assert found["values"]["ce"]["mean"] == 0.5 and found["values"]["ce"]["count"] == 4
    assert (found["values"]["ce"]["low"], found["values"]["ce"]["high"]) == pytest.approx((0.150, 0.850), abs=1e-3)
    assert found["differences"]["sib"]["mean"] == 0.25
    assert found["differences"]["sib"]["excludes_zero"] is False
    change = paired_difference_of_shares(ce, sib)
    assert found["differences"]["sib"]["low"] == change.low and found["differences"]["sib"]["high"] == change.high


def test_a_network_that_has_learned_nothing_is_said_to_be_at_chance(tmp_path):
    folder = stored_comparison(tmp_path / "c", seeds=(0, 1))
    assert results.chance_note(results.collect(folder)) == ""  # all are right in more than half of the images
    for seed, hits in ((0, 4), (1, 6)):
        path = folder / f"runs/sib-seed{seed}/measured/accuracy-uncorrelated.json"
        stored = json.loads(path.read_text())
        stored["values"]["accuracy/uncorrelated"] = [1.0] * hits + [0.0] * (40 - hits)
        path.write_text(json.dumps(stored))
    found = results.collect(folder)  # 10 of 80, and 1 of 10 by chance
    assert results.chance_note(found).startswith("Not beyond chance, 1 of 10 classes, is the accuracy of S-IB: ")
    assert results.chance_note(found) in report.page(found, [])
    assert results.chance_note(found) in str(results.tables(found)[-1].caption)


def test_an_interval_that_is_not_even_is_shown_by_its_ends():
    even = {"mean": 0.5, "half_width": 0.1, "low": 0.4, "high": 0.6}
    uneven = {"mean": 0.75, "half_width": 0.327, "low": 0.301, "high": 0.954}
    assert results.number(even) == "0.500 ± 0.100" and results.number(uneven) == "0.750 (0.301 to 0.954)"
    assert results.difference(even | {"mean": 0.5}) == "+0.500 ± 0.100"
    minus = {"mean": -0.5, "half_width": 0.3, "low": -0.6, "high": 0.0}
    assert results.difference(minus) == "\N{MINUS SIGN}0.500 (\N{MINUS SIGN}0.600 to +0.000)"
    assert results.number(even | dict.fromkeys(("half_width", "low", "high"))) == "0.500"


def test_undefined_images_are_counted_and_left_out(tmp_path):
    folder = stored_comparison(tmp_path / "x", seeds=(0,), images=3, explanations={"vjp": "VJP"})
    for method, values in {"ce": [0.2, None, 0.4], "sib": [None, None, None]}.items():
        store(folder / f"runs/{method}-seed0/measured/vjp.json", {"epg/vjp": values})
    found = results.collect(folder)
    values = row(found, "epg/vjp")["values"]
    assert values["ce"]["mean"] == pytest.approx(0.3) and values["ce"]["undefined"] == 1
    assert values["sib"]["mean"] is None and values["sib"]["undefined"] == 3
    assert "0.300" in printed(found) and "†" in printed(found) and "undefined" in printed(found)


def test_empty_maps_are_a_measured_number_in_every_output(written):
    folder, found = written
    empty = row(found, "empty/integrated_gradients")
    assert empty["values"]["ce"]["mean"] == 0 and empty["values"]["sib"]["mean"] == pytest.approx(1 / 40)
    for run in found["runs"]:
        counts = [run["numbers"][f"empty/{name}"] for name in EXPLANATIONS]
        expected = [0, 1, 2] if run["method"] == "sib" else [0, 0, 0]
        assert [round(number["mean"] * number["count"]) for number in counts] == expected
    lines = csv.DictReader((folder / results.METRICS).read_text().splitlines())
    means = [float(line["mean"]) for line in lines if line["method"] == "sib" and line["measure"].startswith("empty/")]
    assert means == pytest.approx([0, 1 / 40, 2 / 40])
    assert re.search(r"Empty maps\W+\n\W+Grad-CAM +│ +0.000 ± 0.000", printed(found))
    html = (folder / results.REPORT).read_text()
    assert "Empty maps <span>(lower is better)</span></summary>" in html
    assert "Maps that are zero everywhere: 0 of 360 with Cross-entropy, 9 of 360 with S-IB." in html


def test_maps_that_are_not_finite_are_counted_apart_from_empty_ones(tmp_path):
    stored_comparison(tmp_path, ("ce",), (0,), images=4)
    measured = tmp_path / results.RUNS / "ce-seed0" / results.MEASURED
    store(measured / "gradcam.json", {"epg/gradcam": [0.5, 0, None, 0.1], "empty/gradcam": [0, 1, None, 0]})
    found = results.collect(tmp_path)
    values = row(found, "empty/gradcam")["values"]["ce"]
    assert values["mean"] == pytest.approx(1 / 3) and values["undefined"] == 1
    values = row(found, "epg/gradcam")["values"]["ce"]
    assert values["mean"] == pytest.approx(0.2) and values["undefined"] == 1
    # of 12 maps one is not finite, which is no map
    assert report.empty_sentence(found) == "Maps that are zero everywhere: 1 of 11 with Cross-entropy."


def test_a_gallery_map_that_is_zero_everywhere_is_said_to_be():
    zero, some = np.zeros((4, 4)), np.eye(4)
    texts = [report.one_map(values, None, epg)["text"] for values, epg in ((zero, 0.0), (some, 0.25), (some, math.nan))]
    assert texts == ["all zero", "0.25", ""]


def test_a_seed_that_one_method_has_not_finished_is_named_and_left_out_of_its_pairs(tmp_path):
    found = hand_made(tmp_path, {"ce": {0: [0.0], 1: [1.0], 2: [1.0]}, "sib": {0: [0.5], 1: [1.0]}})
    values = row(found, "accuracy/uncorrelated")
    assert found["missing"] == ["sib-seed2"]
    assert values["differences"]["sib"]["count"] == 2 and values["differences"]["sib"]["mean"] == pytest.approx(0.25)
    report.write(found, tmp_path)
    assert "Not finished: sib-seed2" in (tmp_path / results.REPORT).read_text()


def test_the_mean_of_the_six_leaves_the_vjp_out(written):
    run = written[1]["runs"][0]["numbers"]
    stored = results.stored_values(written[0] / results.RUNS / "ce-seed0", classes=10)
    six = [np.array([np.nan if v is None else v for v in stored[f"epg/{name}"]]) for name in SIX]
    both = sum(six) / 2
    assert run["epg/mean"]["mean"] == pytest.approx(np.nanmean(both), abs=1e-12)
    assert run["epg/mean"]["undefined"] == np.isnan(both).sum()


# ------------------------------------------------------------------------------------------------- what is written


def test_the_table_shows_every_number_and_marks_the_differences_that_exclude_zero(written):
    text = printed(written[1])
    for of_row in written[1]["rows"]:
        for value in of_row["values"].values():
            assert f"{value['mean']:.3f} ± {value['half_width']:.3f}" in text
        for change in of_row["differences"].values():
            shown = f"{change['mean']:+.3f} ± {change['half_width']:.3f}".replace("-", "\N{MINUS SIGN}")
            assert (f"{shown}*" if change["excludes_zero"] else f"{shown} ") in text
    assert "over 3 seeds" in text and "EPG (chance 0.100)" in text


def test_a_narrow_terminal_gets_several_tables_with_the_same_numbers(written):
    wide, narrow = printed(written[1]), printed(written[1], width=80)
    assert narrow.count("Accuracy, matched") > wide.count("Accuracy, matched") == 1
    assert max(map(len, narrow.splitlines())) <= 80
    assert set(re.findall(r"\d\.\d{3} ± \d\.\d{3}", narrow)) == set(re.findall(r"\d\.\d{3} ± \d\.\d{3}", wide))


def test_metrics_csv_has_a_line_a_method_and_measure_without_times(written):
    lines = (written[0] / results.METRICS).read_text().splitlines()
    assert lines[0] == ",".join(results.COLUMNS)
    assert len(lines) == 1 + 2 * (len(written[1]["rows"]) - 1) and not any("seconds" in line for line in lines)


def test_results_json_holds_every_number_of_every_seed(written):
    stored = json.loads((written[0] / results.RESULTS).read_text())
    assert stored == json.loads(json.dumps(written[1]))
    assert [run["name"] for run in stored["runs"]] == [f"{m}-seed{s}" for m in ("ce", "sib") for s in (0, 1, 2)]
    assert all(f"iou/{name}" in run["numbers"] for run in stored["runs"] for name in EXPLANATIONS)


def test_the_report_is_one_file_that_loads_nothing_from_elsewhere(written):
    html = (written[0] / results.REPORT).read_text()
    sources = re.findall(r'src="([^"]{0,30})', html)
    # two images: input, mask and three maps of two networks each; two confusions; the scatter; two curves
    assert len(sources) == 2 * (2 + 2 * 3) + 2 + 1 + 2
    assert all(re.match(r"data:image/(png|jpeg|svg\+xml);base64,", source) for source in sources)
    assert "<link" not in html and "<script" not in html and "url(" not in html and "http" not in html


def test_the_report_says_in_words_what_the_numbers_say(written):
    html = (written[0] / results.REPORT).read_text()
    found = written[1]
    verdicts = report.sorted_by_verdict(found, report.measure_rows(found, "epg"), "sib")
    for of_row in report.measure_rows(found, "epg"):
        change, name = of_row["differences"]["sib"], results.row_name(of_row["key"], EXPLANATIONS)
        clear = abs(change["mean"]) > change["half_width"]
        assert name in verdicts[("more" if change["mean"] > 0 else "less") if clear else "unclear"]
    assert report.looks_sentence(found, "sib") in html
    assert "A step with S-IB takes 3.0 times as long as with Cross-entropy." in html
    assert "over 3 seeds" in html


def test_writing_the_report_again_gives_the_same_bytes(written, tmp_path):
    before = (written[0] / results.REPORT).read_bytes()
    report.write(results.collect(written[0]), written[0])
    assert (written[0] / results.REPORT).read_bytes() == before


def test_the_gallery_picture_is_small_enough_to_be_shown(written):
    with Image.open(written[0] / results.GALLERY) as picture:
        picture.verify()
    assert (written[0] / results.GALLERY).stat().st_size < 400_000


def test_a_data_set_without_masks_gets_a_report_without_the_measures_that_need_them(tmp_path):
    found = results.collect(stored_comparison(tmp_path, masks=False))
    report.write(found, tmp_path)
    html = (tmp_path / results.REPORT).read_text()
    assert "no object masks" in html and "Deletion" in html and "Pointing game</summary>" not in html
    assert not any(of_row["key"].startswith("epg") for of_row in found["rows"])


@pytest.mark.parametrize("methods", [("ce",), tuple(results.NAMES)])
def test_one_method_and_seven_methods_have_reports_too(methods, tmp_path):
    found = results.collect(stored_comparison(tmp_path, methods))
    report.write(found, tmp_path)
    html = (tmp_path / results.REPORT).read_text()
    assert all(results.NAMES[method] in html for method in methods)
    printed(found)


def test_names_from_a_user_s_folders_are_escaped(tmp_path):
    stored_comparison(tmp_path)
    comparison = json.loads((tmp_path / results.COMPARISON).read_text())
    comparison["data"]["classes"][3] = "<script>alert(1)</script>"
    (tmp_path / results.COMPARISON).write_text(json.dumps(comparison))
    report.write(results.collect(tmp_path), tmp_path)
    assert "<script" not in (tmp_path / results.REPORT).read_text()


def test_a_folder_without_results_is_one_sentence(tmp_path):
    with pytest.raises(results.ReportError, match=r"There is no comparison in .*: comparison.json is missing\."):
        results.collect(tmp_path)
    (tmp_path / results.COMPARISON).write_text("{")
    with pytest.raises(results.ReportError, match="is damaged or of another version"):
        results.collect(tmp_path)


# --------------------------------------------------------------------------------------------------- pictures


#: Method "sib" with other options.
OF_PARTS = {"sib-features", "sib-background", "sib-foreground", "sib-few", "sib-one", "sib-alone", "sib-none"}


def test_every_training_method_has_a_colour_of_its_own_that_stays():
    assert [name for name in results.NAMES if name not in OF_PARTS] == [*METHODS, AS_IT_IS]
    assert set(COLOURS) == set(results.NAMES) and len(set(COLOURS.values())) == len(COLOURS)
    assert colours(["rrr", "ce"]) == {"rrr": COLOURS["rrr"], "ce": COLOURS["ce"]}
    assert len(set(colours(["ce", "mine", "yours"]).values())) == 3


def test_the_outline_is_the_object_s_own_edge():
    inside = np.zeros((5, 6), dtype=bool)
    inside[1:4, 2:6] = True
    expected = inside.copy()
    expected[2, 3:5] = False  # surrounded on all four sides; the picture's edge counts as outside
    assert (outline(inside) == expected).all()


def test_a_map_s_tile_has_its_maximum_brightest_and_the_outline_in_white():
    import base64
    import io

    values, mask = np.zeros((20, 20)), np.zeros((40, 40))
    values[3, 4] = 2.0
    mask[20:32, 20:32] = 1
    with Image.open(io.BytesIO(base64.b64decode(map_tile(values, mask).partition(",")[2]))) as picture:
        shown = np.asarray(picture.convert("RGB")).astype(int)
    assert shown.shape == (160, 160, 3)  # 20 px enlarged eight times
    assert shown[3 * 8 + 4, 4 * 8 + 4].sum() > 600 and shown[5, 5].sum() < 20
    assert (shown[80, 80:128] == 255).all() and shown[100, 100].sum() < 20  # row 10 of 20: the object's upper edge
