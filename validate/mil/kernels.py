"""All operations that a run makes, by the name MIL has for them."""

from collections.abc import Callable

from . import (
    ops_elementwise,
    ops_image,
    ops_index,
    ops_linear,
    ops_quantized,
    ops_reduce,
    ops_shape,
    states,
)
from .node import Kernel, Node

OPERATIONS: dict[str, Callable[[Node], Kernel]] = {
    **ops_elementwise.OPERATIONS,
    **ops_image.OPERATIONS,
    **ops_index.OPERATIONS,
    **ops_linear.OPERATIONS,
    **ops_quantized.OPERATIONS,
    **ops_reduce.OPERATIONS,
    **ops_shape.OPERATIONS,
    **states.OPERATIONS,
}
