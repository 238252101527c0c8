"""`weights/`: one model's files and their manifest, fetched ahead of time and loaded offline."""
