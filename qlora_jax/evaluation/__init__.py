"""What a trained model says and how well: generation."""
