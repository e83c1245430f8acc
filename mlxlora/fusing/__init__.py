"""What `fuse` is made of: rounding that minds its errors, measuring what changed, writing shard by shard."""
