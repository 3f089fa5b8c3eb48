"""What `python -m qlora_jax.doctor` looks at, and what it advises."""
