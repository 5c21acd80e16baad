"""Backbones: what cannot be had or would be ignored is refused in one sentence."""

import pytest
import torch

from cfssl.errors import UserError
from cfssl.models.backbone import (
    BackboneSettings,
    check_backbone,
    check_size,
    create_backbone,
    feature_size,
    has_patch_tokens,
)


def test_an_unknown_backbone_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"'resnet18'"):
        check_backbone("resnet_18")


def test_weights_that_cannot_be_had_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="pretrained weights of test_resnet could not be loaded"):
        create_backbone(BackboneSettings("test_resnet"), 1, 32, seed=0, pretrained=True)


@pytest.mark.parametrize("name", ["vgg11", "hrnet_w18_small"])
def test_stochastic_depth_is_refused_for_a_model_without_it(name: str) -> None:
    with pytest.raises(UserError, match=rf"drop_path is 0\.1, but {name} has no stochastic depth"):
        create_backbone(BackboneSettings(name, drop_path=0.1), 1, 32, seed=0)


def test_options_reach_timm_and_unknown_ones_are_named() -> None:
    settings = BackboneSettings("test_vit", options={"patch_size": 8, "depth": 3})
    model = create_backbone(settings, 1, 48, seed=0)
    assert len(model.blocks) == 3
    assert model.patch_embed.patch_size == (8, 8)
    with pytest.raises(UserError, match=r"options holds 'depht', which test_vit does not have"):
        create_backbone(BackboneSettings("test_vit", options={"depht": 3}), 1, 48, seed=0)
    with pytest.raises(ValueError, match=r"options holds \['img_size'\], which follows from other keys"):
        BackboneSettings("test_vit", options={"img_size": 48})


def test_position_embeddings_of_any_size_leave_the_stated_size_as_it_was() -> None:
    settings = BackboneSettings("vit_tiny_patch16_224", options={"depth": 1})
    fixed, free = (
        create_backbone(settings, 1, 48, seed=0, any_size=any_size).eval() for any_size in (False, True)
    )
    images = torch.rand(2, 1, 48, 48)
    torch.testing.assert_close(free(images), fixed(images))
    assert free(images[:, :, :32]).shape == (2, feature_size(free))
    with pytest.raises(UserError, match=r"vit_tiny, which cannot take views of 32 x 48 pixels"):
        check_size(fixed, "vit_tiny", 1, (32, 48))
    with pytest.raises(UserError, match=r"views of 40 x 40 pixels .* another patch_size"):
        check_size(free, "vit_tiny", 1, (40, 40))
    check_size(free, "vit_tiny", 1, (32, 48))
    with pytest.raises(UserError, match="takes images of one size"):
        create_backbone(BackboneSettings("convit_tiny"), 1, 48, seed=0, any_size=True)


def test_vision_transformers_alone_have_patch_tokens() -> None:
    for name, expected in (("test_vit", True), ("test_resnet", False), ("mobilenetv3_small_050", False)):
        assert has_patch_tokens(create_backbone(BackboneSettings(name), 1, 32, seed=0)) == expected


def test_stochastic_depth_acts_in_training_alone() -> None:
    model = create_backbone(BackboneSettings("test_vit", drop_path=0.5), 1, 32, seed=0)
    images = torch.rand(4, 1, 32, 32)
    assert not torch.equal(model.train()(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


def test_other_mistakes_of_a_model_are_not_taken_for_stochastic_depth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise TypeError("something else")

    monkeypatch.setattr("timm.create_model", broken)
    with pytest.raises(TypeError, match="something else"):
        create_backbone(BackboneSettings("test_vit", drop_path=0.5), 1, 32, seed=0)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "mobilenetv3_small_050"])
def test_the_feature_size_is_the_width_of_what_comes_out(name: str) -> None:
    model = create_backbone(BackboneSettings(name), 1, 32, seed=0).eval()
    assert model(torch.rand(1, 1, 32, 32)).shape == (1, feature_size(model))


def test_the_weights_are_a_function_of_the_seed_and_the_global_stream_is_untouched() -> None:
    def weights(seed: int) -> torch.Tensor:
        model = create_backbone(BackboneSettings("test_resnet"), 1, 32, seed=seed)
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    before = torch.random.get_rng_state()
    first = weights(1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(3)
    assert torch.equal(weights(1), first)
    assert not torch.equal(weights(2), first)
