"""What the system works on: documents, masks, packs, the model, its losses and metrics. Runs on a laptop, knows no cluster."""
