"""FastVLM in PyTorch: the FastViTHD tower, the Qwen2 decoder and the projector between them."""
