"""Everything that runs over ranks: mesh, tensor parallelism, pipeline stages, failures; DeepSpeed in `engine` only."""
