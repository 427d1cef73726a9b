"""The provider `triton`: kernels for NVIDIA and AMD GPUs, on torch tensors."""
