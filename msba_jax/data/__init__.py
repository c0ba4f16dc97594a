"""Collections of images: sources, splits by class, batches, augmentation."""
