"""What `script/benchmark` measures: this project against its peers, or against another checkout of itself."""
