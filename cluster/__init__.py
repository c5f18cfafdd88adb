"""Where the system runs: Ray, DeepSpeed, MLflow, storage, Kubernetes. Knows nothing of masks, images or embeddings."""
