"""What everyone may import: configs, plain data between the layers, errors, metrics."""
