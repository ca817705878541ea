"""Quantised layers: one linear layer and one convolution, whatever the format and the backend."""

from fewstep.quant.layers.base import QuantLayer as QuantLayer
from fewstep.quant.layers.conv import QuantConv2d as QuantConv2d
from fewstep.quant.layers.linear import QuantLinear as QuantLinear
