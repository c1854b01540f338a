"""How the numbers of one layer are stored and computed, and what each part's layers may ask for."""

from dataclasses import dataclass
from enum import StrEnum


class Float(StrEnum):
    """The float format of everything that is not an integer."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class Part(StrEnum):
    """The kinds of layers that a recipe speaks about."""

    VISION = "vision"
    EMBEDDING = "embedding"
    DECODER = "decoder"
    HEAD = "head"


class Method(StrEnum):
    """How integers are chosen for float weights: three for integer times scale, one for tables.

    `palette`: k-means finds the values of a lookup table, and each weight is an index into it.
    """

    RTN = "rtn"
    HQQ = "hqq"
    GPTQ = "gptq"
    PALETTE = "palette"


class Activations(StrEnum):
    """What enters a quantized layer's product."""

    FLOAT = "float"
    STATIC = "static"
    SYMMETRIC = "symmetric"
    DYNAMIC = "dynamic"
    AFFINE = "affine"


class ScaleFormat(StrEnum):
    """What the scales of integer weights are rounded to before the integers are chosen.

    `float`: the recipe's own format, behind the integers. A runtime that stores scales in `bf16`
    would round them, too, but for integers that were chosen for others.
    """

    FLOAT = "float"
    BF16 = "bf16"


class NumberFormat(StrEnum):
    """What quantized weights and activations are: integers, or floats of 8 bits.

    `fp8` is e4m3 without infinities (`torch.float8_e4m3fn`): up to 448, four bits of a value.
    """

    INTEGER = "integer"
    FP8 = "fp8"


METHODS = {
    Part.VISION: (Method.RTN, Method.PALETTE),
    Part.EMBEDDING: (Method.RTN, Method.HQQ, Method.PALETTE),
    Part.DECODER: tuple(Method),
    Part.HEAD: tuple(Method),
}
"""How integers can be chosen for each part: a table has no products for GPTQ to look at."""

PALETTE_BITS = (1, 2, 3, 4, 6, 8)
"""Sizes of an index into a lookup table, as Core ML stores them."""

ACTIVATIONS = {
    Part.VISION: (
        Activations.FLOAT,
        Activations.STATIC,
        Activations.SYMMETRIC,
        Activations.AFFINE,
    ),
    Part.EMBEDDING: (Activations.FLOAT,),
    Part.DECODER: (Activations.FLOAT, Activations.DYNAMIC, Activations.AFFINE),
    Part.HEAD: (Activations.FLOAT, Activations.DYNAMIC, Activations.AFFINE),
}
"""The tower sees images like those of the calibration; a decoder's tokens differ too much."""

FP8_ACTIVATIONS = (Activations.SYMMETRIC,)
"""Beside fp8 weights, for every part: a float's steps shrink with it, so one scale will do."""

FIXED = (Activations.STATIC, Activations.SYMMETRIC)
"""Activations whose range is fixed on calibration images."""

SCALE_FORMATS = {
    part: (ScaleFormat.FLOAT,) if part is Part.VISION else tuple(ScaleFormat) for part in Part
}
"""Convolutions have no groups, and their biases' scales are products with the weights'."""


FORMATS = {
    part: (NumberFormat.INTEGER,) if part is Part.EMBEDDING else tuple(NumberFormat)
    for part in Part
}
"""fp8 is for products, of which a table has none."""


class Observer(StrEnum):
    """How a static activation's range is taken from the calibration images."""

    MINMAX = "minmax"
    PERCENTILE = "percentile"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How the weights of a layer are stored, and what enters its product.

    `bits` None leaves the layer in the recipe's float format, and nothing else here counts.
    `group_size` consecutive weights along the input axis share one scale; None: all of an output
    channel. Symmetric weights are integer * scale, others (integer - zero point) * scale.
    `static` activations are unsigned, one scale and zero point per tensor, from calibration;
    `symmetric` ones signed, from calibration, too, with one scale per tensor and no zero point;
    `dynamic` ones signed, rounded at run time with one scale per token and weight group;
    `affine` ones have one scale and zero point per token (`ops.round_affine`). A convolution knows
    no tokens: where a vision layer of `affine` activations is one, they are `static`.

    Under the `fp8` format weights are floats of 8 bits with one scale per output channel, and so
    are activations, `symmetric` ones in every part; only linear layers are quantized, convolutions
    stay as they are. `group_size`, `symmetric`, `method` and `scale_format` stay as they are here.

    Under `palette` a weight is an index of `bits` bits into a table of 2^bits floats, which
    `group_size` consecutive output channels share; None: all of the layer. Activations are `float`,
    and `symmetric` and `scale_format` say nothing: they stay as they are here.
    """

    bits: int | None = None
    group_size: int | None = None
    symmetric: bool = True
    method: Method = Method.RTN
    activations: Activations = Activations.FLOAT
    activation_bits: int = 8
    scale_format: ScaleFormat = ScaleFormat.FLOAT
    number_format: NumberFormat = NumberFormat.INTEGER

    @property
    def fp8(self) -> bool:
        """Whether weights are floats of 8 bits."""
        return self.bits is not None and self.number_format is NumberFormat.FP8

    @property
    def palettized(self) -> bool:
        """Whether weights are indices into lookup tables."""
        return self.bits is not None and self.method is Method.PALETTE
