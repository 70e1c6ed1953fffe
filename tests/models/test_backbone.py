import pytest

from mmbivit.models import BinarySwinTransformer, find_block

ARCH = dict(embed_dims=8, depths=(2, 1), num_heads=(1, 2))


def test_find_block():
    network = BinarySwinTransformer(arch=ARCH, out_indices=(1,))
    assert find_block(network).module is network.stages[0].blocks[1]
    assert find_block(network, "stages.1.blocks.0").module is network.stages[1].blocks[0]


def test_unknown_block():
    network = BinarySwinTransformer(arch=ARCH, out_indices=(1,))
    message = (
        "there is no block 'stage.1.block.0'; allowed: the 3 from stages.0.blocks.0 to stages.1.blocks.0; "
        "did you mean 'stages.1.blocks.0'?"
    )
    with pytest.raises(ValueError) as error:
        find_block(network, "stage.1.block.0")
    assert str(error.value) == message
