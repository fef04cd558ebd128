"""The machine: device, precision, compilation, memory, well-known cards."""
