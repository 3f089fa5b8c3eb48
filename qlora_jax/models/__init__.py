"""Models: readable NNX modules with stacked layers, and their loading from foreign checkpoints."""
