"""Images, latent shards and the deterministic stream of batches."""
