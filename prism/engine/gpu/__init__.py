"""Steps of NVIDIA GPUs: lanes, CUDA graphs, draws without waiting."""
