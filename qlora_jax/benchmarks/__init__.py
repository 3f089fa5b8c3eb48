"""What `python -m qlora_jax.bench` measures: the kernels beside their peers and the hardware's limits, and the demo."""
