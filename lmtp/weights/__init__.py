"""A weights directory holds one model's files and their manifest: fetched ahead of time, loaded without network."""
