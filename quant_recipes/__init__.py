"""What is quantized and how: recipes, grids, fake-quantized and integer layers, the quantized checkpoint."""
