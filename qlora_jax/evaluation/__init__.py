"""What a trained model says and how well: held-out loss, generation."""
