"""Models from ComfyUI's split files and from checkpoints: the folder's weights, tokens and answers, or one clear line."""

import native_files
import pytest
import torch
from torch import nn

from g2rpo_trainer import families
from g2rpo_trainer.sections import ModelSection


@pytest.fixture(scope="module", params=native_files.FAMILIES)
def model(request, tmp_path_factory):
    """Write a model as a folder, as files and as a checkpoint."""
    return request.param, native_files.write(tmp_path_factory.mktemp("files"), request.param)


def section(name: str, **given: object) -> ModelSection:
    """Describe a tiny model as a recipe does."""
    return ModelSection(**{"family": native_files.FAMILIES[name][0], "guidance": 1, "max_sequence_length": 16, **given})


def split(files) -> dict[str, object]:
    """Name the files of the parts as a recipe does."""
    texts = tuple(str(path) for part, path in files.items() if part.startswith("text_encoder"))
    return {"transformer": str(files["transformer"]), "vae": str(files["vae"]), "text_encoders": texts, "tokenizers": str(files["folder"])}


def parts(policy) -> dict[str, nn.Module]:
    """List the modules of a policy's pipeline."""
    return {name: part for name, part in policy.pipeline.components.items() if isinstance(part, nn.Module)}


def test_files_give_the_weights_settings_and_features_of_the_folder(model):
    name, files = model
    folder = families.load(section(name), files["folder"], "cpu")
    got = families.load(section(name, **split(files)), None, "cpu")
    assert parts(got).keys() == parts(folder).keys()
    for part, ours in parts(folder).items():
        weights = parts(got)[part].state_dict()
        assert weights.keys() == ours.state_dict().keys()
        assert all(torch.equal(weights[key], value) for key, value in ours.state_dict().items()), part
    prompt = "a red circle"
    assert all(torch.equal(a, b) for a, b in zip(got.encode([prompt])[0], folder.encode([prompt])[0], strict=True))
    shape = folder.latent_shape(64, 64)
    assert torch.equal(got.pipeline_sigmas(5, shape), folder.pipeline_sigmas(5, shape))
    x, sigma = torch.randn(1, *shape), torch.tensor([0.6])
    with torch.no_grad():
        assert torch.equal(got.velocity(x, sigma, got.encode([prompt])), folder.velocity(x, sigma, folder.encode([prompt])))
        assert torch.equal(got.decode(x), folder.decode(x))
