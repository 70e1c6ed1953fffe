"""Packing of layers that are registered for the configs of MMDetection, which is loaded where a model has one."""

from mmbivit.deploy.registry import PACKERS
from mmbivit.models.detection import StagedConv2d

from .convolution import pack_conv

PACKERS[StagedConv2d] = pack_conv
