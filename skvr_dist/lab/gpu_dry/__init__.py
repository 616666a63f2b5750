"""The host side of a GPU step on a machine without a GPU: under PyTorch's CUDA build lies a runtime that runs nothing.

`runtime.c` and `driver.c` answer what PyTorch, cuBLAS' callers, Triton and NCCL's callers ask of the device. Memory is
given out and never touched, kernels and products of matrices succeed without computing, and every number that comes
back is zero. So each host-side line of a step runs at real shapes, and what it asks for is counted.
"""
