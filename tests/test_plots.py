"""Figures show the numbers that they are given: as many marks, right colours, right places; nothing is
saved.
"""

import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

from helpers import plots
from helpers.explain import coloured_words

TOKENS = ["not", "a", "bad", "film"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Draw in an empty folder with nothing left open, and find it empty afterwards."""
    monkeypatch.chdir(tmp_path)
    with plt.rc_context():
        yield
    plt.close("all")
    assert not list(tmp_path.iterdir())


def boxes(axis):
    return [patch for patch in axis.patches if isinstance(patch, Rectangle)]


def colors(values):
    """The colours that one row of tokens gets."""
    _, axes = plots.token_strips([("film", TOKENS[: len(values)], {"method": values})])
    return np.array([box.get_facecolor()[:3] for box in boxes(axes[0])])


# Token strips


def test_each_method_has_a_box_and_a_name_for_each_token():
    methods = {"cls": [0.1, 0.2, 0.3, 0.4], "mutual": [1, -1, 0, 2]}
    figure, axes = plots.token_strips([("first", TOKENS, methods), ("second", TOKENS[:2], {"cls": [1, 2]})])
    assert [len(boxes(axis)) for axis in axes] == [8, 2]
    words = [text.get_text() for text in axes[0].texts]
    assert words == ["first", "cls", *TOKENS, "mutual", *TOKENS]
    assert (
        len(figure.axes) == 3 and "attribution" in figure.axes[2].get_xlabel()
    )  # one colour bar for all sentences


def test_zero_is_white_and_the_sign_decides_between_red_and_blue():
    negative, zero, positive, largest = colors([-0.5, 0.0, 0.5, 1.0])
    assert zero.min() > 0.95
    assert negative[2] > negative[0] + 0.3 and positive[0] > positive[2] + 0.3
    assert largest[0] > largest[2] and largest.sum() < positive.sum()  # darker


def test_words_of_a_page_have_the_colours_of_the_strip_and_are_escaped():
    values = [0.5, -1.0, 0.0]
    said = coloured_words(["<b>", "bad", "a"], values)
    found = re.findall(r"rgb\((\d+),(\d+),(\d+)\); color: (\w+)", said)
    np.testing.assert_allclose([list(map(int, line[:3])) for line in found], colors(values) * 255, atol=1)
    assert [line[3] for line in found] == ["black", "white", "black"]
    assert "&lt;b&gt;" in said and "<b>" not in said
    assert "rgb(247,246,246)" in coloured_words(["none"], [0.0])  # nothing speaks for or against


def test_opposite_values_are_equally_strong_and_the_unit_does_not_matter():
    np.testing.assert_allclose(colors([1, -1]), [plots.plt.get_cmap("RdBu_r")(x)[:3] for x in (1.0, 0.0)])
    np.testing.assert_allclose(colors([0.002, -0.001]), colors([200, -100]))


def test_constant_positive_row_is_one_colour_and_an_all_zero_row_white():
    assert len(np.unique(colors([0.3, 0.3, 0.3]), axis=0)) == 1
    assert colors([0, 0, 0]).min() > 0.95


def test_long_sentences_break_into_lines_without_overlap():
    tokens = [f"token{i}" for i in range(60)]
    _, axes = plots.token_strips([("long", tokens, {"one": np.arange(60), "two": -np.arange(60)})])
    spans = [(box.get_y(), box.get_x(), box.get_x() + box.get_width()) for box in boxes(axes[0])]
    assert len({y for y, _, _ in spans}) > 8
    assert max(right for _, _, right in spans) <= axes[0].get_xlim()[1]
    assert max(spans)[0] + 0.88 <= axes[0].get_ylim()[0]
    for (y, _, right), (next_y, left, _) in zip(spans, spans[1:], strict=False):
        assert right <= left or next_y > y + 0.88


def test_ink_is_legible_on_dark_and_light_boxes():
    _, axes = plots.token_strips([("film", TOKENS, {"method": [1.0, 0.0, -1.0, 0.1]})])
    assert [text.get_color() for text in axes[0].texts[2:]] == ["white", "black", "white", "black"]


def test_methods_stand_by_family_each_with_its_marker_and_a_gap_after_each_family():
    methods = {name: [1.0, 2.0] for name in ("Grad-SAM", "Shapley-Input", "Att (received)", "AttnLRP")}
    figure, axes = plots.token_strips([("film", TOKENS[:2], methods)])
    names = [text.get_text() for text in axes[0].texts if text.get_text() in methods]
    assert names == ["Att (received)", "Grad-SAM", "AttnLRP", "Shapley-Input"]
    tops = [box.get_y() for box in boxes(axes[0])][::2]
    first, second, third = np.diff(tops)
    assert second == pytest.approx(1) and first > 1.2 and third > 1.2
    marks = [part.get_facecolors()[0][:3] for part in axes[0].collections]
    families = [plots.FAMILY[name] for name in names]
    np.testing.assert_allclose(marks, [to_rgba(plots.FAMILY_COLORS[family])[:3] for family in families])
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        plots.FAMILY_WORDS[family] for family in ("attention", "gradient", "input")
    ]


def test_a_price_in_dollars_is_no_formula():
    figure, axes = plots.token_strips([("$5 a {seat$", ["$", "{5_$"], {"cls": [1.0, 2.0]})])
    figure.canvas.draw()  # as formulas these could not be read
    assert [text.get_text() for text in axes[0].texts] == ["$5 a {seat$", "cls", "$", "{5_$"]


# Method strips


@pytest.fixture
def strips():
    """Two sets, three methods of different families, 5 inputs each: (figure, axes, scores, intervals), all
    made up.
    """
    families = {"Shapley-Att-CLS": "attention", "Grad-SAM": "gradient", "Random": "none"}
    rng = np.random.default_rng(0)
    scores = pd.DataFrame(
        [
            {"set": name, "method": method, "family": family, "comp": rng.normal()}
            for name in ("movies", "nyt")
            for method, family in families.items()
            for _ in range(5)
        ]
    )
    grouped = (
        scores.groupby(["set", "method", "family"], sort=False)["comp"].mean().rename("mean").reset_index()
    )
    intervals = grouped.assign(low=grouped["mean"] - 0.1, high=grouped["mean"] + 0.2)
    return *plots.method_strips(scores, intervals, "comp", "comprehensiveness"), scores, intervals


def dots(axis):
    """[(x, y, colour)] of every dot."""
    return [
        (x, y, tuple(collection.get_facecolors()[min(i, len(collection.get_facecolors()) - 1)][:3]))
        for collection in axis.collections
        if isinstance(collection, PathCollection)
        for i, (x, y) in enumerate(collection.get_offsets())
    ]


def test_every_input_is_a_dot_at_its_score_in_its_methods_strip(strips):
    _, axes, scores, _ = strips
    for axis, name in zip(axes, ("movies", "nyt"), strict=True):
        part = scores[scores["set"] == name]
        for place, method in enumerate(part["method"].unique()):
            drawn = sorted(x for x, y, _ in dots(axis) if round(y) == place)
            np.testing.assert_allclose(drawn, sorted(part.loc[part["method"] == method, "comp"]))


def test_dots_have_the_colour_of_their_family(strips):
    _, axes, _, _ = strips
    for place, family in enumerate(("attention", "gradient", "none")):
        found = {color for _, y, color in dots(axes[0]) if round(y) == place}
        assert found == {to_rgba(plots.FAMILY_COLORS[family])[:3]}


def test_a_line_marks_each_mean_and_a_box_its_interval(strips):
    _, axes, _, intervals = strips
    for axis, name in zip(axes, ("movies", "nyt"), strict=True):
        part = intervals[intervals["set"] == name].reset_index()
        marks = [line.get_xydata() for line in axis.lines if line.get_xdata()[0] != 0]
        assert len(marks) == 3
        for place, (mark, row) in enumerate(zip(marks, part.itertuples(), strict=True)):
            np.testing.assert_allclose(mark[:, 0], row.mean)
            assert mark[:, 1].mean() == pytest.approx(place)
        bands = [c.get_paths()[0].vertices for c in axis.collections if not isinstance(c, PathCollection)]
        for place, (band, row) in enumerate(zip(bands, part.itertuples(), strict=True)):
            assert (band[:, 0].min(), band[:, 0].max()) == pytest.approx((row.low, row.high))
            assert (band[:, 1].min() + band[:, 1].max()) / 2 == pytest.approx(place)


def test_panels_name_set_size_method_and_measure(strips):
    figure, axes, _, _ = strips
    assert [axis.get_title() for axis in axes] == ["movies (n = 5)", "nyt (n = 5)"]
    figure.canvas.draw()
    assert [label.get_text() for label in axes[0].get_yticklabels()] == [
        "Shapley-Att-CLS",
        "Grad-SAM",
        "Random",
    ]
    assert figure.get_supxlabel() == "comprehensiveness"
    [legend] = figure.legends
    said = [text.get_text() for text in legend.get_texts()]
    assert said == [
        *(plots.FAMILY_WORDS[f] for f in ("attention", "gradient", "none")),
        "mean",
        "95 % interval",
    ]


def test_method_missing_from_one_set_leaves_its_strip_empty():
    scores = pd.DataFrame(
        {"set": list("aab"), "method": list("xyx"), "family": "input", "comp": [1.0, 2.0, 3.0]}
    )
    intervals = scores.rename(columns={"comp": "mean"}).assign(low=0.0, high=4.0)
    _, axes = plots.method_strips(scores, intervals, "comp")
    assert [round(y) for _, y, _ in dots(axes[0])] == [0, 1] and [round(y) for _, y, _ in dots(axes[1])] == [
        0
    ]


def test_style_is_set_only_on_request():
    before = plt.rcParams["font.size"]
    plt.rcParams["font.size"] = before + 3
    plots.use_style()
    assert plt.rcParams["font.size"] == 8 and plt.rcParams["pdf.fonttype"] == 42


def test_maps_over_an_image_are_the_more_opaque_the_larger_they_are():
    values = np.array([[1.0, -0.5], [0.0, 0.25]])
    rows = [("zebra", np.full((8, 8, 3), 200, dtype=np.uint8), {"map": values})]
    figure, axes = plots.patch_heatmaps(rows, overlay=True)
    grey, heat = axes[0, 1].images
    assert grey.get_array().shape == (8, 8) and grey.get_cmap().name == "gray"
    np.testing.assert_allclose(heat.get_alpha(), 0.85 * np.abs(values))
    alone = plots.patch_heatmaps(rows)[1][0, 1].images
    assert len(alone) == 1 and alone[0].get_alpha() in (None, 1.0)
    plt.close("all")


@pytest.mark.parametrize("lowest, shown", [(0.25, (0, 1)), (-0.25, (-1, 1))])
def test_colour_bar_has_a_negative_half_only_where_a_map_has_one(lowest, shown):
    rows = [("zebra", np.zeros((4, 4, 3), np.uint8), {"Shapley-Att-CLS": np.array([[1.0, lowest]])})]
    figure, axes = plots.patch_heatmaps(rows, width=4, fontsize=9)
    bar = figure.axes[-1]
    assert bar.get_xlim() == shown and bar.xaxis.label.get_fontsize() == 9 and figure.get_figwidth() == 4
    assert axes[0, 1].get_images()[0].get_clim() == (-1, 1)  # white is zero in both
    assert axes[0, 1].get_title() == "Shapley-\nAtt-\nCLS" and axes[0, 1].title.get_fontsize() == 9
    plt.close("all")


# Points of methods


def test_a_method_has_its_familys_marker_at_its_value_filled_bar_and_interval_on_request():
    values = pd.Series({"Random": 0.1, "AttnLRP": 0.4, "Att (received)": 0.2})
    ends = pd.DataFrame({"low": values - 0.05, "high": values + 0.07})
    figure, axis = plt.subplots()
    order = ["AttnLRP", "SHAP (signed)", "Random"]
    plots.method_points(axis, values, ["AttnLRP"], order, bars=True, intervals=ends)
    assert [label.get_text() for label in axis.get_yticklabels()] == order
    assert axis.get_ylim()[0] > axis.get_ylim()[1]  # from the top down
    points = [part for part in axis.collections if isinstance(part, PathCollection)]
    assert [tuple(point.get_offsets()[0]) for point in points] == [(0.4, 0), (0.1, 2)]
    families = [plots.FAMILY_COLORS[family] for family in ("gradient", "none")]
    assert [tuple(point.get_edgecolors()[0]) for point in points] == [to_rgba(name) for name in families]
    assert [tuple(point.get_facecolors()[0]) for point in points] == [to_rgba(families[0]), to_rgba("white")]
    assert len(points[0].get_paths()[0].vertices) == 4 < len(points[1].get_paths()[0].vertices)  # triangle
    assert [bar.get_width() for bar in boxes(axis)] == [0.4, 0.1]
    lines = [part for part in axis.collections if isinstance(part, LineCollection)]
    found = [line.get_segments()[0][:, 0].tolist() for line in lines]
    np.testing.assert_allclose(found, [[0.35, 0.47], [0.05, 0.17]])


@pytest.mark.parametrize("low", [-0.9, -0.3, 0.0])
def test_a_part_of_the_signed_colours_keeps_white_at_zero_and_the_end_where_it_was(low):
    colors, whole = plots.signed_part(low), plt.get_cmap(plots.SIGNED)
    np.testing.assert_allclose(colors(1.0), whole(1.0))
    np.testing.assert_allclose(colors(-low / (1 - low)), whole(0.5), atol=0.02)


def test_the_legend_names_the_families_that_are_there_and_no_other():
    figure, _ = plt.subplots(layout="constrained")
    plots.family_legend(figure, ["Random", "AttnLRP", "a method of mine"])
    [legend] = figure.legends
    assert [text.get_text() for text in legend.texts] == ["uses gradients", "knows nothing of the model"]
