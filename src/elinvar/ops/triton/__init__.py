"""The provider `triton`: kernels for NVIDIA and AMD GPUs, on torch tensors."""

import os

# A compiler that may fuse a product with a sum decides about bits, and may decide otherwise for another
# number of rows. Kernels say where they want an FMA, whatever the shell says.
os.environ["TRITON_DEFAULT_FP_FUSION"] = "0"
