"""One call for one explanation: methods by name, the class to explain and its rival, images by path, and
a form.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import ipywidgets
import numpy as np
import torch
from IPython.display import HTML, display
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from PIL import Image

from helpers import plots
from helpers.attention import read_attention
from helpers.images import load_images, read_image
from helpers.labels import find_class
from helpers.models import check_explainable
from helpers.paths import local_path
from helpers.relevance import gradient_times_input, reference_logits
from helpers.shapley import ATTRIBUTIONS, best_attention_game, shapley_attributions
from helpers.text import encode, token_players, word_groups

BEST = "Shapley-Rel-Att-Contrast"
METHODS = (BEST, "AttnLRP", *ATTRIBUTIONS)  # the recommended one first, then the paper's six
RUNNER_UP = "runner-up"


def explain(model, inputs, players: torch.Tensor, target=None, method: str = BEST) -> torch.Tensor:
    """Return a method's attributions (batch, tokens), 0 off the players.

    inputs   what the model takes: input_ids and attention_mask (batch, tokens), or pixel_values
    players  bool (batch, tokens), from `token_players` or `patch_players`
    target   explained class as in `read_attention`
    method   one of METHODS

    Raises ValueError for an unknown method, and as the method itself does.
    """
    check_method(method)
    if method == BEST:
        return best_attention_game(model, inputs, players, target)
    if method == "AttnLRP":
        return gradient_times_input(model, inputs, target, rules="attnlrp") * players
    maps = read_attention(model, inputs, target, gradients="Grad" in method)
    return shapley_attributions(maps, players)[method]


def check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown; use one of {', '.join(METHODS)}")


def decide(model, inputs, wanted: str = "") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return probabilities (batch, classes), the class to explain (batch,) and its rival, on the CPU.

    wanted  "" for the predicted class, "runner-up" for the next, or a label as in `find_class`

    The rival is the most probable other class. One forward pass. Raises ValueError for an unknown label.
    """
    check_explainable(model, inputs)
    named = find_class(model, wanted) if wanted not in ("", RUNNER_UP) else None
    with torch.no_grad():
        probabilities = model(**inputs).logits.softmax(-1).cpu()
    first, second = probabilities.topk(2).indices.T
    chosen = second if wanted == RUNNER_UP else first
    if named is not None:
        chosen = torch.full_like(first, named)
    return probabilities, chosen, torch.where(chosen == first, second, first)


def describe_reference(
    model, inputs, players: torch.Tensor, chosen, method: str = BEST, names: Sequence[str] = ()
) -> list[str]:
    """Return lines that say what a model calls the average words, or patches, which BEST compares with.

    chosen  explained class of each input, from `decide`
    names   of the inputs, or their paths; else they are numbered. Those with the same classes share a line

    One forward pass. Other methods compare with no other input: for them the list is empty.
    """
    if method != BEST:
        return []
    kind, what = ("image", "patches") if "pixel_values" in inputs else ("text", "words")
    names = [Path(name).name for name in names] or [f"{kind} {row}" for row in range(len(players))]
    labels = model.config.id2label
    p = reference_logits(model, inputs, players).softmax(-1).cpu()
    alike: dict[tuple[int, int], list[int]] = {}
    for row, pair in enumerate(zip(p.argmax(-1).tolist(), chosen.tolist(), strict=True)):
        alike.setdefault(pair, []).append(row)
    lines = []
    for (called, explained), rows in alike.items():
        line = f"{', '.join(names[row] for row in rows)}: compared with average {what}, which this model "
        if called == explained:
            line += f"already calls {labels[called]} ({_range(p[rows, called])}), as explained; values tell "
            lines.append(line + "what moves the decision away from it, not what makes it.")
        else:
            line += f"calls {labels[called]} ({_range(p[rows, called])}), not {labels[explained]} "
            lines.append(line + f"({_range(p[rows, explained])}).")
    return lines


def _range(shares: torch.Tensor) -> str:
    return " to ".join(dict.fromkeys(f"{float(share):.2f}" for share in (shares.min(), shares.max())))


def gather_images(
    places: Sequence[str], n_images: int, seed: int = 0
) -> tuple[dict[str, Image.Image], list[str]]:
    """Read files, and folders of files, as {path: RGB image}, `n_images` of them at most.

    Returns them, and a line that says of how many, if there are more. Of a folder they are drawn as in
    `load_images`. Raises ValueError for n_images that is no whole number from 1, FileNotFoundError for what
    does not exist.
    """
    if type(n_images) is not int or n_images < 1:
        raise ValueError(f"n_images must be a whole number from 1, not {n_images!r}")
    found: dict[str, Image.Image] = {}
    named: set[str] = set()
    for place in places:
        path = local_path(place)
        if not path.exists():
            raise FileNotFoundError(f"image {place!r} does not exist; give files, or folders of them")
        if path.is_dir():
            inside, folder = load_images(path, n_images, seed), place.rstrip("/")
            found |= {f"{folder}/{name}": image for name, image in inside.items()}
            files = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
            named |= {f"{folder}/{file.as_posix()}" for file in files if not _is_hidden(file)}
        else:
            found[place] = read_image(path)
            named.add(place)
    shown, notes = dict(list(found.items())[:n_images]), []
    if len(shown) == n_images < len(named):
        notes.append(f"{n_images} of {len(named)} files are shown and used; `n_images` says how many.")
    return shown, notes


def _is_hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


def show_form(model, tokenizer, text: str) -> None:
    """Show a form in a notebook that explains a text as it is typed, for any class, by any method."""

    def as_you_type(text: str, wanted: str, method: str) -> None:
        try:
            inputs = encode([text], tokenizer, model)
            probabilities, chosen, _ = decide(model, inputs, wanted)
            players = token_players(inputs, tokenizer)
            values = explain(model, inputs, players, chosen, method)[0].cpu()
            compared = describe_reference(model, inputs, players, chosen, method, ["colours"])
        except ValueError as error:
            print(error)
            return
        words, places = zip(*word_groups(inputs, 0, text), strict=True)
        print(f"{model.config.id2label[int(chosen)]}: probability {probabilities[0, int(chosen)]:.2f}")
        display(HTML(coloured_words(words, [float(values[at].sum()) for at in places])))
        print(*compared, sep="\n", end="\n" * len(compared))

    labels = {name: name for name in model.config.id2label.values()}
    classes = {"predicted": "", RUNNER_UP: RUNNER_UP, **labels}
    ipywidgets.interact(
        as_you_type,
        text=ipywidgets.Text(text, layout={"width": "95%"}),
        wanted=ipywidgets.Dropdown(options=classes, description="class"),
        method=ipywidgets.Dropdown(options=METHODS),
    )


def coloured_words(words: Sequence[str], values: Sequence[float]) -> str:
    """Return HTML with each word on the colour that `token_strips` gives it: quick enough for a form."""
    shares = np.asarray(values, dtype=float)
    colors = ScalarMappable(Normalize(-1, 1), plots.SIGNED).to_rgba(
        shares / (np.abs(shares).max() or 1), bytes=True
    )
    spans = [
        f'<span style="background: rgb({red},{green},{blue}); color: {_ink((red, green, blue))}; '
        f'padding: 2px 4px; margin: 1px">{escape(word)}</span>'
        for word, (red, green, blue, _) in zip(words, colors.tolist(), strict=True)
    ]
    return f'<p style="line-height: 2">{" ".join(spans)}</p>'


def _ink(color: Sequence[float]) -> str:
    return "white" if np.dot(color, (0.299, 0.587, 0.114)) < 128 else "black"
