"""What `script/benchmark` measures: this project beside its peers, one table."""
