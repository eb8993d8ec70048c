"""Files to samples: the fine print set, shards, sources and the stream."""
