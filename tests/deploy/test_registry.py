"""A class of networks from outside is packed, written and loaded without a change to the package."""

from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch
from torch import nn

from mmbivit.binary import BinaryLinear
from mmbivit.checks import UserError, check_integer
from mmbivit.deploy import PackedLinear, load, pack, save
from mmbivit.deploy.header import read_header
from mmbivit.deploy.registry import PACKERS, packs
from mmbivit.models import ImageClassifier
from mmbivit.packed import NETWORKS, PackedConfig, PackedNetwork, packed_network


class Pixels(nn.Module):
    """A binary layer on the channels of each pixel."""

    def __init__(self):
        super().__init__()
        self.layer = BinaryLinear(3, 6)
        self.num_features, self.out_indices = [6], (0,)

    def forward(self, images):
        return (self.layer(images.movedim(1, -1)).movedim(-1, 1),)


@dataclass(frozen=True)
class PackedPixelsConfig(PackedConfig):
    in_channels: int
    sides: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        check_integer("in_channels", self.in_channels, 1)


class PackedPixels(PackedNetwork):
    Config = PackedPixelsConfig

    def __init__(self, **options):
        super().__init__(**options)
        self.layer = PackedLinear(self.config.in_channels, 6)
        self.num_features, self.out_indices = [6], (0,)

    def forward(self, images):
        return (self.layer(images.movedim(1, -1).contiguous()).movedim(-1, 1),)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(NETWORKS, "PackedPixels", None)
    monkeypatch.setitem(PACKERS, Pixels, None)
    packed_network(PackedPixels)

    @packs(Pixels)
    def pack_pixels(network):
        packed = PackedPixels(in_channels=3, sides=[1, 2])
        packed.layer = pack(network.layer)
        return packed


@pytest.mark.usefixtures("registered")
def test_a_backbone_from_outside_goes_round_alone_and_in_a_classifier(tmp_path):
    torch.manual_seed(0)
    network, images = Pixels().eval(), torch.randn(2, 3, 5, 7)
    classifier = ImageClassifier(dict(type=Pixels), num_classes=3).eval()
    assert type(pack(network.layer)) is PackedLinear
    for model, kind in ((network, "backbone"), (classifier, "classifier")):
        packed = pack(model)
        save(packed, tmp_path / "file.safetensors")
        header = read_header(tmp_path / "file.safetensors")
        loaded = load(tmp_path / "file.safetensors")
        assert (header.kind, header.network) == (kind, "PackedPixels")
        assert header.architecture == dict(in_channels=3, sides=[1, 2])
        with torch.no_grad():
            for actual, same, expected in zip(loaded(images), packed(images), model(images), strict=True):
                assert torch.equal(actual, same)
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("registered")
def test_a_file_of_a_class_that_is_not_here_is_refused_by_name(tmp_path):
    save(pack(Pixels()), tmp_path / "file.safetensors")
    NETWORKS.pop("PackedPixels")
    with pytest.raises(UserError, match="holds a 'PackedPixels', .* allowed: .*PackedSwinTransformer"):
        load(tmp_path / "file.safetensors")
    with pytest.raises(UserError, match="PackedPixels is not registered"):
        save(pack(Pixels()), tmp_path / "other.safetensors")


def test_configurations_are_frozen_and_take_json():
    config = PackedPixelsConfig(3, sides=[1, 2])
    assert config.sides == (1, 2) and hash(config)
    with pytest.raises(FrozenInstanceError):
        config.in_channels = 4
    with pytest.raises(UserError, match="in_channels"):
        PackedPixels(in_channels=0)
