"""Number formats: bit-exact encoders and decoders, packed storage. Plain torch, on any device.

>>> q = Format.parse("int4:g64").encode(weight)   # (N, K) -> codes and scales
>>> (weight - q.decode()).norm() / weight.norm()
"""

from fewstep.quant.formats.elements import E2M1 as E2M1
from fewstep.quant.formats.elements import E2M3 as E2M3
from fewstep.quant.formats.elements import E3M2 as E3M2
from fewstep.quant.formats.elements import E4M3 as E4M3
from fewstep.quant.formats.elements import E5M2 as E5M2
from fewstep.quant.formats.elements import Integer as Integer
from fewstep.quant.formats.elements import Log as Log
from fewstep.quant.formats.elements import Minifloat as Minifloat
from fewstep.quant.formats.elements import Sign as Sign
from fewstep.quant.formats.elements import element as element
from fewstep.quant.formats.format import Format as Format
from fewstep.quant.formats.format import Quantized as Quantized
from fewstep.quant.formats.packing import pack as pack
from fewstep.quant.formats.packing import unpack as unpack
