"""The loop, on the one thread that touches the model: admit, step, deliver."""
