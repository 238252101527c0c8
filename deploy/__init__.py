"""Several containers of one model behind one address."""
