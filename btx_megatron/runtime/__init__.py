"""Where ranks run: devices, process groups, signals, and every word about machines without CUDA."""
