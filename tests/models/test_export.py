"""The exported encoder is plain timm."""

import json
from pathlib import Path

import pytest
import timm
import torch

from cfssl.errors import UserError
from cfssl.models.backbone import BackboneSettings, create_backbone
from cfssl.models.export import export_encoder


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("test_resnet", (1, 64, 64), {}),
        ("test_vit", (3, 48, 32), {}),
        ("test_vit", (1, 48, 48), {"patch_size": 8, "depth": 2, "reg_tokens": 3}),
        ("mobilenetv3_small_050", (1, 32, 32), {}),
    ],
)
def test_bare_timm_loads_the_export_and_gives_equal_features(
    tmp_path: Path, name: str, shape: tuple[int, int, int], options: dict[str, int]
) -> None:
    settings = BackboneSettings(name, options=options)
    encoder = create_backbone(settings, shape[0], shape[1:], seed=1, any_size=bool(options)).eval()
    export_encoder(encoder, tmp_path / "out", settings, shape, {"recipe": "r"})
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0).eval()
    images = torch.rand(2, *shape)
    with torch.no_grad():
        features = loaded(images)
        torch.testing.assert_close(features, encoder(images))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["num_features"] == features.shape[1]
    assert written["cfssl"] == {"recipe": "r"}
    config = timm.data.resolve_data_config({}, model=loaded)
    assert config["input_size"] == shape
    assert set(config["mean"]) == {0.0}
    assert set(config["std"]) == {1.0}


def test_an_export_does_not_overwrite(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"somebody's")
    encoder = create_backbone(BackboneSettings("test_resnet"), 1, 32, seed=0)
    with pytest.raises(UserError, match="is not empty"):
        export_encoder(encoder, tmp_path, BackboneSettings("test_resnet"), (1, 32, 32), {})
    assert (tmp_path / "model.safetensors").read_bytes() == b"somebody's"
