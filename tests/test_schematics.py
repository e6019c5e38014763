"""The schematics show what the helpers compute, in four steps that do not run into each other."""

import matplotlib.pyplot as plt
import pytest
import torch

from helpers import schematics
from helpers.estimators import enumerate_shapley
from helpers.shapley import coalition_values

DRAWN = {"attention_to_values": schematics.attention_to_values, "states_to_score": schematics.states_to_score}


@pytest.fixture(params=DRAWN)
def drawn(request):
    yield DRAWN[request.param]()
    plt.close("all")


def test_four_steps_are_numbered_and_joined_by_three_arrows(drawn):
    figure, axes = drawn
    titles = [text.get_text() for text in figure.texts if text.get_text()[:1].isdigit()]
    assert len(axes) == 4 and [title[0] for title in titles] == list("1234")
    assert len([artist for artist in figure.artists if hasattr(artist, "get_arrowstyle")]) == 3


def test_letters_do_not_touch_each_other_and_survive_a_screen_of_390_pixels(drawn):
    figure, _ = drawn
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.texts]
    touching = [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.overlaps(b)]
    assert not touching
    assert all(figure.bbox.contains(*corner) for box in boxes for corner in box.corners())
    smallest = min(text.get_fontsize() for text in figure.texts)
    assert smallest * 390 / (72 * figure.get_figwidth()) > 7  # pixels


def test_values_are_the_shapley_values_of_the_matrix_that_is_drawn():
    figure, axes = schematics.attention_to_values()
    value = lambda S: coalition_values(schematics.ATTENTION[1:, 1:], S, "mutual")
    expected = enumerate_shapley(value, 4)
    found = torch.tensor([bar.get_width() for bar in axes[3].patches], dtype=torch.double)
    torch.testing.assert_close(found, expected)
    captions = " ".join(text.get_text() for text in figure.texts)
    assert "v({not, bad}) =\n.45 + .40 = .85" in captions
    plt.close(figure)


def test_score_is_the_share_of_images_with_a_plus():
    figure, axes = schematics.states_to_score()
    signs = [text.get_text() for text in axes[3].texts]
    score = signs.pop()
    assert float(score) == round(signs.count("+") / len(signs), 2) and 0 < float(score) < 1
    said = f"{signs.count('+')} of {len(signs)}"
    assert any(said in text.get_text() for text in figure.texts)
    plt.close(figure)
