"""Errors that the kernels' products may have, relative to the sum of the absolute terms of an element."""

import torch

PRODUCTS = {torch.float32: 1e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
# A tensor core cuts off what a sum has beyond its 24 bits, after every 4 or 8 terms; this CPU rounds to nearest.
FLOATS_ON_TENSOR_CORES = 6e-6


def of_products(dtype: torch.dtype, device: torch.device) -> float:
    """Return the tolerance of sums of up to 1,024 products, which is what one work item adds up."""
    is_float_on_gpu = dtype == torch.float32 and device.type == "cuda"
    return FLOATS_ON_TENSOR_CORES if is_float_on_gpu else PRODUCTS[dtype]
