"""What is trained: named blocks of values, layer by layer."""
